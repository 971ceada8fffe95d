"""Plots of lengths and scores for the page of a source."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.shards_table import format_number

__all__ = ["band_figure", "length_figure", "score_figure", "sources_figure"]

_DOCUMENTS, _TOKENS = "#2b6cb0", "#dd8a1d"
_GRID, _QUIET = "#e4e7eb", "#52606d"
_LEAST_ON_LOG = 0.7


def length_figure(lengths: Mapping[str, Any]) -> go.Figure:
    """Shares of documents and of tokens by length, on a logarithmic axis."""
    figure = _step_figure(lengths, logarithmic=True)
    ticks = [step * 10**power for power in range(11) for step in (1, 2, 5)]
    low, high = max(lengths["bins"][0]["low"], _LEAST_ON_LOG), lengths["bins"][-1]["high"]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) > 14:
        inside = [tick for tick in inside if str(tick)[0] == "1"]
    figure.update_xaxes(
        type="log", title_text="tokens of a document", tickvals=inside, ticktext=[format_tokens(t) for t in inside]
    )
    figure.update_xaxes(range=[math.log10(low), math.log10(high)])
    _mark_quantiles(figure, lengths, logarithmic=True)
    return figure


def score_figure(score: str, told: Mapping[str, Any]) -> go.Figure:
    """Shares of documents and of tokens by score: bars for a few grades, steps for many values."""
    figure = _grade_figure(told) if told["grades"] is not None else _step_figure(told, logarithmic=False)
    figure.update_xaxes(title_text=score)
    if told["grades"] is None:
        _mark_quantiles(figure, told, logarithmic=False)
    return figure


def band_figure(told: Mapping[str, Any]) -> go.Figure:
    """Share of the tokens in each tenth of the documents by score, and the line where all would be alike."""
    tokens = told["band_tokens"]
    bands = len(tokens)
    total = max(sum(tokens), 1)
    names = [f"{100 * band // bands}-{100 * (band + 1) // bands}" for band in range(bands)]
    figure = _figure()
    figure.add_bar(
        x=names,
        y=[amount / total for amount in tokens],
        marker_color=_TOKENS,
        customdata=[format_tokens(amount) for amount in tokens],
        hovertemplate="documents %{x} % by score: %{customdata} tokens, %{y:.1%}<extra></extra>",
        showlegend=False,
    )
    figure.add_hline(y=1 / bands, line={"color": _QUIET, "width": 1.5, "dash": "dash"})
    figure.update_xaxes(tickangle=0, tickfont={"size": 11}, title_text="documents by score, % (right = best)")
    figure.update_yaxes(title_text="share of tokens", tickformat=".0%", rangemode="tozero")
    return figure


def sources_figure(sources: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Tokens of each source, largest on top."""
    ordered = sorted(sources, key=lambda source: int(source["tokens"]))
    figure = _figure(height=110 + 24 * len(sources))
    figure.add_bar(
        x=[source["tokens"] for source in ordered],
        y=[source["name"] for source in ordered],
        orientation="h",
        marker_color=_TOKENS,
        text=[format_tokens(source["tokens"]) for source in ordered],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:,} tokens<extra></extra>",
    )
    figure.update_xaxes(title_text="tokens", showgrid=True, gridcolor=_GRID)
    figure.update_yaxes(showgrid=False, automargin=True)
    return figure


def _figure(height: int = 340) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"t": 40, "r": 20, "b": 60, "l": 70},
        plot_bgcolor="white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        bargap=0.15,
    )
    figure.update_xaxes(showgrid=False, linecolor="#9aa5b1", ticks="outside", tickcolor="#9aa5b1", title_font_size=13)
    figure.update_yaxes(gridcolor=_GRID, zerolinecolor="#9aa5b1", title_font_size=13)
    return figure


def _columns(told: Mapping[str, Any]) -> list[tuple[str, str, list[float], list[str]]]:
    """Name, colour, shares and hover texts of documents and of tokens, bin by bin."""
    bins = told["bins"]
    found = []
    for name, colour in (("documents", _DOCUMENTS), ("tokens", _TOKENS)):
        total = max(sum(row[name] for row in bins), 1)
        shares = [row[name] / total for row in bins]
        texts = [f"{_range(row, told)}: {format_tokens(row[name])} {name}, {row[name] / total:.1%}" for row in bins]
        found.append((name, colour, shares, texts))
    return found


def _range(row: Mapping[str, float], told: Mapping[str, Any]) -> str:
    low = format_number(row["low"])
    return low if told.get("grades") is not None else f"{low} to {format_number(row['high'])}"


def _step_figure(told: Mapping[str, Any], *, logarithmic: bool) -> go.Figure:
    figure = _figure()
    edges = [row["low"] for row in told["bins"]] + [told["bins"][-1]["high"]]
    if logarithmic:
        edges[0] = max(edges[0], _LEAST_ON_LOG)  # for empty documents: a logarithmic axis has no zero
    for name, colour, shares, texts in _columns(told):
        figure.add_scatter(
            x=edges,
            y=[*shares, shares[-1]],
            mode="lines",
            line={"shape": "hv", "color": colour, "width": 2},
            fill="tozeroy",
            fillcolor=_faint(colour),
            name=f"share of {name}",
            customdata=[*texts, texts[-1]],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_yaxes(title_text="share", tickformat=".0%" if _largest(told) > 0.05 else ".1%", rangemode="tozero")
    return figure


def _grade_figure(told: Mapping[str, Any]) -> go.Figure:
    figure = _figure()
    grades = [format_number(grade) for grade in told["grades"]]
    for name, colour, shares, texts in _columns(told):
        figure.add_bar(
            x=grades,
            y=shares,
            marker_color=colour,
            name=f"share of {name}",
            customdata=texts,
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text="share", tickformat=".0%", rangemode="tozero")
    return figure


def _largest(told: Mapping[str, Any]) -> float:
    return max(max(shares) for _, _, shares, _ in _columns(told))


def _mark_quantiles(figure: go.Figure, told: Mapping[str, Any], *, logarithmic: bool) -> None:
    """Dotted lines at the 10 %, 50 % and 90 % quantiles of the documents."""
    for fraction in ("0.1", "0.5", "0.9"):
        value = max(told["quantiles"][fraction], _LEAST_ON_LOG) if logarithmic else told["quantiles"][fraction]
        if not math.isfinite(value):
            continue
        line = {"color": _QUIET, "width": 1, "dash": "dot"}
        figure.add_shape(type="line", x0=value, x1=value, y0=0, y1=1, yref="paper", line=line)
        figure.add_annotation(
            x=math.log10(value) if logarithmic else value,  # annotations, unlike shapes, count in powers of ten
            y=1,
            yref="paper",
            text=f"{float(fraction):.0%}: {format_number(told['quantiles'][fraction])}",
            textangle=-90,
            showarrow=False,
            xanchor="right",
            yanchor="top",
            font={"size": 11, "color": _QUIET},
            bgcolor="rgba(255,255,255,0.8)",
            xshift=-1,
        )


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.14)"
