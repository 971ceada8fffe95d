"""Held-out loss of a run: by source over its tokens, and by quantile band at its first and its last evaluation."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_kaiyuan.data import NUM_BANDS, band_name
from megatron_kaiyuan.reporting.run_curves import colour_of
from megatron_kaiyuan.reporting.run_expected import PhaseMark
from megatron_kaiyuan.reporting.run_metrics import Run
from megatron_kaiyuan.training.metrics_file import held_out_path, read_metrics

__all__ = ["held_out_figure", "read_evaluations"]

_GRID, _MARK, _QUIET = "#e4e7eb", "#9aa5b1", "#52606d"


def read_evaluations(run: Run) -> list[dict[str, Any]]:
    """The run's evaluations in the order of its steps; none where the plan holds nothing out."""
    return read_metrics(held_out_path(run.path))


def held_out_figure(run: Run, evaluations: Sequence[Mapping[str, Any]], marks: Sequence[PhaseMark]) -> go.Figure:
    """Two plots side by side.

    Args:
        run: Gives the tokens of a sample and the colours of its sources.
        evaluations: Not empty; see `read_evaluations`.
        marks: Where phases begin.
    """
    names = list(dict.fromkeys([*run.sources, *(name for entry in evaluations for name in entry["sources"])]))
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.55, 0.45],
        horizontal_spacing=0.09,
        subplot_titles=("by source, over training", "by quantile band of the score"),
    )
    for number, name in enumerate(names):
        _add_over_tokens(figure, run, evaluations, name, colour_of(number))
        _add_by_band(figure, evaluations, name, colour_of(number))
    end = max(entry["consumed_samples"] for entry in evaluations) * (run.seq_length or 1)
    for mark in marks:
        if 0 < mark.start < end:
            figure.add_vline(x=mark.start, row=1, col=1, line={"color": _MARK, "width": 1, "dash": "dot"})
    _style(figure)
    return figure


def _add_over_tokens(
    figure: go.Figure, run: Run, evaluations: Sequence[Mapping[str, Any]], name: str, colour: str
) -> None:
    seen = [entry for entry in evaluations if name in entry["sources"]]
    figure.add_scatter(
        x=[entry["consumed_samples"] * (run.seq_length or 1) for entry in seen],
        y=[entry["sources"][name]["loss"] for entry in seen],
        mode="lines+markers",
        name=html.escape(name),
        legendgroup=name,
        line={"color": colour, "width": 2},
        marker={"size": 5},
        hovertemplate=f"{html.escape(name)} %{{y:.4f}}<extra></extra>",
        row=1,
        col=1,
    )


def _add_by_band(figure: go.Figure, evaluations: Sequence[Mapping[str, Any]], name: str, colour: str) -> None:
    """The last evaluation, and faintly the first one."""
    seen = [entry for entry in evaluations if any(entry["sources"].get(name, {}).get("bands", []))]
    for entry in dict.fromkeys((0, len(seen) - 1)) if seen else ():
        told, last = seen[entry], entry == len(seen) - 1
        bands = told["sources"][name]["bands"]
        present = [number for number in range(NUM_BANDS) if bands[number] is not None]
        figure.add_scatter(
            x=present,
            y=[bands[number] for number in present],
            customdata=[band_name(number) for number in present],
            mode="lines+markers",
            name=f"{html.escape(name)}, step {told['iteration']:,}",
            legendgroup=name,
            showlegend=False,
            opacity=1.0 if last else 0.35,
            line={"color": colour, "width": 2, "dash": "solid" if last else "dot"},
            marker={"size": 6},
            hovertemplate=f"step {told['iteration']:,}, %{{customdata}}: %{{y:.4f}}<extra>{html.escape(name)}</extra>",
            row=1,
            col=2,
        )


def _style(figure: go.Figure) -> None:
    figure.update_layout(
        height=360,
        margin={"t": 40, "r": 20, "b": 90, "l": 70},
        plot_bgcolor="white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        legend={"orientation": "h", "x": 0, "y": -0.28, "yanchor": "top"},
    )
    figure.update_xaxes(showgrid=False, linecolor=_MARK, exponentformat="B", title_font={"color": _QUIET})
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    figure.update_xaxes(title_text="tokens", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="nats a token", row=1, col=1)
    bands = [band_name(number) for number in range(NUM_BANDS)]
    figure.update_xaxes(
        title_text="lowest to highest scores",
        tickvals=list(range(NUM_BANDS)),
        ticktext=[name.replace("%", "") for name in bands],
        tickangle=0,
        tickfont={"size": 11},
        range=[-0.5, NUM_BANDS - 0.5],
        row=1,
        col=2,
    )
