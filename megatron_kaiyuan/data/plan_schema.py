"""The plan file: YAML validated field by field, unknown keys refused, errors with the path of the field."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from megatron_kaiyuan.data.plan_fields import IndexPath, ScoreName, Shards, Share, Spacing, Tokens
from megatron_kaiyuan.data.plan_phases import AveragingSpec, LearningRateSpec, PhaseSourceSpec, PhaseSpec, Strict
from megatron_kaiyuan.data.plan_rules import check_draws, check_first_version, check_repeats, named_draws
from megatron_kaiyuan.data.selection import Keep
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.yaml_file import NotYamlError, read_yaml

__all__ = [
    "NEWEST_VERSION",
    "AveragingSpec",
    "DomainBoundSpec",
    "ExpectedSpec",
    "LearningRateSpec",
    "PhaseSourceSpec",
    "PhaseSpec",
    "PlanSpec",
    "SourceSpec",
    "TokenizerSpec",
    "Tokens",
    "ValidationSpec",
    "load_plan_spec",
    "parse_plan_spec",
]

NEWEST_VERSION = 2
"""Of the plan language."""


class TokenizerSpec(Strict):
    """The tokenizer the shards must have been built with."""

    type: str
    """Megatron's `--tokenizer-type`."""
    model: str
    """Megatron's `--tokenizer-model`: a path."""


class ExpectedSpec(Strict):
    """The size of a source that does not exist yet, for `plan_data.py --simulate`."""

    documents: Tokens
    tokens: Tokens
    length_by_quality: float = Field(default=0.0, gt=-1, lt=1)
    """How much longer the best document is than the mean, as a fraction of it; the worst is shorter by the same."""
    length_spread: float = Field(default=0.9, ge=0, le=2)
    """Standard deviation of the logarithm of lengths among documents of one quality; 0: all are equally long."""

    @model_validator(mode="after")
    def _documents_hold_tokens(self) -> "ExpectedSpec":
        if self.tokens < self.documents:
            raise ValueError(
                f"{counted(self.documents, 'document')} with only {counted(self.tokens, 'token')}; a document has at "
                "least one"
            )
        return self


class SourceSpec(Strict):
    """A named set of shards."""

    shards: Shards
    """A prefix, a directory, a glob, or a list of these; relative to the working directory."""
    score: ScoreName | None = None
    """Score sidecar that ranks the documents, higher is better; None: unscored, always in random order."""
    domain: str | None = Field(default=None, min_length=1)
    """Group that reports and domain bounds sum over."""
    origin: str | None = Field(default=None, min_length=1)
    """Where the documents come from, such as the address of a dataset; for the data card of a release."""
    licence: str | None = Field(default=None, min_length=1)
    """Their licence, such as `odc-by`; for the data card of a release."""
    rank_index: IndexPath | None = None
    """Path of the rank index, when it is not beside the shards."""
    thin: Spacing | None = None
    """Share of its documents that the source consists of, at equal distances by rank; None: all of them."""
    deny: IndexPath | None = None
    """File that lists documents which no phase shows and no evaluation reads."""
    expected: ExpectedSpec | None = None
    """Documents and tokens to plan with before the shards exist; used by `plan_data.py --simulate` alone."""


class ValidationSpec(Strict):
    """Documents held out of every phase."""

    documents: int = Field(gt=0)
    """How many; with `groups` at least so many, in whole groups."""
    groups: ScoreName | None = None
    """Score sidecar with the number of each document's group, such as its package or host. Whole groups are held out,
    so that near-duplicates within a group stay on one side. None: documents are drawn one by one."""


class DomainBoundSpec(Strict):
    """Which share of the tokens a domain must or may have. It is checked, and changes nothing in the order."""

    min: Share | None = None
    """At least this share; None: no lower bound."""
    max: Share | None = None
    """At most this share; None: no upper bound."""
    scope: Literal["run", "phase"] = "run"
    """Whether all phases together keep the bound, or each phase does."""
    on_violation: Literal["error", "report"] = "error"
    """Whether a broken bound refuses the plan, or is only shown by the dry run."""

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "DomainBoundSpec":
        if self.min is None and self.max is None:
            raise ValueError("neither min nor max; give at least one, such as {max: 30%}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {float(self.min):.4g} is above max {float(self.max):.4g}; no share keeps both")
        return self


class PlanSpec(Strict):
    """A whole plan file."""

    version: Literal[1, 2] | None = None
    """Of the plan language; None: the newest, but for a run that was begun under an earlier one."""
    seq_length: int = Field(gt=0, strict=True)
    seed: int = Field(default=1234, ge=0, strict=True)
    tokenizer: TokenizerSpec | None = None
    sources: dict[str, SourceSpec] = Field(min_length=1)
    phases: list[PhaseSpec] = Field(min_length=1)
    validation: dict[str, ValidationSpec] = Field(default_factory=dict)
    domains: dict[str, DomainBoundSpec] = Field(default_factory=dict)
    """Bounds on shares of tokens, by domain."""
    averaging: AveragingSpec | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> "PlanSpec":
        names = [phase.name for phase in self.phases]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"phases.{number}.name: {name!r} names an earlier phase too; names must differ")
        for number, phase in enumerate(self.phases):
            self._check_sources(f"phases.{number} ({phase.name}).sources", list(phase.sources))
            for name, part in phase.sources.items():
                if part.needs_scores and self.sources[name].score is None:
                    raise ValueError(
                        f"phases.{number} ({phase.name}).sources.{name}.keep: {part.kept} needs scores, and "
                        f"sources.{name} "
                        "names none; add score:, or keep a random part"
                    )
        self._check_sources("validation", list(self.validation))
        if self.version == 1:
            check_first_version(self.phases)
        self._check_lengths()
        check_draws(self.phases)
        check_repeats(self.phases, [name for name, source in self.sources.items() if source.score is not None])
        self._rates_continue()
        domains = list(dict.fromkeys(self.domain_of(name) for name in self.sources))
        for name in self.domains:
            if name not in domains:
                raise ValueError(f"domains.{name}: no source is of this domain; known are {', '.join(domains)}")
        return self

    def _check_lengths(self) -> None:
        for number, phase in enumerate(self.phases):
            if phase.seq_length is not None and phase.seq_length % self.seq_length:
                below = max(1, phase.seq_length // self.seq_length) * self.seq_length
                raise ValueError(
                    f"phases.{number} ({phase.name}).seq_length: {phase.seq_length} is no multiple of the plan's "
                    f"seq_length {self.seq_length}, which is a sample; {below} and {below + self.seq_length} are. Or "
                    "make the plan's that of the shortest phase"
                )

    def length_of(self, phase: PhaseSpec) -> int:
        """Predicted tokens of a window of a phase."""
        return phase.seq_length or self.seq_length

    @property
    def longest(self) -> int:
        """Predicted tokens of the longest windows."""
        return max(self.length_of(phase) for phase in self.phases)

    def _rates_continue(self) -> None:
        without = [number for number, phase in enumerate(self.phases) if phase.lr is None]
        if without and len(without) < len(self.phases):
            given = next(phase.name for phase in self.phases if phase.lr is not None)
            raise ValueError(
                f"phases.{without[0]} ({self.phases[without[0]].name}).lr: missing, but {given} has one; give every "
                "phase its lr, or none and use --lr and --lr-decay-style"
            )
        for number, (before, after) in enumerate(pairwise(self.phases), start=1):
            if before.lr is None or after.lr is None or after.lr.jump:
                continue
            if not math.isclose(before.lr.end, after.lr.start, rel_tol=1e-9):
                raise ValueError(
                    f"phases.{number} ({after.name}).lr.start: {after.lr.start:g}, but {before.name} ends at "
                    f"{before.lr.end:g}; make them equal, or write jump: true beside start if the step is meant"
                )

    @property
    def order_version(self) -> int:
        """The version whose arithmetic gives the order."""
        return self.version or NEWEST_VERSION

    @property
    def draws(self) -> dict[tuple[str, str], Keep]:
        """Return what each named draw keeps, keyed with source and draw.

        It is the largest where the draw stands in several places.
        """
        return named_draws(self.phases)

    def domain_of(self, source: str) -> str:
        """The domain of a source: the one it names, or else itself."""
        return self.sources[source].domain or source

    def _check_sources(self, where: str, names: list[str]) -> None:
        for name in names:
            if name not in self.sources:
                raise ValueError(f"{where}.{name}: no such source; known are {', '.join(self.sources)}")


def load_plan_spec(path: str | Path) -> PlanSpec:
    """Read and validate a plan file.

    Raises:
        PlanError: no such file, not YAML, or fields that are wrong, missing or unknown; names every one of them.
    """
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise PlanError(f"plan {path}: cannot be read ({error.strerror}); give the path of a YAML plan") from error
    except NotYamlError as error:
        raise PlanError(f"plan {path}: not YAML: {error}; docs/plan.md shows a whole plan") from error
    return parse_plan_spec(raw, str(path))


def parse_plan_spec(raw: object, origin: str = "plan") -> PlanSpec:
    """Validate a plan given as plain data."""
    if not isinstance(raw, dict):
        raise PlanError(f"{origin}: a plan is a mapping with seq_length, sources and phases, got {type(raw).__name__}")
    try:
        return PlanSpec.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors()]
        raise PlanError(f"{origin}: {counted(len(lines), 'wrong field')}\n" + "\n".join(lines)) from error


def _describe(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = "unknown key; check its spelling against the plan reference in docs/plan.md"
    given = (
        "" if detail["type"] in ("extra_forbidden", "missing") or not place else f" (given: {detail['input']!r:.80})"
    )
    return f"  {place}: {message}{given}" if place else f"  {message}"
