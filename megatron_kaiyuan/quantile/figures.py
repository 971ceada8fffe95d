"""Plots of a study: curves over quantiles with their seeds, maps of sources by quantiles, decision matrix, ranking.

All speak one language: a colour is a source, a band or bar a 95 % confidence interval of the mean over seeds, a filled
triangle a claim that quality runs against the score, an open one a place where that is not claimed.
"""

import html
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from megatron_kaiyuan.quantile.analysis import OVERALL, Analysis, Metric
from megatron_kaiyuan.quantile.statistics import Estimate, Score, mean_estimate

__all__ = [
    "COLOURS",
    "curve_figure",
    "heat_figure",
    "matrix_figure",
    "overall_figure",
    "ranking_figure",
    "trend_figure",
]

COLOURS = ("#2b6cb0", "#dd8a1d", "#2f855a", "#b83280", "#6b46c1", "#975a16", "#0e7490", "#c53030")
"""Of sources, in the study's order; they repeat after eight."""

_GRID, _QUIET, _INK, _BAD, _GOOD = "#e4e7eb", "#52606d", "#1f2933", "#c53030", "#2f855a"
_DIVERGING = [[0.0, "#b2182b"], [0.25, "#f0a58a"], [0.5, "#f7f7f7"], [0.75, "#8ebfdb"], [1.0, "#2166ac"]]
_CONFIDENCE = 0.95
_MOST_TRENDS, _MOST_NUMBERS = 12, 12
"""Rows of the trend figure, and slices in a matrix whose fields have room for a number beside the star."""


def curve_figure(analysis: Analysis, metric: Metric) -> go.Figure:
    """One metric against the quantile, worst on the left: mean, 95 % band over seeds, and every seed as a ring."""
    better = "lower" if metric.lower_is_better else "higher"
    name = metric.capability if metric.capability in analysis.scores else OVERALL
    claimed = {(upper, lower) for upper, lower, sure in analysis.reversals(name) if sure and metric.decides}
    reversals = [(lower, (upper, lower) in claimed) for upper, lower in _reversed_neighbours(analysis, metric.measure)]
    figure = _curves(analysis, metric.measure, -1.0 if metric.lower_is_better else 1.0, 0.0, reversals)
    figure.update_yaxes(title_text=f"{metric.unit.replace('_', ' ')} ({better} is better)")
    return figure


def overall_figure(analysis: Analysis) -> go.Figure:
    """The score that decides against the quantile, in spreads between seeds above or below the mean of all slices."""
    reversals = [(lower, sure) for _, lower, sure in analysis.reversals(OVERALL)]
    figure = _curves(analysis, analysis.scores[OVERALL], 1.0, _centre(analysis, OVERALL), reversals)
    figure.update_yaxes(title_text=f"{analysis.unit} (higher is better)", zeroline=True, zerolinecolor="#9aa5b1")
    return figure


def _curves(
    analysis: Analysis, score: Score, scale: float, centre: float, reversals: Iterable[tuple[int, bool]]
) -> go.Figure:
    figure = _figure(height=360 + 22 * max(0, len(_colours(analysis)) - 2))  # the legend grows above the plot
    places = analysis.places
    means = [(mean_estimate(score, cell).value - centre) * scale for cell in range(len(places))]
    for source, colour in _colours(analysis).items():
        cells = [number for number, cell in enumerate(analysis.cells) if cell.source == source]
        cells.sort(key=lambda cell: places[cell])
        xs, ys = [places[cell] for cell in cells], [means[cell] for cell in cells]
        widths = [abs(scale) * mean_estimate(score, cell).half_width(_CONFIDENCE) for cell in cells]
        _add_band(figure, xs, ys, widths, colour, source)
        _add_means(figure, xs, ys, _told(analysis, cells, ys, widths), colour, source)
        seeds = [((score.run_means[cell] - centre) * scale).tolist() for cell in cells]
        _add_seeds(figure, xs, seeds, colour, source)
    _mark_reversals(figure, [(places[cell], means[cell], sure) for cell, sure in reversals])
    tops = sorted({cell.top for cell in analysis.cells}, reverse=True)
    figure.update_xaxes(
        title_text="quantile by score (right = best documents)",
        tickvals=[1 - float(top) for top in tops],
        ticktext=[f"top {float(top * 100):g}%" for top in tops],
        range=[-0.06 + 1 - float(tops[0]), 1.06 - float(tops[-1])],
    )
    figure.update_yaxes(automargin=True)
    return figure


def _add_band(
    figure: go.Figure, xs: Sequence[float], ys: Sequence[float], widths: Sequence[float], colour: str, source: str
) -> None:
    """None where one seed gives no interval."""
    if not all(math.isfinite(width) for width in widths):
        return
    upper = [mean + width for mean, width in zip(ys, widths, strict=True)]
    lower = [mean - width for mean, width in zip(ys, widths, strict=True)]
    figure.add_scatter(
        x=[*xs, *xs[::-1]],
        y=[*upper, *lower[::-1]],
        mode="lines",
        fill="toself",
        fillcolor=_faint(colour),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=source,
    )


def _add_means(
    figure: go.Figure, xs: Sequence[float], ys: Sequence[float], told: Sequence[str], colour: str, source: str
) -> None:
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="lines+markers",
        name=html.escape(source),
        legendgroup=source,
        line={"color": colour, "width": 2.5},
        marker={"size": 8},
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _add_seeds(
    figure: go.Figure, xs: Sequence[float], seeds: Sequence[Sequence[float]], colour: str, source: str
) -> None:
    dots = [(place, value) for place, values in zip(xs, seeds, strict=True) for value in values]
    figure.add_scatter(
        x=[place for place, _ in dots],
        y=[value for _, value in dots],
        mode="markers",
        marker={"color": colour, "size": 6, "symbol": "circle-open", "opacity": 0.8},
        legendgroup=source,
        showlegend=False,
        hovertemplate="one seed: %{y:.4g}<extra></extra>",
    )


def _mark_reversals(figure: go.Figure, spots: Sequence[tuple[float, float, bool]]) -> None:
    """A triangle at every slice that did better than one of a higher score."""
    for claimed, name in ((True, "against the score, claimed"), (False, "against the score, not claimed")):
        chosen = [(x, y) for x, y, sure in spots if sure is claimed]
        if chosen:
            figure.add_scatter(
                x=[x for x, _ in chosen],
                y=[y for _, y in chosen],
                mode="markers",
                name=name,
                marker={
                    "symbol": "triangle-up" if claimed else "triangle-up-open",
                    "size": 15,
                    "color": _BAD if claimed else _QUIET,
                    "line": {"width": 1.5},
                },
                hoverinfo="skip",
            )


def _reversed_neighbours(analysis: Analysis, score: Score) -> list[tuple[int, int]]:
    """Neighbouring cells of a source, the better-scored first, of which the other has the better mean."""
    means = [float(runs.mean()) for runs in score.run_means]
    return [
        (upper, lower)
        for upper, lower in pairwise(range(len(analysis.cells)))
        if analysis.cells[upper].source == analysis.cells[lower].source and means[lower] > means[upper]
    ]


def _told(analysis: Analysis, cells: Sequence[int], means: Sequence[float], widths: Sequence[float]) -> list[str]:
    return [
        f"{html.escape(analysis.cells[cell].name)}: {mean:.4g}"
        + (f" ± {width:.2g} (95 %)" if math.isfinite(width) else " (one seed)")
        for cell, mean, width in zip(cells, means, widths, strict=True)
    ]


def trend_figure(analysis: Analysis) -> go.Figure:
    """Draw the rise from the worst to the best quantile of every source and score, with its interval.

    0 means no order.
    """
    trends = analysis.trends
    if len(trends) > _MOST_TRENDS:  # the page has all of them in a table
        trends = tuple(trend for trend in trends if trend.score == OVERALL)
    colours = {"rises": _GOOD, "falls": _BAD, "none": "#7b8794"}
    figure = _figure(height=360 if len(trends) <= 6 else 130 + 34 * len(trends))
    for claim, name in (("rises", "orders quality"), ("falls", "the wrong way"), ("none", "not shown")):
        chosen = [trend for trend in trends if trend.claim == claim]
        figure.add_scatter(
            x=[trend.estimate.value for trend in chosen],
            y=[_trend_label(trend.source, trend.score) for trend in chosen],
            error_x=_bars(trend.estimate for trend in chosen),
            mode="markers",
            name=name,
            marker={"size": 11, "color": colours[claim], "symbol": "circle" if claim != "none" else "circle-open"},
            customdata=[trend.adjusted for trend in chosen],
            hovertemplate="%{y}: %{x:+.2f} seed spreads, corrected p %{customdata:.2g}<extra></extra>",
        )
    order = [_trend_label(trend.source, trend.score) for trend in trends]
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], automargin=True, gridcolor="#f1f4f7")
    figure.update_xaxes(
        title_text="worst to best quantile, seed spreads", zeroline=True, zerolinecolor=_INK, showgrid=True
    )
    return figure


def _trend_label(source: str, score: str) -> str:
    return f"{html.escape(source)} · {html.escape(score)}"


def ranking_figure(analysis: Analysis) -> go.Figure:
    """All slices by their overall mean, best on top, with the ranks that the claims leave open."""
    score, centre = analysis.scores[OVERALL], _centre(analysis, OVERALL)
    order = analysis.ranking(OVERALL)
    figure = _figure(height=130 + 30 * len(order))
    for source, colour in _colours(analysis).items():
        cells = [cell for cell in order if analysis.cells[cell].source == source]
        estimates = [mean_estimate(score, cell) for cell in cells]
        figure.add_scatter(
            x=[estimate.value - centre for estimate in estimates],
            y=[html.escape(analysis.cells[cell].name) for cell in cells],
            error_x=_bars(estimates, colour),
            mode="markers",
            name=html.escape(source),
            marker={"size": 10, "color": colour},
            hovertemplate="%{y}: %{x:+.2f}<extra></extra>",
        )
    for cell in order:
        low, high = analysis.rank_range(OVERALL, cell)
        figure.add_annotation(
            text=f"rank {low}" if low == high else f"rank {low} to {high}",
            xref="paper",
            x=1.01,
            xanchor="left",
            y=html.escape(analysis.cells[cell].name),
            showarrow=False,
            font={"color": _QUIET, "size": 12},
        )
    names = [html.escape(analysis.cells[cell].name) for cell in order]
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], automargin=True, gridcolor="#f1f4f7")
    figure.update_xaxes(
        title_text=f"{analysis.unit} above the mean of all slices", zeroline=True, zerolinecolor="#9aa5b1"
    )
    figure.update_layout(margin={"r": 110})
    return figure


def _bars(estimates: Iterable[Estimate], colour: str | None = None) -> dict[str, Any]:
    widths = [one.half_width(_CONFIDENCE) for one in estimates]
    return {
        "type": "data",
        "array": [width if math.isfinite(width) else 0.0 for width in widths],
        "thickness": 2,
        "width": 0,
    } | ({} if colour is None else {"color": colour})


def heat_figure(analysis: Analysis, name: str) -> go.Figure:
    """Sources by quantiles for one score, in its units above or below the mean of all slices."""
    sources = list(_colours(analysis))
    tops = sorted({cell.top for cell in analysis.cells}, reverse=True)
    values = _spreads(analysis, name, sources, tops)
    # one scale for all scores, so that the maps of a page compare
    limit = max(float(np.nanmax(np.abs(_spreads(analysis, one, sources, tops)))) for one in analysis.scores) or 1.0
    marks = {
        (analysis.cells[lower].source, analysis.cells[lower].top): " ▲" if sure else " △"
        for _, lower, sure in sorted(analysis.reversals(name), key=lambda spot: spot[2])
    }
    figure = _figure(height=110 + 48 * len(sources))
    figure.add_heatmap(
        z=values,
        x=[f"top {float(top * 100):g}%" for top in tops],
        y=[html.escape(source) for source in sources],
        zmin=-limit,
        zmax=limit,
        colorscale=_DIVERGING,
        showscale=False,
        text=[
            [_signed(one) + marks.get((source, top), "") for top, one in zip(tops, row, strict=True)]
            for source, row in zip(sources, values, strict=True)
        ],
        texttemplate="%{text}",
        xgap=2,
        ygap=2,
        hovertemplate=f"%{{y}}, %{{x}}: %{{z:+.2f}} {analysis.unit}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    figure.update_layout(margin={"t": 10, "b": 50})
    return figure


def _signed(value: float) -> str:
    """Return one decimal with its sign, without a zero that is below zero.

    Nothing where there is no slice.
    """
    return "" if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}"


def _centre(analysis: Analysis, name: str) -> float:
    """The mean of all slices."""
    return float(np.mean([cell.mean() for cell in analysis.scores[name].run_means]))


def _spreads(analysis: Analysis, name: str, sources: Sequence[str], tops: Sequence[Fraction]) -> NDArray[np.float64]:
    """Return the means of the slices less the mean of all, `[sources, tops]`.

    NaN where there is no slice.
    """
    table = np.full((len(sources), len(tops)), math.nan)
    for cell, runs in zip(analysis.cells, analysis.scores[name].run_means, strict=False):  # controls follow the slices
        place = sources.index(cell.source), list(tops).index(cell.top)
        table[place] = float(runs.mean()) - _centre(analysis, name)
    return table


def matrix_figure(analysis: Analysis, name: str) -> go.Figure:
    """Draw the probability that the slice of a row is better than that of a column.

    A star marks what is claimed.
    """
    order = analysis.ranking(name)
    labels = [html.escape(analysis.cells[cell].name) for cell in order]
    values = [
        [math.nan if row == column else analysis.probability(name, row, column) for column in order] for row in order
    ]
    texts = [["" if row == column else _decision(analysis, name, row, column) for column in order] for row in order]
    figure = _figure(height=190 + 34 * len(order))
    figure.add_heatmap(
        z=values,
        x=labels,
        y=labels,
        zmin=0,
        zmax=1,
        colorscale=_DIVERGING,
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 12},
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": "row is<br>better"}, "tickformat": ".0%", "thickness": 12},
        customdata=[[_difference(analysis, name, row, column) for column in order] for row in order],
        hovertemplate="P(%{y} is better than %{x}) = %{z:.1%}<br>%{customdata}<extra></extra>",
    )
    figure.update_xaxes(side="top", tickangle=-35, showgrid=False, ticks="", linecolor="white")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", automargin=True)
    figure.update_layout(margin={"t": 120, "r": 20, "b": 20, "l": 120})
    return figure


def _decision(analysis: Analysis, name: str, row: int, column: int) -> str:
    probability = analysis.probability(name, row, column)
    if math.isnan(probability):
        return "?"
    claimed = analysis.claimed_better(name, row, column) or analysis.claimed_better(name, column, row)
    shown = ">99" if probability > 0.995 else "<1" if probability < 0.005 else f"{probability * 100:.0f}"
    if claimed and len(analysis.cells) > _MOST_NUMBERS:
        return "★"
    return f"<b>{shown}★</b>" if claimed else shown


def _difference(analysis: Analysis, name: str, row: int, column: int) -> str:
    if row == column:
        return ""
    estimate = analysis.difference(name, row, column)
    p = analysis.pair(name, row, column).adjusted
    return f"difference {estimate.value:+.2f} ± {estimate.error:.2f} seed spreads, corrected p {p:.2g}"


def _colours(analysis: Analysis) -> dict[str, str]:
    sources = dict.fromkeys(cell.source for cell in analysis.cells)
    return {source: COLOURS[number % len(COLOURS)] for number, source in enumerate(sources)}


def _figure(height: int) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"t": 40, "r": 20, "b": 60, "l": 80},
        plot_bgcolor="white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(
        showgrid=False, gridcolor=_GRID, linecolor="#9aa5b1", ticks="outside", tickcolor="#9aa5b1", title_font_size=13
    )
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, title_font_size=13)
    return figure


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
