"""The report of a study: conclusions in words, the page and its data."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.quantile.analysis import OVERALL, Analysis, Shape, analyse
from megatron_kaiyuan.quantile.page import write_page
from megatron_kaiyuan.quantile.proposal import Proposal, format_p, propose
from megatron_kaiyuan.quantile.results import RunResult, read_results
from megatron_kaiyuan.quantile.runs import SlicedStudy
from megatron_kaiyuan.quantile.statistics import mean_estimate, variance_ratio, variance_ratio_bound
from megatron_kaiyuan.quantile.study import Study

__all__ = ["WrittenReport", "conclusions", "report_data", "write_report"]

_FORMAT = "megatron_kaiyuan.quantile_report/2"


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """Where a report is, and what it says in a few lines."""

    page: Path
    data: Path
    plan: Path | None
    """None when no plan is proposed."""
    conclusions: tuple[str, ...]
    warnings: tuple[str, ...]
    """What to beware of in them."""


def write_report(study: Study, sliced: SlicedStudy, *, partial: bool = False) -> WrittenReport:
    """Analyse the results and write `report.html`, `report.json` and, when one is proposed, `proposed_plan.yaml`.

    Args:
        study: The study.
        sliced: What `slice` wrote.
        partial: Report on the runs there are.

    Raises:
        StudyError: results are missing, or do not compare.
    """
    results = read_results(study, sliced, partial=partial)
    analysis = analyse(study, sliced, results)
    proposal = propose(study, analysis)
    told = tuple(conclusions(study, analysis))
    page, data = study.folder / "report.html", study.folder / "report.json"
    content = report_data(study, sliced, results, analysis, proposal, told)
    write_text_atomically(data, json.dumps(content, indent=1, allow_nan=False) + "\n")
    plan = _write_plan(study, proposal)
    write_page(study, sliced, results, analysis, proposal, told, page)
    return WrittenReport(page, data, plan, told, analysis.warnings)


def _write_plan(study: Study, proposal: Proposal) -> Path | None:
    path = study.folder / "proposed_plan.yaml"
    if proposal.plan is None:
        path.unlink(missing_ok=True)  # an earlier report's: nobody is to train by what is no longer proposed
        return None
    write_text_atomically(path, proposal.plan)
    return path


def conclusions(study: Study, analysis: Analysis) -> list[str]:
    """Return the conclusions in words, the strongest first, with refusals before all."""
    lines = list(analysis.refusals)
    for source in study.sources:
        trend = analysis.trend(source, OVERALL)
        if trend is None:
            continue
        numbers = (
            f"{trend.estimate.value:+.2f} ± {trend.estimate.error:.2f} seed spreads from the worst quantile to the "
            f"best, p {format_p(trend.adjusted)}{_shown_rise(analysis, source)}"
        )
        words = {
            "rises": "better-scored documents train a better model",
            "falls": "better-scored documents train a WORSE model",
            "none": "its score was not shown to order quality",
        }[trend.claim]
        lines.append(f"{source}: {words} ({numbers}).")
    claimed = [pair for pair in analysis.pairs if pair.score == OVERALL and pair.claim != "none"]
    tested = sum(pair.score == OVERALL for pair in analysis.pairs)
    lines += [
        f"{bend.source}: its middle is {'better' if bend.claim == 'peaks' else 'worse'} than both ends "
        f"({bend.estimate.value:+.2f} ± {bend.estimate.error:.2f} seed spreads, p {format_p(bend.adjusted)})."
        for bend in analysis.bends
        if bend.score == OVERALL and bend.claim != "none"
    ]
    lines += _against_controls(analysis)
    if max(analysis.seeds) >= 2:
        lines.append(f"{len(claimed)} of {counted(tested, 'pair')} of slices were told apart overall.")
        leader = analysis.ranking(OVERALL)[0]
        low, high = analysis.rank_range(OVERALL, leader)
        ranks = f"rank {low}" if low == high else f"rank {low} to {high}"
        lines.append(f"Highest mean: {analysis.cells[leader].name} ({ranks} of {len(analysis.cells)} by the claims).")
        lines += _reversals(analysis)
    return lines


def _against_controls(analysis: Analysis) -> list[str]:
    """What is claimed about slices and the controls of a branch design, by all measures together."""
    pairs = [pair for pair in analysis.against_controls if pair.score == OVERALL]
    if not pairs or max(analysis.seeds) < 2:
        return []
    claims = [
        f"{analysis.cells[pair.first].name} is {'better' if pair.claim == 'first' else 'worse'} than "
        f"{analysis.controls[pair.second - len(analysis.cells)]} ({pair.estimate.value:+.2f} ± "
        f"{pair.estimate.error:.2f} spreads between branches, p {format_p(pair.adjusted)}"
        f"{_shown(analysis.effects(OVERALL, pair.first, pair.second))})."
        for pair in pairs
        if pair.claim != "none"
    ]
    return claims or ["No slice was told apart from the mix alone or from random documents: keep the mix as it is."]


def _shown_rise(analysis: Analysis, source: str) -> str:
    """The best quantile's mean less the worst's, as a reader knows it."""
    cells = [number for number, cell in enumerate(analysis.cells) if cell.source == source]
    return _shown(analysis.effects(OVERALL, cells[0], cells[-1]))


def _shown(effects: Mapping[str, float]) -> str:
    return "".join(
        f"; {value:+.1%} accuracy" if unit == "accuracy" else f"; {value:+.3f} {unit.replace('/', ' per ')}"
        for unit, value in effects.items()
    )


def _reversals(analysis: Analysis) -> list[str]:
    """A line for each slice that others of its source, with lower scores, are claimed to be better than."""
    beaten: dict[int, list[str]] = {}
    for upper, lower, sure in analysis.reversals(OVERALL):
        if sure:
            beaten.setdefault(upper, []).append(f"top {float(analysis.cells[lower].top * 100):g}%")
    return [
        f"Not monotonic: {analysis.cells[upper].name} is worse than documents of its source with lower scores "
        f"({', '.join(names)})."
        for upper, names in beaten.items()
    ]


def report_data(
    study: Study,
    sliced: SlicedStudy,
    results: Mapping[str, RunResult],
    analysis: Analysis,
    proposal: Proposal,
    told: tuple[str, ...],
) -> dict[str, Any]:
    """Return everything the page shows, as plain data.

    A number that does not exist is None.
    """
    content = {
        "format": _FORMAT,
        "level": study.level,
        "conclusions": list(told),
        "refusals": list(analysis.refusals),
        "warnings": list(analysis.warnings),
        "cost": dict(sliced.cost),
        "runs": len(results),
        "cells": [
            {"source": cell.source, "top": float(cell.top), "seeds": seeds}
            for cell, seeds in zip(analysis.cells, analysis.seeds, strict=True)
        ],
        "metrics": [_metric(analysis, number) for number in range(len(analysis.metrics))],
        "scores": {name: _score(analysis, name) for name in analysis.scores},
        "trends": [_shape(shape) for shape in analysis.trends],
        "bends": [_shape(shape) for shape in analysis.bends],
        "unsteady": {name: [analysis.cells[cell].name for cell in cells] for name, cells in analysis.unsteady.items()},
        "pairs": [
            {"score": pair.score, "first": analysis.cells[pair.first].name, "second": analysis.cells[pair.second].name,
             **_estimate(pair.estimate), "seed_pairs_won": pair.seeds_won, "p_adjusted": pair.adjusted,
             "claim": pair.claim, "shown": analysis.effects(pair.score, pair.first, pair.second)}
            for pair in analysis.pairs
        ],
        "controls": [
            {"score": pair.score, "slice": analysis.cells[pair.first].name,
             "control": analysis.controls[pair.second - len(analysis.cells)], **_estimate(pair.estimate),
             "p_adjusted": pair.adjusted, "claim": {"first": "better", "second": "worse"}.get(pair.claim, "none"),
             "shown": analysis.effects(pair.score, pair.first, pair.second)}
            for pair in analysis.against_controls
        ],
        "proposal": asdict(proposal),
    }  # fmt: skip
    finite: dict[str, Any] = _without_nan(content)
    return finite


def _metric(analysis: Analysis, number: int) -> dict[str, Any]:
    metric = analysis.metrics[number]
    return {
        "name": metric.name,
        "capability": metric.capability,
        "unit": metric.unit,
        "lower_is_better": metric.lower_is_better,
        "decides": metric.decides,
        "items": len(metric.measure.weights),
        "seed_values": [metric.shown(cell).tolist() for cell in range(len(analysis.cells))],
    }


def _score(analysis: Analysis, name: str) -> dict[str, Any]:
    score = analysis.scores[name]
    return {
        "means": [mean_estimate(score, cell).value for cell in range(len(analysis.cells))],
        "errors": [mean_estimate(score, cell).error for cell in range(len(analysis.cells))],
        "variance_ratio": variance_ratio(score),
        "variance_ratio_bound": variance_ratio_bound(analysis.seeds),
        "ranking": [analysis.cells[cell].name for cell in analysis.ranking(name)],
        "rank_ranges": [list(analysis.rank_range(name, cell)) for cell in range(len(analysis.cells))],
        "reversals": [
            {"higher_score": analysis.cells[upper].name, "did_better": analysis.cells[lower].name, "claimed": sure}
            for upper, lower, sure in analysis.reversals(name)
        ],
    }


def _shape(shape: Shape) -> dict[str, Any]:
    return {
        "source": shape.source,
        "score": shape.score,
        **_estimate(shape.estimate),
        "p_permutation": shape.exact,
        "p_roughness": shape.rough,
        "p_adjusted": shape.adjusted,
        "claim": shape.claim,
    }


def _estimate(estimate: Any) -> dict[str, float]:
    return {
        "difference": estimate.value,
        "error": estimate.error,
        "degrees_of_freedom": estimate.freedom,
        "probability_better": estimate.probability_positive,
        "p_value": estimate.p_value,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return value
