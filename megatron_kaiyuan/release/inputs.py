"""What a person gives beside the run: each file is read whole or refused in a sentence, and must be of this run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_kaiyuan.checkpoints.checksums import content_fingerprint
from megatron_kaiyuan.checkpoints.lineage import start_at
from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import KaiyuanError, ReleaseError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.files import open_regular
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.run_metrics import Run, read_run

__all__ = ["Notes", "Weights", "evaluation_of_weights", "metrics_of_run", "read_licence"]

_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Weights:
    """One set of weights of a release."""

    folder: str
    """Where they lie in it: `.` or a subfolder."""
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Notes:
    """What an examination of the inputs found, so that one pass says all of it."""

    unknown: list[str] = field(default_factory=list)
    """What nobody knows, each with how to give it."""
    refused: list[str] = field(default_factory=list)
    """What is wrong with the inputs; with one of them there is no release."""

    def refuse(self, what: str, error: Exception) -> None:
        """Keep an error of an input for later.

        Args:
            what: Flag and path.
            error: Its message is one line here.
        """
        told = " ".join(str(error).split())
        self.refused.append(told if told.startswith(what) else f"{what}: {told}")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class _Source(_Strict):
    loss: float
    tokens: int
    bits_per_byte: float | None = None
    bands: list[float | None] = []


class _Task(_Strict):
    items: int
    num_fewshot: int | None = None
    limit: int | None = None
    scores: dict[str, float]
    standard_errors: dict[str, float | None]


class _Row(_Strict):
    label: str
    iteration: int
    checkpoint: str | None = None
    sources: dict[str, _Source] = {}
    tasks: dict[str, _Task] = {}
    not_evaluated: dict[str, str] = {}


class _Evaluation(_Strict):
    plan_fingerprint: str | None
    results: list[_Row] = Field(min_length=1)


def _read(path: Path) -> bytes:
    """Return the bytes of a file of a person.

    Raises:
        ReleaseError: a folder, a pipe, missing, unreadable, empty or too large to be meant.
    """
    try:
        with open_regular(path) as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ReleaseError(f"{error.strerror}; name the file") from error
    if not content:
        raise ReleaseError("the file is empty")
    if len(content) > _MOST_BYTES:
        raise ReleaseError(f"more than {_MOST_BYTES >> 20} MiB, which no file of this kind has")
    return content


def read_licence(path: Path) -> str:
    """Return the text of a licence.

    Raises:
        ReleaseError: it is no text.
    """
    try:
        text = _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReleaseError("not UTF-8; give the licence as plain text") from error
    if not text.strip() or "\x00" in text:
        raise ReleaseError("holds no text")
    return text


def evaluation_of_weights(path: Path, weights: Sequence[Weights], plans: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the results of the released weights, each with the folder of the weights in the release.

    Args:
        path: JSON of `tools/evaluate.py`.
        weights: Of the release.
        plans: Fingerprints that the plan of the run has; None: the plan is not known.

    Raises:
        ReleaseError: it is no such file, or was measured on other weights or with another plan.
    """
    content = _evaluation(path)
    folders = {content_fingerprint(part.checkpoint.folder): part.folder for part in weights}
    found = [
        {**row.model_dump(exclude={"label"}), "folder": folders[row.checkpoint]}
        for row in content.results
        if row.checkpoint in folders
    ]
    if not found:
        measured = ", ".join(row.label for row in content.results)
        unnamed = all(row.checkpoint is None for row in content.results)
        why = "does not say which files it measured" if unnamed else "measures the files of other weights"
        raise ReleaseError(f"{why} ({measured}); run {tool('evaluate')} on the released checkpoints")
    _check_held_out(content, found, plans)
    return sorted(found, key=lambda row: str(row["folder"]))


def _evaluation(path: Path) -> _Evaluation:
    try:
        return _Evaluation.model_validate_json(_read(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ReleaseError(f"not what {tool('evaluate')} --json writes ({place}: {first['msg']})") from error


def _check_held_out(content: _Evaluation, found: Sequence[Mapping[str, Any]], plans: Sequence[str] | None) -> None:
    """Documents that another plan holds out may be those that this run was trained on."""
    if not any(row["sources"] for row in found):
        return
    if plans is None:
        raise ReleaseError("held-out losses cannot be compared with the run, whose plan is not known; give --plan FILE")
    if content.plan_fingerprint not in plans:
        raise ReleaseError(
            f"held-out losses of the plan {content.plan_fingerprint}, the run's is {plans[0]}: its documents may have "
            f"been trained on; run {tool('evaluate')} with the plan of the run"
        )


def metrics_of_run(path: Path, run: Checkpoint, plan: Plan | None, unknown: list[str]) -> Run:
    """Return the lines of a run up to a checkpoint.

    Args:
        path: `metrics.jsonl`.
        run: The checkpoint.
        plan: That of the run, where it is known.
        unknown: Is added to where nothing but the place of the file shows that it is of this run.

    Raises:
        ReleaseError: it cannot be read, or was written by another run.
    """
    try:
        told = read_run(path)
    except KaiyuanError as error:
        raise ReleaseError(str(error)) from error
    lines = tuple(line for line in told.lines if line.iteration <= run.iteration)
    if not lines:
        raise ReleaseError(f"begins after iteration {run.iteration}, where the run is released")
    told = replace(told, lines=lines, restarts=tuple(pair for pair in told.restarts if pair[0] <= run.iteration))
    _check_lines(told, run, plan)
    starts = [(line, known) for line in lines if (known := start_at(run.arguments, line.iteration)) is not None]
    if wrong := next((line for line, known in starts if line.start not in (None, known)), None):
        raise ReleaseError(f"step {wrong.iteration} was written by another run (start {wrong.start})")
    if not any(line.start is not None for line, _ in starts):
        if path.resolve().parent != run.folder.resolve().parent:
            raise ReleaseError(
                "nothing in it names the run (written by an earlier version), and it does not lie in the run's folder"
            )
        unknown.append("proof that metrics.jsonl is of this run, beside its place and its counts of samples")
    return told


def _check_lines(told: Run, run: Checkpoint, plan: Plan | None) -> None:
    """Compare counts and names."""
    samples, length = (getattr(run.arguments, name, None) for name in ("consumed_train_samples", "seq_length"))
    last = told.lines[-1]
    if told.seq_length not in (None, length):
        raise ReleaseError(f"samples of {counted(told.seq_length, 'token')}, those of the run have {length}")
    at_end = last.iteration == run.iteration
    if samples is not None and (last.consumed_samples > samples or (at_end and last.consumed_samples != samples)):
        raise ReleaseError(
            f"{counted(last.consumed_samples, 'sample')} at iteration {last.iteration}, the checkpoint of iteration "
            f"{run.iteration} has seen {samples}"
        )
    foreign = [] if plan is None else [name for name in told.sources if name not in plan.sources]
    if foreign:
        raise ReleaseError(f"counts tokens of {foreign[0]}, which is no source of the run's plan")
