"""A study as one self-contained HTML page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import MetricsError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.quantile.analysis import OVERALL, Analysis, Metric
from megatron_kaiyuan.quantile.claimable import smallest_claimable
from megatron_kaiyuan.quantile.cost import format_gpu_time, format_share
from megatron_kaiyuan.quantile.figures import (
    curve_figure,
    heat_figure,
    matrix_figure,
    overall_figure,
    ranking_figure,
    trend_figure,
)
from megatron_kaiyuan.quantile.inference import LEAST_RUNS, PAIRS_SHARE, SHAPES_SHARE
from megatron_kaiyuan.quantile.proposal import Proposal, format_p
from megatron_kaiyuan.quantile.results import RunResult
from megatron_kaiyuan.quantile.runs import SlicedStudy, run_folder
from megatron_kaiyuan.quantile.statistics import typical_variance, variance_ratio, variance_ratio_bound
from megatron_kaiyuan.quantile.study import Study
from megatron_kaiyuan.reporting.html_page import Card, figure_block, render_page
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.run_curves import curves_figure
from megatron_kaiyuan.reporting.run_metrics import read_run

__all__ = ["write_page"]

_MOST_OPEN = 6
"""Further curves that are shown without being asked for."""


def write_page(
    study: Study,
    sliced: SlicedStudy,
    results: Mapping[str, RunResult],
    analysis: Analysis,
    proposal: Proposal,
    told: Sequence[str],
    path: Path,
) -> None:
    """Write the page atomically.

    It loads nothing from elsewhere.
    """
    further = [metric for metric in analysis.metrics if not metric.decides]
    several_seeds = max(analysis.seeds) > 1
    page = render_page(
        "quantile.html",
        title="Quantile benchmark",
        lead=_lead(study, sliced, results),
        refusals=analysis.refusals,
        warnings=analysis.warnings,
        several_seeds=several_seeds,
        cards=_cards(analysis),
        smallest=_smallest(study, analysis),
        conclusions=[line for line in told if line not in analysis.refusals],
        overall_figure=figure_block(overall_figure(analysis)),
        trend_figure=figure_block(trend_figure(analysis)) if analysis.trends else None,
        shapes=_shapes(analysis),
        means=_means(analysis),
        curves=_curves(analysis, [metric for metric in analysis.metrics if metric.decides]),
        further_curves=_curves(analysis, further),
        further_curves_open=len(further) <= _MOST_OPEN,
        unit=analysis.unit,
        maps=[{"name": name, "figure": figure_block(heat_figure(analysis, name))} for name in analysis.scores],
        matrices=_matrices(analysis) if several_seeds else [],
        confidence=f"{1 - analysis.level:.0%}",
        ranking_figure=figure_block(ranking_figure(analysis)),
        ranking=_ranking(analysis),
        reversals=_reversals(analysis),
        controls=_controls(analysis) if several_seeds else None,
        proposal=proposal,
        methods=_methods(study, analysis),
        training=_training(study, sliced, results),
        runs=_runs(study, sliced, results),
    )
    write_text_atomically(path, page)


def _training(study: Study, sliced: SlicedStudy, results: Mapping[str, RunResult]) -> dict[str, Any]:
    """The training curves of the runs whose metrics are on this machine, and why others have none."""
    read, remarks, absent = [], [], 0
    for run in (run for run in sliced.runs if run.name in results):
        file = run_folder(study, run) / "checkpoints" / "metrics.jsonl"
        if not file.is_file():
            absent += 1
            continue
        try:
            read.append(read_run(file, run.name))
        except MetricsError as error:
            remarks.append(str(error))
    if absent:
        remarks.append(f"Of {counted(absent, 'run')} the metrics are not on this machine.")
    return {"figure": figure_block(curves_figure(read, [])) if read else None, "remarks": remarks}


def _lead(study: Study, sliced: SlicedStudy, results: Mapping[str, RunResult]) -> str:
    cost = sliced.cost
    return (
        f"{counted(len(study.sources), 'source')}, {counted(len(study.slices.tops), 'quantile')}, {_seeds(study)}: "
        f"{counted(len(results), 'model')} of {format_tokens(cost['parameters'])} parameters, each trained on "
        f"{format_tokens(study.budget)} tokens of one slice ({format_tokens(study.slices.tokens)} unique). "
        f"{_power_of_ten(cost['flops'])} FLOPs in all, {format_share(cost['share_of_main_run'])} of the main run; "
        f"{format_gpu_time(cost['gpu_hours'])} as estimated."
    )


def _seeds(study: Study) -> str:
    count = len(study.training.seeds)
    return counted(count, "seed") if count > 1 else "one seed"


def _power_of_ten(value: float) -> str:
    """`2.6 × 10¹²`."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"


def _cards(analysis: Analysis) -> list[Card]:
    leader = analysis.ranking(OVERALL)[0]
    low, high = analysis.rank_range(OVERALL, leader)
    pairs = [pair for pair in analysis.pairs if pair.score == OVERALL]
    claimed = sum(pair.claim != "none" for pair in pairs)
    rising = [trend.source for trend in analysis.trends if trend.score == OVERALL and trend.claim == "rises"]
    reversed_ = sum(sure for *_, sure in analysis.reversals(OVERALL))
    if max(analysis.seeds) < 2:
        return [(analysis.cells[leader].name, "highest mean, of one seed: not a finding")]
    return [
        (analysis.cells[leader].name, f"highest mean; {_ranks(low, high)} of {len(analysis.cells)} by the claims"),
        (f"{claimed} of {len(pairs)}", "pairs of slices told apart"),
        (", ".join(rising) or "none", "sources whose score orders quality"),
        (str(reversed_), "reversals that are not chance"),
    ]


def _smallest(study: Study, analysis: Analysis) -> list[str]:
    """What the study could have claimed, before what it claims."""
    if max(analysis.seeds) < 2:
        return []
    sizes = smallest_claimable(analysis.design, study.level)
    lines = [
        f"By all measures together, {line}." for line in sizes.lines([float(cell) for cell in study.slices.tops], None)
    ]
    units = [
        f"{metric.name} {math.sqrt(typical_variance(metric.measure.run_means)[0]):.2g}"
        for metric in analysis.metrics
        if metric.decides
    ]
    lines.append(f"A seed spread is, in the measures' own units: {'; '.join(units)}.")
    return lines


def _means(analysis: Analysis) -> dict[str, Any]:
    """Means and spreads of the seeds, as the measures are known."""
    deciding = [metric for metric in analysis.metrics if metric.decides or metric.unit == "accuracy"]
    rows = [
        [cell.name, str(analysis.seeds[number])]
        + [
            f"{metric.shown(number).mean():.4g}"
            + (f" ± {metric.shown(number).std(ddof=1):.2g}" if analysis.seeds[number] > 1 else "")
            for metric in deciding
        ]
        for number, cell in enumerate(analysis.cells)
    ]
    header = ["slice", "seeds", *(metric.name for metric in deciding)]
    return {"header": header, "rows": rows, "numbers": range(1, len(header))}


def _ranks(low: int, high: int) -> str:
    return f"rank {low}" if low == high else f"rank {low} to {high}"


_SHAPE_WORDS = {
    ("trend", "rises"): "orders quality",
    ("trend", "falls"): "orders it the wrong way",
    ("trend", "none"): "not shown",
    ("bend", "peaks"): "the middle is best",
    ("bend", "dips"): "the middle is worst",
    ("bend", "none"): "no bend shown",
}


def _shapes(analysis: Analysis) -> dict[str, Any] | None:
    rows: list[list[Any]] = []
    for shape in (*analysis.trends, *analysis.bends):
        colour = {"peaks": "rises", "dips": "falls"}.get(shape.claim, shape.claim)
        rows.append(
            [
                shape.source,
                shape.score,
                shape.kind,
                {"verdict": _SHAPE_WORDS[shape.kind, shape.claim], "colour": colour},
                f"{shape.estimate.value:+.2f}",
                f"{shape.estimate.error:.2f}",
                *(
                    "-" if math.isnan(p) else format_p(p).removeprefix("= ")
                    for p in (shape.exact, shape.estimate.p_value, shape.rough, shape.adjusted)
                ),
            ]
        )
    header = ["source", "measured on", "shape", "verdict", "size", "standard error", "p, permutation", "p, t test",
              "p, roughness", "p, corrected"]  # fmt: skip
    return {"header": header, "rows": rows, "numbers": range(4, 10)} if rows else None


def _curves(analysis: Analysis, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    return [{"name": metric.name, "figure": figure_block(curve_figure(analysis, metric))} for metric in metrics]


def _matrices(analysis: Analysis) -> list[dict[str, Any]]:
    """Return the decisions, of which there are none with one seed a slice."""
    return [
        {"name": name, "figure": figure_block(matrix_figure(analysis, name)), "folded": name != OVERALL}
        for name in analysis.scores
    ]


def _ranking(analysis: Analysis) -> dict[str, Any]:
    rankings = {name: analysis.ranking(name) for name in analysis.scores}
    rows = [
        [
            {
                "name": analysis.cells[ranking[place]].name,
                "ranks": _ranks(*analysis.rank_range(name, ranking[place])),
            }
            for name, ranking in rankings.items()
        ]
        for place in range(len(analysis.cells))
    ]
    return {"names": list(analysis.scores), "rows": rows}


def _reversals(analysis: Analysis) -> list[list[Any]]:
    return [
        [
            name,
            analysis.cells[lower].name,
            analysis.cells[upper].name,
            {"verdict": "claimed", "colour": "falls"} if sure else {"verdict": "may be chance", "colour": "none"},
        ]
        for name in analysis.scores
        for upper, lower, sure in analysis.reversals(name)
    ]


def _controls(analysis: Analysis) -> dict[str, Any] | None:
    """Return slices of a branch design beside its controls, by all measures together.

    None without controls.
    """
    rows = [
        [
            analysis.cells[pair.first].name,
            analysis.controls[pair.second - len(analysis.cells)],
            f"{pair.estimate.value:+.2f} ± {pair.estimate.error:.2f}",
            ", ".join(
                f"{value:+.3g} {unit}" for unit, value in analysis.effects(OVERALL, pair.first, pair.second).items()
            ),
            format_p(pair.adjusted),
            {"first": "better", "second": "worse", "none": "-"}[pair.claim],
        ]
        for pair in analysis.against_controls
        if pair.score == OVERALL
    ]
    header = ["slice", "control", "spreads between branches", "in the measures' units", "p, corrected", "claimed"]
    return {"header": header, "rows": rows, "numbers": (2, 3, 4)} if rows else None


def _methods(study: Study, analysis: Analysis) -> list[str]:
    if max(analysis.seeds) < 2:
        return ["Nothing was tested: the unit of replication is a run, and every slice has only one."]
    ratios = [f"{name} {variance_ratio(score):.3g}" for name, score in analysis.scores.items()]
    bound = variance_ratio_bound(analysis.seeds)
    own, spread = study.slices.documents != "shared", study.slices.documents == "spread"
    return [
        "The unit of replication is a run. "
        + (
            "Each seed has initial weights, an order and documents of its own, so a difference speaks of the quantile "
            "and not of a few documents."
            if own
            else "All seeds share the documents of a slice, so a difference speaks of these documents alone."
        ),
        "A difference is tested with Student's t. Its variance is that of the slices' runs, each drawn towards the "
        "typical one, plus that of the paired differences per held-out document or question, groups of documents "
        "counted as one, without the noise that both contain.",
        f"{counted(len(analysis.trends), 'trend')} and {counted(len(analysis.bends), 'bend')} were tested, at "
        f"{SHAPES_SHARE:.0%} of "
        f"{analysis.level:g}: both the exact permutation of a source's runs and the t test must reject"
        + ("." if spread else ", and so must a test against the roughness between quantiles."),
        f"{counted(len(analysis.pairs), 'pair')} were compared at {PAIRS_SHARE:.0%} of {analysis.level:g} against the "
        "range of "
        "all means (Tukey), which covers the choice of the best by the data, and each by its own two "
        "slices alone (Welch). Pairs with a slice of fewer than "
        f"{LEAST_RUNS} runs, or whose own runs spread out of line, are not claimed.",
        "A capability is asked about a pair or a curve only where overall has a claim, and pays for the number of "
        "capabilities.",
        "A capability is the mean of its measures, each in units of its spread between seeds; overall is the mean of "
        "the capabilities.",
        "Largest over smallest variance between the seeds of a slice: "
        f"{', '.join(ratios)}; "
        + (
            "no bound is known."
            if math.isnan(bound)
            else f"with equal ones it stays below {bound:.3g} in 95 % of studies."
        ),
    ]


def _runs(study: Study, sliced: SlicedStudy, results: Mapping[str, RunResult]) -> dict[str, Any]:
    rows = [
        [
            run.cell_name,
            str(run.seed),
            f"{run.documents:,}",
            f"{run.slice_tokens:,}",
            f"{run.score_low:.4g} to {run.score_high:.4g}" if run.documents else "-",
            f"{results[run.name].tokens_per_second:,.0f}" if run.name in results else "-",
        ]
        for run in sliced.runs
    ]
    header = ["slice", "seed", "documents", "tokens", "scores", "tokens/s in training"]
    return {"header": header, "rows": rows, "numbers": (1, 2, 3, 5), "steps": f"{study.steps:,}"}
