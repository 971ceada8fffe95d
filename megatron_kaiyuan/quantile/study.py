"""The study file of a quantile benchmark: YAML validated field by field, unknown keys refused."""

import hashlib
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from megatron_kaiyuan.data.plan_schema import TokenizerSpec, Tokens
from megatron_kaiyuan.data.selection import parse_fraction
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.yaml_file import NotYamlError, read_yaml
from megatron_kaiyuan.quantile.evaluation_spec import EvaluationSpec, StrictModel
from megatron_kaiyuan.quantile.reference_model import ReferenceModel, preset_model

__all__ = [
    "BenchmarkSource",
    "SliceSpec",
    "Study",
    "TrainingSpec",
    "TrunkSpec",
    "load_study",
    "parse_study",
    "top_name",
]


def _parse_top(value: object) -> Fraction:
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is not a quantile; write 0%, 20% or 0.2 (counted from the best document)")
    return parse_fraction(str(value).strip())


def _parse_seeds(value: object) -> object:
    """`3` stands for seeds 1, 2, 3."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{counted(value, 'seed')}; give at least one, and three or more to draw conclusions")
        return list(range(1, value + 1))
    return value


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = [value for number, value in enumerate(values) if value in values[:number]]
    if repeated:
        raise ValueError(f"{float(repeated[0]):g} is named twice")
    return values


Top = Annotated[Fraction, BeforeValidator(_parse_top)]


class BenchmarkSource(StrictModel):
    """A scored dataset whose slices are compared."""

    shards: str | list[str]
    """A prefix, a directory, a glob, or a list of these; relative to the working directory."""
    score: str
    """Score sidecar that ranks the documents, higher is better. In a study file a list too, which stands for as many
    sources, named `source-score`."""
    domain: str | None = None
    """Group in the report and in the proposed plan."""
    rank_index: str | None = None
    """Path of the rank index, when it is not beside the shards."""
    dataset: str | None = None
    """The source in the study file that this is one score of; None: it has one score, and is itself the dataset."""


class SliceSpec(StrictModel):
    """Which part of each source one run is trained on."""

    tops: Annotated[tuple[Top, ...], Field(min_length=2), AfterValidator(_unique)] = tuple(
        Fraction(percent, 100) for percent in (0, 20, 40, 60, 80)
    )
    """Quantiles counted from the best document: a slice lies around each, 0 % is the very best."""
    tokens: Tokens
    """Size of every slice; a whole number of windows of `seq_length`."""
    documents: Literal["own", "spread", "shared"] = "own"
    """`own`: each seed has documents of its own, next to each other by score; `spread`: of its own, evenly over the
    stratum around the quantile; `shared`: all seeds have the same."""
    min_documents: int = Field(default=30, gt=0)
    """A slice of fewer documents is refused: it would measure single documents, not a quantile."""


class TrainingSpec(StrictModel):
    """How every run is trained, all runs alike."""

    tokens: Tokens | None = None
    """Budget of each run; None: the slice once."""
    seeds: Annotated[tuple[int, ...], BeforeValidator(_parse_seeds), Field(min_length=1), AfterValidator(_unique)] = (
        1,
        2,
        3,
    )
    """Of the initial weights, the order and, with own documents, which documents."""
    micro_batch_size: int = Field(default=8, gt=0)
    global_batch_size: int = Field(default=256, gt=0)
    processes: int = Field(default=1, gt=0)
    """Ranks of one run (data parallel, unless `flags` say otherwise)."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    lr: float = Field(default=1e-3, gt=0)
    min_lr: float = Field(default=1e-4, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    save_interval: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; None: a fifth of the run."""
    flags: tuple[str, ...] = ()
    """More of Megatron's flags, the same for all runs."""

    @model_validator(mode="after")
    def _rates_and_seeds(self) -> "TrainingSpec":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}, where the rate falls to it")
        if low := [seed for seed in self.seeds if seed < 1]:
            raise ValueError(f"seeds: {low[0]} is no seed; Megatron takes whole numbers from 1")
        return self


class TrunkSpec(StrictModel):
    """With `design: branch`, the run on the broad mix that all branches of one seed start from."""

    tokens: Tokens
    """Budget of each trunk, at a constant rate after its warm-up."""
    mix: dict[str, float] | None = None
    """Weights of the datasets in the mix; None: by their tokens."""
    share: Top = Fraction(1, 2)
    """Of a branch, the part that its slice takes; the rest is the mix."""
    folder: str | None = None
    """Output folder of another study with the same trunks, which are used; None: this study trains its own."""

    @model_validator(mode="after")
    def _shares(self) -> "TrunkSpec":
        if not 0 < self.share < 1:
            raise ValueError(f"share {float(self.share):g} leaves no room for the mix or for the slice; 50% is usual")
        return self


class MainRunSpec(StrictModel):
    """The run that the study is for, whose cost the report compares with the study's."""

    parameters: Tokens = 2_030_000_000
    tokens: Tokens = 2_200_000_000_000


class CostSpec(StrictModel):
    """What the estimate of GPU hours assumes."""

    peak_tflops: float = Field(default=989.0, gt=0)
    """Dense peak of one accelerator in the precision of the runs; 989: H100 and H200 in bf16."""
    mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that training reaches."""
    tokens_per_second: float | None = Field(default=None, gt=0)
    """Measured speed of one accelerator; replaces the two above."""
    main_run: MainRunSpec = MainRunSpec()


class Study(StrictModel):
    """A whole study file."""

    output: str
    """Folder of everything that the study writes."""
    seq_length: int = Field(gt=0, strict=True)
    seed: int = Field(default=1234, ge=0, strict=True)
    """Of the held-out documents and of ties between equal scores; the runs' own seeds are in `training`."""
    tokenizer: TokenizerSpec | None = None
    sources: dict[str, BenchmarkSource] = Field(min_length=1)
    design: Literal["scratch", "branch"] = "scratch"
    """`scratch`: each run is trained from its first step on a slice alone; `branch`: from a trunk on the broad mix."""
    trunk: TrunkSpec | None = None
    slices: SliceSpec
    model: ReferenceModel
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec
    cost: CostSpec = CostSpec()
    level: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance, at most, that the report makes any false claim."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: object) -> object:
        """A model by its name, and a source with several scores."""
        if not isinstance(value, dict):
            return value
        model, sources = value.get("model"), value.get("sources")
        changes: dict[str, Any] = {"model": preset_model(model)} if isinstance(model, str) else {}
        changes |= {"sources": _one_score_each(sources)} if isinstance(sources, dict) else {}
        return {**value, **changes}

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "Study":
        problems = [*self._wrong_names(), *self._wrong_budgets(), *self._wrong_branches()]
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    def _wrong_names(self) -> Iterator[str]:
        for name in (*self.sources, *self.evaluation.held_out):
            if not name.replace("-", "").replace("_", "").isalnum():
                yield f"the name {name!r} becomes part of file names; use letters, digits, - and _"
        for name, held_out in self.evaluation.held_out.items():
            known = name in self.datasets
            if known == (held_out.shards is not None):
                remedy = "leave shards out" if known else "give it shards, or name a source"
                yield f"evaluation.held_out.{name}: {'is' if known else 'is not'} one of the sources; {remedy}"
        names = [task.name for task in self.evaluation.all_tasks()]
        for number, name in enumerate(names):
            if name in names[:number] or name in self.evaluation.held_out:
                yield f"evaluation.tasks: {name!r} names two measures; each needs a name of its own"

    def _wrong_budgets(self) -> Iterator[str]:
        batch = self.training.global_batch_size * self.seq_length
        if self.slices.tokens % self.seq_length:
            yield (
                f"slices.tokens: {self.slices.tokens:,} is not a whole number of windows of "
                f"{counted(self.seq_length, 'token')}; "
                f"{max(1, self.slices.tokens // self.seq_length) * self.seq_length:,} is"
            )
        if self.budget % batch:
            yield (
                f"training.tokens: {self.budget:,} is not a whole number of steps of {self.training.global_batch_size} "
                f"x {counted(self.seq_length, 'token')}; {max(1, round(self.budget / batch)) * batch:,} is"
            )
        if self.slice_budget < self.slices.tokens:
            share = "" if self.trunk is None else f" x trunk.share {float(self.trunk.share):g}"
            yield (
                f"training.tokens: {self.budget:,}{share} is less than a slice ({self.slices.tokens:,}), so part of it "
                "would never be seen; make slices.tokens smaller"
            )
        if self.training.global_batch_size % (self.training.micro_batch_size * self.training.processes):
            yield "training: global_batch_size must be a multiple of micro_batch_size x processes"

    def _wrong_branches(self) -> Iterator[str]:
        trunk, step = self.trunk, self.training.global_batch_size * self.seq_length
        if (trunk is None) == (self.design == "branch"):
            yield (
                "design: branch needs trunk, with its tokens at least"
                if trunk is None
                else "trunk: is of design: branch; write that, or leave trunk out"
            )
        if trunk is None:
            return
        if trunk.tokens % step or trunk.tokens // step < 2:
            whole = max(2, round(trunk.tokens / step)) * step
            yield f"trunk.tokens: {trunk.tokens:,} is not a whole number of two steps or more; {whole:,} is"
        if self.training.lr_decay_style == "constant":
            yield "training.lr_decay_style: a branch is a cooldown, so its rate falls; write linear or cosine"
        wrong = [name for name, weight in (trunk.mix or {}).items() if name not in self.datasets or not weight > 0]
        if wrong or trunk.mix == {}:
            yield f"trunk.mix: weights above 0 of sources of the study ({', '.join(self.datasets)}) are needed; {wrong}"
        taken = [name for name in self.sources if f"{name}-slice" in {*self.datasets, *self.evaluation.held_out}]
        if taken:
            yield f"sources: the plans of branches call the slices of {taken[0]!r} {taken[0]}-slice; rename the other"

    @property
    def datasets(self) -> dict[str, list[str]]:
        """The sources of each dataset: one for each of its scores."""
        found: dict[str, list[str]] = {}
        for name in self.sources:
            found.setdefault(self.dataset_of(name), []).append(name)
        return found

    def dataset_of(self, source: str) -> str:
        """The name that the study file gives to the data of a source."""
        return self.sources[source].dataset or source

    @property
    def budget(self) -> int:
        """Return the tokens of each run, of a branch those after its trunk."""
        if self.training.tokens is not None:
            return self.training.tokens
        return ceil(self.slices.tokens / self.slice_share)

    @property
    def slice_share(self) -> Fraction:
        """Part of a run that is its slice."""
        return Fraction(1) if self.trunk is None else self.trunk.share

    @property
    def slice_budget(self) -> Fraction:
        """Tokens of each run that are of its slice."""
        return self.budget * self.slice_share

    @property
    def trunk_steps(self) -> int:
        """Return the training steps before a branch, 0 without a trunk."""
        return 0 if self.trunk is None else self.trunk.tokens // (self.training.global_batch_size * self.seq_length)

    @property
    def steps(self) -> int:
        """Training steps of each run."""
        return self.budget // (self.training.global_batch_size * self.seq_length)

    @property
    def folder(self) -> Path:
        """Where the study writes."""
        return Path(self.output)

    @property
    def training_digest(self) -> str:
        """Identifies everything that the runs depend on. 16 hex digits."""
        content = self.model_dump(mode="json", exclude={"evaluation", "cost", "level", "output", "design", "trunk"})
        if self.trunk is not None:  # so a study from scratch keeps the digest that it had before there were branches
            content["trunk"] = self.trunk.model_dump(mode="json", exclude={"folder"})
        content["sources"] = {
            name: spec.model_dump(mode="json", exclude={"dataset"}) for name, spec in self.sources.items()
        }
        content["held_out"] = {
            name: spec.model_dump(mode="json", exclude={"capability", "groups"})
            # groups say what is trained on only where the set is part of a source
            | ({"groups": spec.groups} if spec.groups is not None and spec.shards is None else {})
            for name, spec in self.evaluation.held_out.items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def evaluation_digest(self) -> str:
        """Identifies what the models are measured with. 16 hex digits."""
        content = [self.training_digest, *self.evaluation.digested()]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _one_score_each(sources: dict[str, Any]) -> dict[str, Any]:
    """A source whose `score` is a list becomes one source for each of them."""
    found: list[tuple[str, Any]] = []
    for name, source in sources.items():
        scores = source.get("score") if isinstance(source, dict) else None
        if not isinstance(scores, list):
            found.append((name, source))
            continue
        if len(set(map(str, scores))) < max(2, len(scores)):
            raise ValueError(f"sources.{name}.score: {scores} is no list of different scores; name two or more")
        if source.get("rank_index"):
            raise ValueError(
                f"sources.{name}.rank_index: is of one score; leave it out and build one beside the shards"
            )
        names = [f"{name}-{re.sub(r'[^A-Za-z0-9_-]', '_', str(score))}" for score in scores]
        found += [(one, {**source, "score": score, "dataset": name}) for one, score in zip(names, scores, strict=True)]
    if len(dict(found)) < len(found):
        raise ValueError(
            "sources: two of them are called alike once a source with several scores is named by each score"
        )
    return dict(found)


def top_name(top: Fraction) -> str:
    """`top20` for one fifth: the name of a quantile in run names."""
    return f"top{float(top * 100):g}".replace(".", "_")


def load_study(path: str | Path) -> Study:
    """Read and validate a study file.

    Raises:
        StudyError: no such file, not YAML, or fields that are wrong, missing or unknown; names every one of them.
    """
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise StudyError(f"study {path}: cannot be read ({error.strerror}); give the path of a YAML study") from error
    except NotYamlError as error:
        raise StudyError(f"study {path}: not YAML: {error}") from error
    return parse_study(raw, str(path))


def parse_study(raw: object, origin: str = "study") -> Study:
    """Validate a study given as plain data.

    Raises:
        StudyError: names every wrong field.
    """
    if not isinstance(raw, dict):
        raise StudyError(f"{origin}: a study is a mapping with sources, slices and model, got {type(raw).__name__}")
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        lines = [line for detail in error.errors() for line in _describe(detail).split("\n")]
        raise StudyError(f"{origin}: {counted(len(lines), 'wrong field')}\n" + "\n".join(lines)) from error


def _describe(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = "unknown key; check its spelling against docs/quantile-benchmark.md"
    silent = detail["type"] in ("extra_forbidden", "missing") or not place
    return (
        f"  {place}: {message}" + ("" if silent else f" (given: {detail['input']!r:.80})") if place else f"  {message}"
    )
