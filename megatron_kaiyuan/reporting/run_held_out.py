"""Held-out loss of a run and of the average of its checkpoints.

By source over its tokens, by quantile band at its first and its last evaluation, and the last of each as plain data.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_kaiyuan.data import NUM_BANDS, band_name
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.monitoring.metrics_file import average_path, held_out_path, read_metrics
from megatron_kaiyuan.reporting.run_curves import colour_of
from megatron_kaiyuan.reporting.run_expected import PhaseMark
from megatron_kaiyuan.reporting.run_metrics import Run

__all__ = ["held_out_figure", "last_held_out", "read_averages", "read_evaluations", "spell_average"]

_GRID, _MARK, _QUIET = "#e4e7eb", "#9aa5b1", "#52606d"


def read_evaluations(run: Run) -> list[dict[str, Any]]:
    """Return the run's evaluations in the order of its steps, none where the plan holds nothing out."""
    return read_metrics(held_out_path(run.path))


def read_averages(run: Run) -> list[dict[str, Any]]:
    """Return evaluations of the average of the run's checkpoints, in the order of its steps.

    None without an average.
    """
    return read_metrics(average_path(run.path))


def last_held_out(run: Run) -> dict[str, dict[str, Any] | None]:
    """`held_out` and `held_out_average`: the last evaluation of the run's own weights and of the average.

    Each with its `step`, the `loss` over all tokens, the losses of the `sources` in nats a token, and `averaged`, the
    iterations in the average; None where there was none.
    """
    return {"held_out": _last(read_evaluations(run)), "held_out_average": _last(read_averages(run))}


def _last(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not evaluations:
        return None
    entry = evaluations[-1]
    sources = {name: found for name, found in entry["sources"].items() if found["loss"] is not None}
    tokens = sum(found["tokens"] for found in sources.values())
    return {
        "step": entry["iteration"],
        "loss": sum(found["loss"] * found["tokens"] for found in sources.values()) / tokens if tokens else None,
        "sources": {name: found["loss"] for name, found in sources.items()},
        "averaged": entry.get("averaged"),
    }


def held_out_figure(
    run: Run,
    evaluations: Sequence[Mapping[str, Any]],
    averages: Sequence[Mapping[str, Any]],
    marks: Sequence[PhaseMark],
) -> go.Figure:
    """Two plots side by side.

    Args:
        run: Gives the tokens of a sample and the colours of its sources.
        evaluations: See `read_evaluations`.
        averages: See `read_averages`; not empty where `evaluations` is.
        marks: Where phases begin.
    """
    every = [*evaluations, *averages]
    names = list(dict.fromkeys([*run.sources, *(name for entry in every for name in entry["sources"])]))
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
        _add_average(figure, run, averages, name, colour_of(number), first=number == 0)
    end = max(entry["consumed_samples"] for entry in every) * (run.seq_length or 1)
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


def _add_average(
    figure: go.Figure, run: Run, averages: Sequence[Mapping[str, Any]], name: str, colour: str, *, first: bool
) -> None:
    """Stars in the colour of the source, named once."""
    seen = [entry for entry in averages if name in entry["sources"]]
    if not seen:
        return
    figure.add_scatter(
        x=[entry["consumed_samples"] * (run.seq_length or 1) for entry in seen],
        y=[entry["sources"][name]["loss"] for entry in seen],
        customdata=[spell_average(entry.get("averaged")) for entry in seen],
        mode="lines+markers",
        name="average of checkpoints",
        legendgroup="average of checkpoints",
        legendrank=2000,  # behind the sources
        showlegend=first,
        line={"color": colour, "width": 1.5, "dash": "dash"},
        marker={"symbol": "star", "size": 10},
        hovertemplate=f"{html.escape(name)}, %{{customdata}}: %{{y:.4f}}<extra></extra>",
        row=1,
        col=1,
    )


def spell_average(iterations: Sequence[int] | None) -> str:
    """`average of 4 checkpoints, steps 44 to 48`."""
    if not iterations:
        return "average of checkpoints"
    return f"average of {counted(len(iterations), 'checkpoint')}, steps {iterations[0]:,} to {iterations[-1]:,}"


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
