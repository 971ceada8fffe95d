"""Domain bounds: which share of the tokens a domain must or may have, over the run or in each phase.

A plan is checked when it is opened, before anything is read. All samples have `seq_length` predicted tokens, so shares
of samples are shares of tokens. A phase with a token budget or weights rounds its mix to whole samples; with `k`
streams no group of them is off by more than `k / 2` samples (docs/data-engine.md, section 5, summed over the group),
and a bound that is missed by no more than that is met. A phase without a budget is not rounded.

Bounds choose nothing: they are no part of the order of samples or of its fingerprint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_kaiyuan.data.phase import Phase
from megatron_kaiyuan.data.plan_schema import DomainBoundSpec, PlanSpec
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.terminal import counted

__all__ = ["DomainShare", "bounded_shares", "check_domain_bounds", "describe_bound", "domain_samples"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainShare:
    """What a bounded domain has of a phase, or of the run."""

    domain: str
    phase: str | None
    """None: the whole run."""
    bound: DomainBoundSpec
    samples: int
    """Of the domain."""
    total: int
    """Samples of all domains."""
    rounding: Fraction
    """Samples by which whole samples may miss a share."""

    @property
    def share(self) -> float:
        """Fraction of the tokens."""
        return self.samples / self.total

    @property
    def below_min(self) -> bool:
        """Whether the lower bound is missed."""
        return self.bound.min is not None and self.samples + self.rounding < self.bound.min * self.total

    @property
    def above_max(self) -> bool:
        """Whether the upper bound is exceeded."""
        return self.bound.max is not None and self.samples - self.rounding > self.bound.max * self.total

    @property
    def met(self) -> bool:
        """Whether the share keeps its bound."""
        return not (self.below_min or self.above_max)


def domain_samples(spec: PlanSpec, phases: Sequence[Phase]) -> dict[str, int]:
    """Return the samples of each domain in these phases.

    A domain that the phases do not show is left out.
    """
    found: dict[str, int] = {}
    for phase in phases:
        for name, used in zip(phase.streams, phase.used.tolist(), strict=True):
            domain = spec.domain_of(name)
            found[domain] = found.get(domain, 0) + used * phase.samples_per_window
    return found


def bounded_shares(spec: PlanSpec, phases: Sequence[Phase]) -> list[DomainShare]:
    """The share of every bounded domain: one for the run, or one for each phase, as its scope says."""
    return [
        DomainShare(
            domain=domain,
            phase=None if bound.scope == "run" else some[0].name,
            bound=bound,
            samples=domain_samples(spec, some).get(domain, 0),
            total=sum(phase.num_samples for phase in some),
            rounding=sum((_rounding(phase) for phase in some), Fraction(0)),
        )
        for domain, bound in spec.domains.items()
        for some in ([phases] if bound.scope == "run" else [[phase] for phase in phases])
    ]


def _rounding(phase: Phase) -> Fraction:
    return Fraction(0) if phase.spec.tokens is None else Fraction(len(phase.streams) * phase.samples_per_window, 2)


def check_domain_bounds(spec: PlanSpec, phases: Sequence[Phase]) -> None:
    """Refuse a plan that breaks a bound, unless the bound only reports.

    Raises:
        PlanError: names every broken bound with its phase, the share, and the tokens that would keep it.
    """
    broken = [s for s in bounded_shares(spec, phases) if not s.met and s.bound.on_violation == "error"]
    if not broken:
        return
    lines = [_explain(share, spec, phases) for share in broken]
    raise PlanError(f"plan: {counted(len(lines), 'broken domain bound')}\n" + "\n".join(lines))


def _explain(share: DomainShare, spec: PlanSpec, phases: Sequence[Phase]) -> str:
    where = "the run" if share.phase is None else f"phase {share.phase!r}"
    within = [phase for phase in phases if share.phase in (None, phase.name)]
    names = [n for n in spec.sources if spec.domain_of(n) == share.domain and any(n in p.streams for p in within)]
    own, others = (count * spec.seq_length for count in (share.samples, share.total - share.samples))
    side, limit = ("max", share.bound.max) if share.above_max else ("min", share.bound.min)
    assert limit is not None
    other_scope = "" if share.phase is None else ", set scope: run to bound the whole run instead"
    return (
        f"  domains.{share.domain}: {share.share:.2%} of {where}, {own:,} of {counted(own + others, 'token')} "
        f"({', '.join(names) or 'no source of it there'}), {'above' if side == 'max' else 'below'} {side} "
        f"{float(limit):.4g}. {_remedy(side, limit, own, others)}; or change {side}{other_scope}, or set "
        "on_violation: report"
    )


def _remedy(side: str, limit: Fraction, own: int, others: int) -> str:
    """How many tokens of the domain, or of the others, would keep the bound, the other side left as it is."""
    if limit == 1:
        return f"Leave out the {counted(others, 'token')} of other domains"
    if limit == 0:
        return f"Leave out its {counted(own, 'token')}"
    kept_own, kept_others = limit / (1 - limit) * others, (1 - limit) / limit * own
    if side == "max":
        most = counted(math.floor(kept_own), "token")
        return f"Show at most {most} of it, or at least {math.ceil(kept_others):,} of others"
    return (
        f"Show at least {counted(math.ceil(kept_own), 'token')} of it, or at most {math.floor(kept_others):,} of others"
    )


def describe_bound(share: DomainShare, seq_length: int) -> dict[str, Any]:
    """A bounded share as plain data."""
    bound = share.bound
    return {
        "domain": share.domain,
        "scope": bound.scope,
        "phase": share.phase,
        "tokens": share.samples * seq_length,
        "share": share.share,
        "min": None if bound.min is None else float(bound.min),
        "max": None if bound.max is None else float(bound.max),
        "met": share.met,
        "on_violation": bound.on_violation,
    }
