"""A study as one self-contained HTML page."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_kaiyuan.host.atomic import write_text_atomically
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
from megatron_kaiyuan.quantile.runs import SlicedStudy
from megatron_kaiyuan.quantile.statistics import typical_variance, variance_ratio, variance_ratio_bound
from megatron_kaiyuan.quantile.study import Study
from megatron_kaiyuan.reporting.html_page import figure_block, html_card, html_list, html_page, html_table
from megatron_kaiyuan.reporting.plan_table import format_tokens

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
    """Write the page atomically; it loads nothing from elsewhere."""
    parts = [
        "<h1>Which slices are worth training on</h1>",
        f'<p class="lead">{html.escape(_lead(study, sliced, results))}</p>',
        *(f'<p class="note refusal">{html.escape(line)}</p>' for line in analysis.refusals),
        *(f'<p class="note">{html.escape(line)}</p>' for line in analysis.warnings),
        _cards(analysis),
        *_smallest(study, analysis),
        "<h2>What the results show</h2>",
        html_list([line for line in told if line not in analysis.refusals]),
        *_overview(analysis),
        _trends(analysis),
        *_curves(analysis),
        *_maps(analysis),
        *_ranking(analysis),
        *_reversals(analysis),
        *_proposal(proposal),
        *_methods(study, analysis),
        *_runs(study, sliced, results),
    ]
    write_text_atomically(path, html_page("Quantile benchmark", parts))


def _lead(study: Study, sliced: SlicedStudy, results: Mapping[str, RunResult]) -> str:
    cost = sliced.cost
    return (
        f"{len(study.sources)} sources, {len(study.slices.tops)} quantiles, {_seeds(study)}: "
        f"{len(results)} models of {format_tokens(cost['parameters'])} parameters, each trained on "
        f"{format_tokens(study.budget)} tokens of one slice ({format_tokens(study.slices.tokens)} unique). "
        f"{_power_of_ten(cost['flops'])} FLOPs in all, {format_share(cost['share_of_main_run'])} of the main run; "
        f"{format_gpu_time(cost['gpu_hours'])} as estimated."
    )


def _seeds(study: Study) -> str:
    count = len(study.training.seeds)
    return f"{count} seeds" if count > 1 else "one seed"


def _power_of_ten(value: float) -> str:
    """`2.6 × 10¹²`."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"


def _cards(analysis: Analysis) -> str:
    leader = analysis.ranking(OVERALL)[0]
    low, high = analysis.rank_range(OVERALL, leader)
    pairs = [pair for pair in analysis.pairs if pair.score == OVERALL]
    claimed = sum(pair.claim != "none" for pair in pairs)
    rising = [trend.source for trend in analysis.trends if trend.score == OVERALL and trend.claim == "rises"]
    reversed_ = sum(sure for *_, sure in analysis.reversals(OVERALL))
    cards = [
        (analysis.cells[leader].name, f"highest mean; {_ranks(low, high)} of {len(analysis.cells)} by the claims"),
        (f"{claimed} of {len(pairs)}", "pairs of slices told apart"),
        (", ".join(rising) or "none", "sources whose score orders quality"),
        (str(reversed_), "reversals that are not chance"),
    ]
    if max(analysis.seeds) < 2:
        cards = [(analysis.cells[leader].name, "highest mean, of one seed: not a finding")]
    return '<div class="cards">' + "".join(html_card(*card) for card in cards) + "</div>"


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
    return ["<h2>The smallest difference that could be claimed</h2>", html_list(lines)]


def _means(analysis: Analysis) -> str:
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
    table = html_table(
        ["slice", "seeds", *(metric.name for metric in deciding)], rows, numbers=set(range(1, len(deciding) + 2))
    )
    return f"<details><summary>Means and standard deviations over seeds in numbers</summary>{table}</details>"


def _ranks(low: int, high: int) -> str:
    return f"rank {low}" if low == high else f"rank {low} to {high}"


def _overview(analysis: Analysis) -> list[str]:
    """The two figures that answer the question: what rises towards the best documents, and by how much."""
    parts = [
        '<p class="read">Overall, every measure taken together: a difference of 1 is the standard deviation between '
        "models that differ in their seed alone. <b>top 0%</b> are a source&#39;s very best documents by its score, "
        "<b>top 80%</b> lie where four fifths are better. A score that works rises to the right.</p>"
        if max(analysis.seeds) > 1
        else '<p class="read">Overall, every measure taken together, in standard deviations between the slices; with '
        "one seed nobody can say how much of it is chance.</p>",
        '<div class="plots">',
        f"<div><h3>Overall against quantile</h3>{figure_block(overall_figure(analysis))}</div>",
    ]
    if analysis.trends:
        parts.append(f"<div><h3>Does the score order quality?</h3>{figure_block(trend_figure(analysis))}</div>")
    return [*parts, "</div>"]


_SHAPE_WORDS = {
    ("trend", "rises"): "orders quality",
    ("trend", "falls"): "orders it the wrong way",
    ("trend", "none"): "not shown",
    ("bend", "peaks"): "the middle is best",
    ("bend", "dips"): "the middle is worst",
    ("bend", "none"): "no bend shown",
}


def _trends(analysis: Analysis) -> str:
    rows = []
    for shape in (*analysis.trends, *analysis.bends):
        colour = {"peaks": "rises", "dips": "falls"}.get(shape.claim, shape.claim)
        rows.append(
            [
                shape.source,
                shape.score,
                shape.kind,
                f'<span class="verdict {colour}">{_SHAPE_WORDS[shape.kind, shape.claim]}</span>',
                f"{shape.estimate.value:+.2f}",
                f"{shape.estimate.error:.2f}",
                *(
                    "-" if math.isnan(p) else format_p(p).removeprefix("= ")
                    for p in (shape.exact, shape.estimate.p_value, shape.rough, shape.adjusted)
                ),
            ]
        )
    if not rows:
        return ""
    header = ["source", "measured on", "shape", "verdict", "size", "standard error", "p, permutation", "p, t test",
              "p, roughness", "p, corrected"]  # fmt: skip
    table = html_table(header, rows, numbers=set(range(4, 10)), raw={3})
    return (
        "<details><summary>The trends and bends in numbers</summary>"
        '<p class="read">Of a trend, the rise of the straight line from the worst place to the best; of a bend, the '
        "middle above the ends; in spreads between seeds. The corrected p is of the largest of the three.</p>"
        f"{table}</details>"
    )


def _curves(analysis: Analysis) -> list[str]:
    main = [metric for metric in analysis.metrics if metric.decides]
    more = [metric for metric in analysis.metrics if not metric.decides]
    return [
        "<h2>Score against quantile</h2>",
        '<p class="read">Rings are single seeds, the line their mean, the band its 95 % confidence interval (each '
        "slice's spread between seeds drawn towards that of all). A triangle marks a slice that did better than its "
        "neighbour with the higher score: filled where that is claimed, open where it is not. A slice stands where its "
        "documents lie; at the ends that is further inwards than its name. Bits per byte fall towards the right where "
        "a score works.</p>",
        _means(analysis),
        *_plots(analysis, main),
        *_further_curves(analysis, more),
    ]


def _further_curves(analysis: Analysis, metrics: Sequence[Metric]) -> list[str]:
    if not metrics:
        return []
    return [
        f"<details{' open' if len(metrics) <= _MOST_OPEN else ''}><summary>Accuracy and margin (shown, not used for "
        "decisions: they move late in small models)</summary>",
        '<p class="read">Accuracy: the likeliest answer is the right one; norm: with likelihoods divided by the '
        "characters of the choice, as lm-eval&#39;s acc_norm. Share of probability: what the right answer has of all "
        "answers together; margin: how far it is ahead of the best wrong one; both with likelihoods per character. A "
        "model that guesses has one over the number of answers in all but the margin.</p>",
        *_plots(analysis, metrics),
        "</details>",
    ]


def _plots(analysis: Analysis, metrics: Sequence[Metric]) -> list[str]:
    plots = [
        f"<div><h3>{html.escape(metric.name)}</h3>{figure_block(curve_figure(analysis, metric))}</div>"
        for metric in metrics
    ]
    return ['<div class="plots">', *plots, "</div>"]


def _maps(analysis: Analysis) -> list[str]:
    parts = [
        "<h2>Sources by quantiles</h2>",
        '<p class="read">How far each slice lies above (blue) or below (red) the mean of all slices, in '
        f"{analysis.unit}; all maps have one scale. "
        "Scores of different sources do not compare; these numbers do. A triangle marks a "
        "slice that did better than one with a higher score: ▲ claimed, △ not claimed.</p>",
        '<div class="plots">',
        *(
            f"<div><h3>{html.escape(name)}</h3>{figure_block(heat_figure(analysis, name))}</div>"
            for name in analysis.scores
        ),
        "</div>",
    ]
    return [*parts, *_matrices(analysis)] if max(analysis.seeds) > 1 else parts


def _matrices(analysis: Analysis) -> list[str]:
    """The decisions; with one seed a slice there are none."""
    parts = [
        "<h2>Which of two slices is better</h2>",
        '<p class="read">Probability, in percent, that the slice of the row is better than that of the column; both '
        "are in order of their means. A star marks what is claimed: the differences that stay significant after "
        "correction for all comparisons. Point at a field for the difference and its p-value.</p>",
    ]
    for name in analysis.scores:
        figure = figure_block(matrix_figure(analysis, name))
        parts.append(
            figure if name == OVERALL else f"<details><summary>{html.escape(name)}</summary>{figure}</details>"
        )
    return parts


def _ranking(analysis: Analysis) -> list[str]:
    parts = [
        "<h2>Ranking</h2>",
        '<p class="read">Overall in the figure, with 95 % intervals of the means; by capability in the table. The '
        "ranges of ranks are what the claims leave open: all hold together with "
        f"{1 - analysis.level:.0%} confidence.</p>",
        figure_block(ranking_figure(analysis)),
        '<div class="wide"><table><tr><th class="n">place</th>',
        *(f"<th>{html.escape(name)}</th>" for name in analysis.scores),
        "</tr>",
    ]
    rankings = {name: analysis.ranking(name) for name in analysis.scores}
    for place in range(len(analysis.cells)):
        cells = []
        for name, ranking in rankings.items():
            ranks = _ranks(*analysis.rank_range(name, ranking[place]))
            slice_name = html.escape(analysis.cells[ranking[place]].name)
            cells.append(f'<td class="one">{slice_name} <small>({ranks})</small></td>')
        parts.append(f'<tr><td class="n">{place + 1}</td>{"".join(cells)}</tr>')
    return [*parts, "</table></div>"]


def _reversals(analysis: Analysis) -> list[str]:
    head = "<h2>Where quality does not follow the score</h2>"
    rows = [
        [
            name,
            analysis.cells[lower].name,
            analysis.cells[upper].name,
            f'<span class="verdict {"falls" if sure else "none"}">{"claimed" if sure else "may be chance"}</span>',
        ]
        for name in analysis.scores
        for upper, lower, sure in analysis.reversals(name)
    ]
    if not rows:
        return [head, '<p class="read">Nowhere: all means are in order.</p>']
    header = ["measured on", "did better", "although this has the higher score", ""]
    return [head, html_table(header, rows, raw={3})]


def _proposal(proposal: Proposal) -> list[str]:
    parts = ["<h2>Proposed plan</h2>", f'<p class="read">{html.escape(proposal.summary)}</p>']
    if proposal.mixes:
        parts += ["<h3>What each capability asks for</h3>", html_list([mix.reason for mix in proposal.mixes])]
    for one in proposal.advice:
        parts += [f"<h3>{html.escape(one.source)}</h3>", html_list(one.reasons)]
    if proposal.plan is not None:
        parts += [
            '<p class="read">A fragment in the plan&#39;s grammar, as proposed_plan.yaml; token budgets and learning '
            "rates are yours to add.</p>",
            f"<pre>{html.escape(proposal.plan)}</pre>",
        ]
    return parts


def _methods(study: Study, analysis: Analysis) -> list[str]:
    head = "<h2>How it was tested</h2>"
    if max(analysis.seeds) < 2:
        return [
            head,
            html_list(["Nothing was tested: the unit of replication is a run, and every slice has only one."]),
        ]
    ratios = [f"{name} {variance_ratio(score):.3g}" for name, score in analysis.scores.items()]
    bound = variance_ratio_bound(analysis.seeds)
    own, spread = study.slices.documents != "shared", study.slices.documents == "spread"
    lines = [
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
        f"{len(analysis.trends)} trends and {len(analysis.bends)} bends were tested, at {SHAPES_SHARE:.0%} of "
        f"{analysis.level:g}: both the exact permutation of a source's runs and the t test must reject"
        + ("." if spread else ", and so must a test against the roughness between quantiles."),
        f"{len(analysis.pairs)} pairs were compared at {PAIRS_SHARE:.0%} of {analysis.level:g} against the range of "
        "all means (Tukey), which covers the choice of the best by the data. Pairs with a slice of fewer than "
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
    return [head, html_list(lines)]


def _runs(study: Study, sliced: SlicedStudy, results: Mapping[str, RunResult]) -> list[str]:
    rows = [
        [
            f"{run.source} top {run.top * 100:g}%",
            str(run.seed),
            f"{run.documents:,}",
            f"{run.slice_tokens:,}",
            f"{run.score_low:.4g} to {run.score_high:.4g}",
            f"{results[run.name].tokens_per_second:,.0f}" if run.name in results else "-",
        ]
        for run in sliced.runs
    ]
    header = ["slice", "seed", "documents", "tokens", "scores", "tokens/s in training"]
    table = html_table(header, rows, numbers={1, 2, 3, 5})
    return [f"<h2>Runs</h2><details><summary>{len(rows)} runs of {study.steps:,} steps</summary>{table}</details>"]
