"""What a run was fed, over its tokens: by source, by quantile band, and what the plan expected."""

import html
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_kaiyuan.data import NUM_BANDS
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.run_curves import colour_of, mark_phases
from megatron_kaiyuan.reporting.run_expected import PhaseMark, expected_band_tokens, expected_tokens
from megatron_kaiyuan.reporting.run_metrics import Run

__all__ = ["band_name", "bands_figure", "cumulative_bands", "cumulative_tokens", "sources_figure"]

_GRID = "#e4e7eb"
_MOST_PLACES, _MOST_BAND_PLACES = 300, 160
_BAND_COLOURS = (
    "#7f1d1d", "#b4532a", "#d98b3f", "#edc169", "#f3e3a1", "#d9e8a8", "#a9d18e", "#6fb37a", "#3b8f6b", "#14665a",
)  # fmt: skip
"""Worst to best."""


def band_name(band: int) -> str:
    """`90-100%` for the best of ten."""
    return f"{100 * band // NUM_BANDS}-{100 * (band + 1) // NUM_BANDS}%"


def cumulative_tokens(run: Run, source: str) -> list[int]:
    """Tokens of a source up to each line."""
    return list(accumulate(line.sources[source].tokens if source in line.sources else 0 for line in run.lines))


def cumulative_bands(run: Run, source: str) -> list[list[int]]:
    """Return the cumulative tokens of a source by quantile band, `[NUM_BANDS][lines]`."""
    return [
        list(accumulate(line.sources[source].bands[band] if source in line.sources else 0 for line in run.lines))
        for band in range(NUM_BANDS)
    ]


def sources_figure(run: Run, description: Mapping[str, Any] | None, marks: Sequence[PhaseMark]) -> go.Figure:
    """Draw the cumulative tokens by source, stacked.

    Dashed lines show where the plan puts the edges between them.
    """
    places = _sampled(len(run.lines))
    xs = [run.tokens_at(run.lines[place]) for place in places]
    figure = go.Figure()
    edge = [0.0] * len(places)
    for number, name in enumerate(run.sources):
        totals = cumulative_tokens(run, name)
        colour = colour_of(number)
        _add_area(figure, xs, [totals[place] for place in places], name, colour)
        if description is not None:
            consumed = [run.lines[place].consumed_samples for place in places]
            more = [expected_tokens(description, name, samples) for samples in consumed]
            edge = [low + high for low, high in zip(edge, more, strict=True)]
            _add_edge(figure, xs, edge, first=number == 0)
    mark_phases(figure, marks, xs[-1])
    figure.update_yaxes(title_text="tokens seen")
    figure.update_xaxes(title_text="tokens of the run")
    _style(figure, 380)
    return figure


def bands_figure(run: Run, source: str, description: Mapping[str, Any] | None, marks: Sequence[PhaseMark]) -> go.Figure:
    """Draw the cumulative tokens of a source by quantile band, stacked, with the plan's beside it."""
    places = _sampled(len(run.lines), _MOST_BAND_PLACES)
    xs = [run.tokens_at(run.lines[place]) for place in places]
    measured = [[row[place] for place in places] for row in cumulative_bands(run, source)]
    figure = make_subplots(
        rows=1,
        cols=1 if description is None else 2,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=None if description is None else ("seen", "expected from the plan"),
    )
    _add_bands(figure, xs, measured, column=1)
    if description is not None:
        consumed = [run.lines[place].consumed_samples for place in places]
        expected = [expected_band_tokens(description, source, samples) for samples in consumed]
        _add_bands(figure, xs, [list(row) for row in zip(*expected, strict=True)], column=2)
    for axis in (1,) if description is None else (1, 2):
        for mark in marks:
            if 0 < mark.start < xs[-1]:
                figure.add_vline(x=mark.start, line={"color": "#9aa5b1", "width": 1, "dash": "dot"}, row=1, col=axis)
    figure.update_yaxes(title_text="tokens seen", row=1, col=1)
    figure.update_xaxes(title_text="tokens of the run", range=[0, xs[-1]])
    _style(figure, 330)
    figure.update_layout(
        title={"text": f"<b>{html.escape(source)}</b>, by score quantile", "font": {"size": 14}, "x": 0.01},
        margin={"t": 60, "r": 110, "b": 50, "l": 80},
    )
    return figure


def _add_bands(figure: go.Figure, xs: list[int], rows: Sequence[Sequence[float]], column: int) -> None:
    for band, values in enumerate(rows):
        name = band_name(band)
        figure.add_scatter(
            x=xs,
            y=list(values),
            mode="lines",
            stackgroup=f"column {column}",
            name=name,
            legendgroup=name,
            showlegend=column == 1,
            line={"width": 0, "color": _BAND_COLOURS[band]},
            fillcolor=_BAND_COLOURS[band],
            customdata=[format_tokens(value) for value in values],
            hovertemplate=f"{name} %{{customdata}}<extra></extra>",
            row=1,
            col=column,
        )


def _add_area(figure: go.Figure, xs: list[int], ys: list[int], name: str, colour: str) -> None:
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="lines",
        stackgroup="sources",
        name=html.escape(name),
        line={"width": 0.5, "color": colour},
        customdata=[format_tokens(count) for count in ys],
        hovertemplate=f"{html.escape(name)} %{{customdata}}<extra></extra>",
    )


def _add_edge(figure: go.Figure, xs: list[int], ys: list[float], *, first: bool) -> None:
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="lines",
        name="expected",
        legendgroup="expected",
        legendrank=1,
        showlegend=first,
        line={"color": "#1f2933", "width": 1.3, "dash": "dash"},
        hoverinfo="skip",
    )


def _sampled(count: int, most: int = _MOST_PLACES) -> list[int]:
    """Line numbers at about equal distances, the last one among them: sums need no more."""
    if count <= most:
        return list(range(count))
    return [(place + 1) * count // most - 1 for place in range(most)]


def _style(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        height=height,
        margin={"t": 40, "r": 20, "b": 50, "l": 80},
        plot_bgcolor="white",
        hovermode="x unified",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        legend={"x": 1.01, "y": 1, "yanchor": "top", "traceorder": "reversed", "font": {"size": 12}},
    )
    figure.update_xaxes(showgrid=False, linecolor="#9aa5b1", exponentformat="B", title_font_size=13)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, exponentformat="B", rangemode="tozero", title_font_size=13)
