"""From what a study shows to a plan: for each capability a mix, and which top part of which source in which phase.

Only claims change anything. A part of a source is dropped when it was shown to be worse overall; a whole source only
when it was shown to be worse on every capability, since a source that is poor overall may be the best at one thing. In
a branch design it must also be harmful: shown to be worse than the mix without it.
What was shown neither way is undecided and kept as it is.

A slice speaks for the quantiles nearest to it, so keeping the slices from the best down to some one keeps the documents
down to the middle of the gap between that slice and the next that was measured, and so all documents that earned it. Of
a dataset that was measured by several scores, the plan follows one.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

import yaml

from megatron_kaiyuan.data.plan_schema import NEWEST_VERSION, parse_plan_spec
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.quantile.analysis import OVERALL, Analysis
from megatron_kaiyuan.quantile.runs import MIX_ALONE
from megatron_kaiyuan.quantile.study import Study

__all__ = ["CapabilityMix", "Proposal", "SourceAdvice", "format_p", "propose"]


@dataclass(frozen=True, slots=True)
class CapabilityMix:
    """Which sources one capability asks for."""

    capability: str
    shares: dict[str, float]
    """Equal ones of the sources with a slice that was not shown to be worse than the best slice; they sum to 1."""
    decided: bool
    """Whether any source was shown to be worse; False: nothing is known, and the mix is no advice."""
    reason: str


@dataclass(frozen=True, slots=True)
class SourceAdvice:
    """What to do with one source."""

    source: str
    broad: str | None
    """Selection in the first phase; None: leave it out."""
    best: str | None
    """Selection in the last phase."""
    in_order: bool
    """Whether a curriculum may trust the score."""
    followed: bool
    """Whether the plan uses this score; False: it uses another one of the same data, or nothing was measured."""
    undecided: bool
    """Whether nothing was shown for or against any part of it, so that it is kept as it is."""
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Advice for every source, and the plan that follows from it."""

    advice: tuple[SourceAdvice, ...]
    plan: str | None
    """YAML in the plan's grammar, headed by what to beware of; None when no conclusion may be drawn."""
    summary: str
    mixes: tuple[CapabilityMix, ...] = ()


def propose(study: Study, analysis: Analysis) -> Proposal:
    """Turn claims into a plan that keeps everything where nothing is claimed."""
    if max(analysis.seeds) < 2:
        return Proposal((), None, "No plan is proposed: with one seed a slice no difference can be told from chance.")
    if study.slices.documents == "shared":
        return Proposal(
            (),
            None,
            "No plan is proposed: all seeds share the documents of a slice, so what was shown holds for these "
            "documents and not for the part of a source that they lie in. slices.documents: own would tell.",
        )
    measured = {cell.source for cell in analysis.cells}
    advised = {
        source: _advise(study, analysis, source) if source in measured else _not_measured(source)
        for source in study.sources
    }
    for names in study.datasets.values():
        _follow_one(study, analysis, advised, [name for name in names if name in measured])
    advice = tuple(advised.values())
    followed = [one for one in advice if one.followed]
    absent = [dataset for dataset, names in study.datasets.items() if not measured.intersection(names)]
    remark = [f"Not measured, and so not in the plan: {', '.join(absent)}."] if absent else []
    mixes = tuple(_mix(analysis, name) for name in analysis.capabilities or [OVERALL])
    lines = [*analysis.warnings, *remark, *(mix.reason for mix in mixes)]
    plan = _comments(lines) + _plan_text(study, followed)
    claimed = sum(one.broad != "all" or one.best != "all" for one in followed)
    undecided = [one.source for one in followed if one.undecided]
    summary = (
        f"The claims narrow {claimed} of {counted(len(followed), 'source')}"
        + (f"; undecided and kept as they are: {', '.join(undecided)}" if undecided else "")
        + ". A source or phase that no claim narrows is kept whole, because nothing was shown against any part of it. "
        "Differences are in spreads between seeds, with their standard errors."
    )
    return Proposal(advice, plan, " ".join([summary, *remark]), mixes)


def _mix(analysis: Analysis, score: str) -> CapabilityMix:
    """Return equal shares of the sources that may be the best at a capability.

    The claims say no more than that.
    """
    leader = analysis.ranking(score)[0]
    sources = dict.fromkeys(cell.source for cell in analysis.cells)
    wanted = [source for source in sources if _undefeated(analysis, score, _cells_of(analysis, source))]
    worse = [source for source in sources if source not in wanted]
    shares = {source: 1 / len(wanted) if source in wanted else 0.0 for source in sources}
    if not worse:
        reason = (
            f"{score}: undecided, no source was shown to be worse than {analysis.cells[leader].name}; no mix follows."
        )
    else:
        parts = ", ".join(f"{source} {share:.0%}" for source, share in shares.items() if share)
        reason = (
            f"{score}: {parts}; all slices of {', '.join(worse)} were shown to be worse than "
            f"{analysis.cells[leader].name}."
        )
    return CapabilityMix(score, shares, bool(worse), reason)


def _cells_of(analysis: Analysis, source: str) -> list[int]:
    return [number for number, cell in enumerate(analysis.cells) if cell.source == source]


def _undefeated(analysis: Analysis, score: str, cells: Sequence[int]) -> list[int]:
    """Cells that were not shown to be worse than the best one by a score."""
    leader = analysis.ranking(score)[0]
    return [cell for cell in cells if not analysis.claimed_better(score, leader, cell)]


def _not_measured(source: str) -> SourceAdvice:
    return SourceAdvice(source, None, None, False, False, False, ("Not measured: none of its runs has results.",))


def _comments(lines: Sequence[str]) -> str:
    """Lines of YAML comment."""
    filled = (textwrap.fill(line, 118, initial_indent="# ", subsequent_indent="#   ") for line in lines)
    return "".join(f"{line}\n" for line in filled)


def _advise(study: Study, analysis: Analysis, source: str) -> SourceAdvice:
    cells = _cells_of(analysis, source)
    ranking = analysis.ranking(OVERALL)
    leader, middle = ranking[0], ranking[len(ranking) // 2]
    trend = analysis.trend(source, OVERALL)
    in_order = trend is not None and trend.claim == "rises"
    reasons = [_trend_reason(study, analysis, source), *_bend_reason(analysis, source)]
    # a slice is dropped from a phase by a claim alone: from the last when it loses to the best of all slices, from the
    # first when it loses to the slice in the middle of all
    keeps = []
    for phase, against in (("first", middle), ("last", leader)):
        lost = [cell for cell in cells if analysis.claimed_better(OVERALL, against, cell)]
        needed, remark = _needed(analysis, cells, lost)
        lost = [cell for cell in lost if cell not in needed]
        keep, reason = _selection(analysis, cells, lost, against, phase, trust_score=in_order)
        keeps.append(keep)
        reasons.append(reason + remark)
    involved = any(pair.claim != "none" and {pair.first, pair.second} & set(cells) for pair in analysis.pairs)
    undecided = not involved and (trend is None or trend.claim == "none")
    if undecided:
        reasons.insert(0, "Undecided, keep it as it is: nothing was shown for or against any part of it.")
    return SourceAdvice(source, keeps[0], keeps[1], in_order, True, undecided, tuple(reasons))


def _needed(analysis: Analysis, cells: Sequence[int], lost: Sequence[int]) -> tuple[list[int], str]:
    """Slices that a capability may need of a source that lost all of its slices overall, with a remark."""
    if len(lost) < len(cells):
        return [], ""
    found: dict[str, list[int]] = {
        name: kept for name in analysis.capabilities if (kept := _undefeated(analysis, name, cells))
    }
    if not found:
        harmless = [cell for cell in cells if analysis.controls and not _harmful(analysis, cell)]
        remark = " It lost to the best slice, but was not shown to be worse than the mix alone: it is not left out."
        return harmless, remark if harmless else ""
    needed = [cell for cell in cells if any(cell in kept for kept in found.values())]
    best = [name for name in found if analysis.ranking(name)[0] in found[name]]
    others = [name for name in found if name not in best]
    told = [f"its best slice is the best of all on {' and '.join(best)}"] if best else []
    told += [f"on {' and '.join(others)} it was not shown to be worse"] if others else []
    return needed, f" It lost overall, but {'; '.join(told)}, so it is not left out."


def _harmful(analysis: Analysis, cell: int) -> bool:
    """Whether a slice of a branch design was shown to be worse overall than the mix without it."""
    return any(
        pair.claim == "second" and analysis.controls[pair.second - len(analysis.cells)] == MIX_ALONE
        for pair in analysis.against_controls
        if (pair.score, pair.first) == (OVERALL, cell)
    )


def _follow_one(study: Study, analysis: Analysis, advised: dict[str, SourceAdvice], names: Sequence[str]) -> None:
    """Keep one score of a dataset: of those shown to order quality, or else of all, that with the best slice."""
    if len(names) < 2:
        return
    ranking = analysis.ranking(OVERALL)
    sources = [analysis.cells[cell].source for cell in ranking]
    best = {name: sources.index(name) for name in names}  # places of their best slices
    chosen = min(names, key=lambda name: (not advised[name].in_order, best[name]))
    word = study.sources[chosen].score
    for name in names:
        if name == chosen:
            others = ", ".join(f"`{study.sources[other].score}`" for other in names if other != name)
            reason = f"The plan follows `{word}` and not {others}, scores of the same data."
        else:
            told = analysis.claimed_better(OVERALL, ranking[best[chosen]], ranking[best[name]])
            reason = (
                f"Not followed: the plan takes `{word}` of the same data, "
                + (
                    "which was shown to order quality"
                    if advised[chosen].in_order
                    else "which has the better best slice"
                )
                + f"; the best slices of the two were {'' if told else 'not '}told apart."
            )
        one = advised[name]
        advised[name] = replace(one, followed=name == chosen, reasons=(reason, *one.reasons))


def _trend_reason(study: Study, analysis: Analysis, source: str) -> str:
    trend = analysis.trend(source, OVERALL)
    if trend is None:
        return "No trend was tested, so its score is not trusted to order documents: `sorted: false`."
    numbers = (
        f"{trend.estimate.value:+.3g} from the worst quantile to the best, standard error {trend.estimate.error:.2g}, "
        f"p {format_p(trend.adjusted)} after correction"
    )
    if trend.claim == "rises":
        return f"Its score `{study.sources[source].score}` orders quality ({numbers}), so a curriculum may follow it."
    if trend.claim == "falls":
        return f"Its score orders quality the wrong way ({numbers}): check its sign. Not followed: `sorted: false`."
    return f"Its score was not shown to order quality ({numbers}), so it is not followed: `sorted: false`."


def _bend_reason(analysis: Analysis, source: str) -> list[str]:
    words = {"peaks": "its middle is better than its ends", "dips": "its middle is worse than its ends"}
    return [
        f"Its score does not order quality evenly: {words[bend.claim]} ({bend.estimate.value:+.3g}, p "
        f"{format_p(bend.adjusted)} after correction), so look at its curve before you choose a threshold."
        for bend in analysis.bends
        if (bend.source, bend.score) == (source, OVERALL) and bend.claim != "none"
    ]


def _selection(
    analysis: Analysis, cells: Sequence[int], lost: Sequence[int], against: int, phase: str, *, trust_score: bool
) -> tuple[str | None, str]:
    """What to keep in a phase, with the reason."""
    other = analysis.cells[against].name
    names = ", ".join(_loss(analysis, cell, against) for cell in lost)
    if not lost:
        return "all", f"In the {phase} phase: all of it; none of its slices was shown to be worse than {other}."
    if len(lost) == len(cells):
        return (
            None,
            f"In the {phase} phase: none of it; its slices, at top {names}, were all worse than {other}.",
        )
    if not trust_score:
        text = "all of it; but which part to drop cannot be said by a score that was not shown to order quality"
        return "all", f"In the {phase} phase: {text} (worse than {other}: its slices at top {names})."
    kept = [cell for cell in cells if cell not in lost]
    contiguous = [cell for cell in cells if cell <= max(kept)]
    fraction = _edge(analysis, cells, contiguous[-1])
    # a slice that lost but lies above one that did not is kept: the plan's grammar keeps a top part, not a comb
    between = [analysis.cells[cell] for cell in contiguous if cell in lost]
    remark = (
        f" ({', '.join(_percent(cell.top) for cell in between)} lost too, above a slice that did not)"
        if between
        else ""
    )
    keep = "all" if fraction == 1 else f"top {_percent(fraction)}"
    threshold = "" if fraction == 1 else f", about score >= {analysis.lowest_scores[contiguous[-1]]:.4g}"
    text = f"{keep}{threshold}; its slices at top {names} were shown to be worse than {other}{remark}"
    return keep, f"In the {phase} phase: {text}."


def _loss(analysis: Analysis, cell: int, against: int) -> str:
    """A slice's quantile and how far it is behind another slice, in seed spreads."""
    estimate = analysis.difference(OVERALL, cell, against)
    return f"{_percent(analysis.cells[cell].top)} ({estimate.value:+.1f} ± {estimate.error:.1f})"


def _edge(analysis: Analysis, cells: Sequence[int], last: int) -> Fraction:
    """Return the middle between the end of a slice and the start of the next one measured, 1 after the last."""
    place = list(cells).index(last)
    if place + 1 == len(cells):
        return Fraction(1)
    end, start = analysis.reaches[last][1], analysis.reaches[cells[place + 1]][0]
    middle = (end + start) / 2
    rounded = (Fraction(round(middle * parts), parts) for parts in (100, 1000, 10_000))
    # never less than the slice itself: of neighbours without a gap, a millionth of the source more
    return next((edge for edge in rounded if end <= edge <= start), Fraction(ceil(end * 10**6), 10**6))


def _percent(fraction: Fraction) -> str:
    return f"{float(fraction * 100):g}%"


def format_p(value: float) -> str:
    """A p-value in three characters or a bound."""
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"


def _plan_text(study: Study, advice: Sequence[SourceAdvice]) -> str:
    """The plan, checked against the plan's own schema."""
    phases = []
    for name, order in (("broad", "shuffled"), ("best", "curriculum")):
        chosen = {one.source: keep for one in advice if (keep := one.broad if name == "broad" else one.best)}
        unsorted = {one.source for one in advice if not one.in_order} if order == "curriculum" else set()
        parts = {
            study.dataset_of(source): {"keep": keep, "sorted": False} if source in unsorted else {"keep": keep}
            for source, keep in chosen.items()
        }
        if parts:
            phases.append({"name": name, "order": order, "sources": parts})
    used = {source for phase in phases for source in _sources(phase)}
    content: dict[str, Any] = {
        "version": NEWEST_VERSION,
        "seq_length": study.seq_length,
        "sources": {
            dataset: study.sources[one.source].model_dump(exclude_none=True, exclude={"dataset"})
            for one in advice
            if (dataset := study.dataset_of(one.source)) in used
        },
        "phases": phases,
    }
    parse_plan_spec(content)
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


def _sources(phase: dict[str, Any]) -> list[str]:
    return list(phase["sources"])
