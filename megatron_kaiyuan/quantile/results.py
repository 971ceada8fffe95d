"""What was measured of each run: one JSON file a run, and the check that a set of them compares."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.quantile.runs import Run, SlicedStudy
from megatron_kaiyuan.quantile.study import Study

__all__ = [
    "HeldOutResult",
    "Identity",
    "RunResult",
    "TaskResult",
    "bits_per_byte",
    "check_comparable",
    "groups_of",
    "read_result",
    "read_results",
    "result_path",
    "write_result",
]

_FORMAT = "megatron_kaiyuan.quantile_result/1"


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be equal for two results to be compared."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    model: str
    """Digest of the arguments that shape the model and its training."""
    tokens: int
    """Tokens it was trained on."""
    evaluation: str
    """Digest of what it was measured with."""


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """Losses on a held-out set, document by document.

    The documents are the same in every run.
    """

    nats: tuple[float, ...]
    """Sum of the cross-entropy over the predicted tokens of each document."""
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    """Of the predicted tokens. All 0 when the tokenizer does not say."""
    groups: tuple[int, ...] = ()
    """Documents with one number come from one place, such as a package or a host; empty: each is by itself."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Scores of a task, item by item.

    The items are the same in every run.
    """

    items: str
    """Digest of the items in their order."""
    answer_bits_per_byte: tuple[float, ...]
    """Minus the log likelihood of the right answer, per byte of it: lower is better."""
    metrics: Mapping[str, tuple[float, ...]]
    """Other scores, keyed with their names, higher is better: `accuracy`, `accuracy_norm`, `margin`, ... Results before
    2026-12 have `accuracy_per_byte` instead, per byte of the answer with the space before it."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything that was measured of one run."""

    run: str
    digest: str
    """Of the run."""
    identity: Identity
    held_out: Mapping[str, HeldOutResult]
    tasks: Mapping[str, TaskResult]
    not_evaluated: Mapping[str, str]
    """Tasks that could not be loaded or run, with the reason."""
    tokens_per_second: float


def result_path(study: Study, run: Run) -> Path:
    """Where the results of a run are."""
    return study.folder / "results" / f"{run.name}.json"


def write_result(study: Study, run: Run, result: RunResult) -> None:
    """Write the results of a run, whole or not at all."""
    text = json.dumps({"format": _FORMAT, **asdict(result)})
    write_text_atomically(result_path(study, run), text + "\n")


def read_result(path: Path) -> RunResult:
    """Read the results of one run.

    Raises:
        StudyError: not a file of results.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("format", None) != _FORMAT:
        raise StudyError(f"{path}: not results of this version; run `evaluate` again")
    return RunResult(
        **{
            **content,
            "identity": Identity(**content["identity"]),
            "held_out": {name: HeldOutResult(**_tuples(told)) for name, told in content["held_out"].items()},
            "tasks": {
                name: TaskResult(**_tuples(told) | {"metrics": _tuples(told["metrics"])})
                for name, told in content["tasks"].items()
            },
        }
    )


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def read_results(study: Study, sliced: SlicedStudy, *, partial: bool) -> dict[str, RunResult]:
    """Return the results of all runs, keyed with their names, in the order of the study.

    Raises:
        StudyError: results are missing (and `partial` is not set), or do not compare.
    """
    present = {run.name: result_path(study, run) for run in sliced.runs if result_path(study, run).is_file()}
    missing = [run.name for run in sliced.runs if run.name not in present]
    if not present or (missing and not partial):
        raise StudyError(
            f"{len(missing)} of {counted(len(sliced.runs), 'run')} have no results: {', '.join(missing[:6])}"
            f"{' ...' if len(missing) > 6 else ''}; run `train` and `evaluate`, or report on the others with --partial"
        )
    results = {name: read_result(path) for name, path in present.items()}
    digests = {run.name: run.digest for run in sliced.runs}
    stale = [name for name, result in results.items() if result.digest != digests[name]]
    if stale:
        raise StudyError(f"results/{stale[0]}.json: of another training of this run; run `evaluate` again")
    older = [name for name, result in results.items() if result.identity.evaluation != study.evaluation_digest]
    if older:
        raise StudyError(
            f"results/{older[0]}.json: measured with another evaluation than the study file has now "
            f"({len(older)} of {counted(len(results), 'result')}); run `evaluate` again"
        )
    check_comparable(results)
    return results


def check_comparable(results: Mapping[str, RunResult]) -> None:
    """Refuse results that differ in more than the data the models were trained on.

    Raises:
        StudyError: names the two runs, what differs, and what to do.
    """
    (first, reference), *others = results.items()
    for name, result in others:
        for field in fields(Identity):
            before, now = (getattr(some.identity, field.name) for some in (reference, result))
            if before != now:
                raise StudyError(
                    f"runs {first} and {name} do not compare: {_MEANING[field.name]} differs ({before} and {now}); "
                    f"{_REMEDY[field.name]}"
                )
        _check_items(first, reference, name, result)


_MEANING = {
    "tokenizer": "the tokenizer",
    "model": "the model or its training",
    "tokens": "the training budget in tokens",
    "evaluation": "what they were measured with",
}
_REMEDY = {
    "tokenizer": "build all shards with one tokenizer",
    "model": "train all runs with one study file",
    "tokens": "train all runs with one budget",
    "evaluation": "run `evaluate` again for all runs",
}


def _check_items(first: str, reference: RunResult, name: str, result: RunResult) -> None:
    for held_out in reference.held_out:
        if result.held_out[held_out].tokens != reference.held_out[held_out].tokens:
            raise StudyError(f"runs {first} and {name} were evaluated on different documents of {held_out!r}")
    for task in sorted(reference.tasks.keys() | result.tasks.keys()):
        items = {one.tasks[task].items if task in one.tasks else None for one in (reference, result)}
        if len(items) > 1:
            raise StudyError(
                f"runs {first} and {name} do not compare: task {task!r} has other items, or was evaluated in one of "
                "them only; run `evaluate` again for all runs"
            )


def bits_per_byte(result: HeldOutResult) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return values and weights of documents, `[n]` each, whose weighted mean is bits per byte.

    It is bits per token without bytes.
    """
    weights = np.array(result.bytes if sum(result.bytes) else result.tokens, dtype=np.float64)
    some = weights > 0
    nats = np.array(result.nats, dtype=np.float64)[some]
    return nats / np.log(2) / weights[some], weights[some]


def groups_of(result: HeldOutResult) -> NDArray[np.int64] | None:
    """Return the numbers of the groups of the documents that `bits_per_byte` returns, `[n]`.

    None where each document is a group of its own.
    """
    if not result.groups:
        return None
    sizes = np.array(result.bytes if sum(result.bytes) else result.tokens)
    return np.array(result.groups, dtype=np.int64)[sizes > 0]
