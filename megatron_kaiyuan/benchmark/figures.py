"""Plots of a study: curves over quantiles with their seeds, a map of sources by quantiles, and the decision matrix."""

import html
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from megatron_kaiyuan.benchmark.analysis import Analysis, Metric
from megatron_kaiyuan.benchmark.statistics import mean_estimate, pooled_variance

__all__ = ["COLOURS", "curve_figure", "heat_figure", "matrix_figure"]

COLOURS = ("#2b6cb0", "#dd8a1d", "#2f855a", "#b83280", "#6b46c1", "#975a16", "#0e7490", "#c53030")
"""Of sources, in the study's order; they repeat after eight."""

_GRID, _QUIET, _INK = "#e4e7eb", "#52606d", "#1f2933"
_DIVERGING = [[0.0, "#b2182b"], [0.25, "#f0a58a"], [0.5, "#f7f7f7"], [0.75, "#8ebfdb"], [1.0, "#2166ac"]]
_CONFIDENCE = 0.95


def curve_figure(analysis: Analysis, metric: Metric) -> go.Figure:
    """One metric against the quantile, worst on the left: mean, 95 % band over seeds, and every seed as a dot."""
    figure = _figure(height=360)
    sources = list(dict.fromkeys(cell.source for cell in analysis.cells))
    for number, source in enumerate(sources):
        cells = [place for place, cell in enumerate(analysis.cells) if cell.source == source]
        _add_source(figure, analysis, metric, cells, source, COLOURS[number % len(COLOURS)])
    tops = sorted({cell.top for cell in analysis.cells}, reverse=True)
    figure.update_xaxes(
        title_text="quantile by score (right = best documents)",
        tickvals=[1 - float(top) for top in tops],
        ticktext=[f"top {float(top * 100):g}%" for top in tops],
        range=[-0.06 + 1 - float(tops[0]), 1.06 - float(tops[-1])],
    )
    better = "lower" if metric.lower_is_better else "higher"
    figure.update_yaxes(title_text=f"{metric.unit.replace('_', ' ')} ({better} is better)", automargin=True)
    return figure


def _add_source(
    figure: go.Figure, analysis: Analysis, metric: Metric, cells: Sequence[int], source: str, colour: str
) -> None:
    sign = -1.0 if metric.lower_is_better else 1.0
    order = sorted(cells, key=lambda cell: -float(analysis.cells[cell].top))
    places = [1 - float(analysis.cells[cell].top) for cell in order]
    estimates = [mean_estimate(metric.measure, cell) for cell in order]
    means = [sign * estimate.value for estimate in estimates]
    widths = [estimate.half_width(_CONFIDENCE) for estimate in estimates]
    if all(math.isfinite(width) for width in widths):
        upper = [mean + width for mean, width in zip(means, widths, strict=True)]
        lower = [mean - width for mean, width in zip(means, widths, strict=True)]
        figure.add_scatter(
            x=[*places, *places[::-1]],
            y=[*upper, *lower[::-1]],
            mode="lines",
            fill="toself",
            fillcolor=_faint(colour),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=source,
        )
    figure.add_scatter(
        x=places,
        y=means,
        mode="lines+markers",
        name=html.escape(source),
        legendgroup=source,
        line={"color": colour, "width": 2.5},
        marker={"size": 8},
        customdata=[
            f"{html.escape(analysis.cells[cell].name)}: {mean:.4g}"
            + (f" +- {width:.2g} (95 %)" if math.isfinite(width) else " (one seed)")
            for cell, mean, width in zip(order, means, widths, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    dots = [(place, value) for place, cell in zip(places, order, strict=True) for value in metric.shown(cell).tolist()]
    figure.add_scatter(
        x=[place for place, _ in dots],
        y=[value for _, value in dots],
        mode="markers",
        marker={"color": colour, "size": 6, "symbol": "circle-open", "opacity": 0.8},
        legendgroup=source,
        showlegend=False,
        hovertemplate="one seed: %{y:.4g}<extra></extra>",
    )


def heat_figure(analysis: Analysis) -> go.Figure:
    """Sources by quantiles, one map for each score, in spreads between seeds above or below the mean of all slices."""
    sources = list(dict.fromkeys(cell.source for cell in analysis.cells))
    tops = sorted({cell.top for cell in analysis.cells}, reverse=True)
    names = list(analysis.scores)
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=names, horizontal_spacing=0.14, vertical_spacing=0.4 / rows
    )
    values = [_spreads(analysis, name, sources, tops) for name in names]
    limit = float(np.nanmax(np.abs(np.concatenate([one.ravel() for one in values])))) or 1.0
    for number, value in enumerate(values):
        figure.add_heatmap(
            z=value,
            x=[f"top {float(top * 100):g}%" for top in tops],
            y=[html.escape(source) for source in sources],
            zmin=-limit,
            zmax=limit,
            colorscale=_DIVERGING,
            showscale=number == 0,
            colorbar={"title": {"text": "seed<br>spreads"}, "thickness": 12},
            text=[["" if math.isnan(one) else f"{one:+.1f}" for one in row] for row in value],
            texttemplate="%{text}",
            xgap=2,
            ygap=2,
            hovertemplate="%{y}, %{x}: %{z:+.2f} seed spreads<extra></extra>",
            row=number // columns + 1,
            col=number % columns + 1,
        )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    _style(figure, height=120 + rows * (110 + 44 * len(sources)))
    return figure


def _spreads(analysis: Analysis, name: str, sources: Sequence[str], tops: Sequence[Fraction]) -> NDArray[np.float64]:
    """Means of the slices less the mean of all, in spreads between seeds; as they are where there is no spread."""
    cells = analysis.scores[name].run_means
    variance, _ = pooled_variance(cells)
    spread = math.sqrt(variance) or 1.0
    means = np.array([cell.mean() for cell in cells])
    table = np.full((len(sources), len(tops)), math.nan)
    for cell, mean in zip(analysis.cells, means, strict=True):
        table[sources.index(cell.source), list(tops).index(cell.top)] = (mean - means.mean()) / spread
    return table


def matrix_figure(analysis: Analysis, name: str) -> go.Figure:
    """Probability that the slice of a row is better than that of a column; a star marks what is claimed."""
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
        hovertemplate="P(%{y} is better than %{x}) = %{z:.1%}<extra></extra>",
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
    return f"<b>{shown}★</b>" if claimed else shown


def _figure(height: int) -> go.Figure:
    figure = go.Figure()
    _style(figure, height)
    return figure


def _style(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        height=height,
        margin={"t": 40, "r": 20, "b": 60, "l": 80},
        plot_bgcolor="white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(showgrid=False, linecolor="#9aa5b1", ticks="outside", tickcolor="#9aa5b1")
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
