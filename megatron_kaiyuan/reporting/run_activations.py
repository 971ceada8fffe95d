"""Activation peaks of a run, layer by layer over its tokens, and how far they are from the end of FP16."""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_kaiyuan.reporting.run_curves import mark_phases
from megatron_kaiyuan.reporting.run_expected import PhaseMark
from megatron_kaiyuan.reporting.run_metrics import FP16_MAX, Line, Run

__all__ = ["activation_figure", "layer_of", "layer_peaks", "metered_lines"]

_MOST_COLUMNS = 400
_BAD, _GRID = "#c53030", "#e4e7eb"
_SCALE = (
    (0.0, "#f7fbff"), (0.35, "#c6dbef"), (0.6, "#6baed6"), (0.75, "#fed976"), (0.9, "#fd8d3c"), (1.0, "#b10026"),
)  # fmt: skip
"""Quiet blue far from the limit, red at it."""

Peak = tuple[float | None, str]
"""The largest peak of a layer (None: not finite), and the tensor that has it."""


def layer_of(tensor: str) -> str:
    """Return `layer 3` for all tensors of `decoder.layers.3`, and so for `mtp.layers.0`.

    Other tensors keep their name.
    """
    for start, shown in (("decoder.layers.", "layer"), ("mtp.layers.", "MTP layer")):
        if tensor.startswith(start):
            return f"{shown} {tensor.split('.')[2]}"
    return tensor


def layer_peaks(activations: Mapping[str, float | None]) -> dict[str, Peak]:
    """Return the largest peak of each layer, in the order of computation.

    A tensor that is not finite outdoes all others.
    """
    peaks: dict[str, Peak] = {}
    for tensor, peak in activations.items():
        layer = layer_of(tensor)
        known = peaks.get(layer)
        if known is None or (known[0] is not None and (peak is None or peak > known[0])):
            peaks[layer] = (peak, tensor)
    return peaks


def metered_lines(run: Run) -> list[Line]:
    """Return the lines with activations.

    Of very many, the one with the least headroom in each of `_MOST_COLUMNS` parts.
    """
    lines = [line for line in run.lines if line.activations]
    if len(lines) <= _MOST_COLUMNS:
        return lines
    edges = [part * len(lines) // _MOST_COLUMNS for part in range(_MOST_COLUMNS + 1)]
    parts = [lines[low:high] for low, high in pairwise(edges)]
    return [min(part, key=lambda line: line.headroom or 0.0) for part in parts]


def activation_figure(run: Run, marks: Sequence[PhaseMark]) -> go.Figure:
    """Draw a heat map, layers upwards, on a log scale that ends at 65 504.

    Under it is the headroom of the whole model.
    """
    lines = metered_lines(run)
    peaks = [layer_peaks(line.activations) for line in lines]
    layers = list(dict.fromkeys(layer for column in peaks for layer in column))
    heights = (max(190, min(24 * len(layers), 620)), 150)
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.06,
        row_heights=[height / sum(heights) for height in heights],
    )
    xs = [run.tokens_at(line) for line in lines]
    _add_heat(figure, xs, layers, peaks, top=1 - heights[0] / sum(heights))
    _add_overflows(figure, xs, layers, peaks)
    _add_headroom(figure, xs, lines)
    _add_rises(figure, run)
    mark_phases(figure, marks, xs[-1])
    figure.update_xaxes(title_text="tokens", row=2, col=1)
    _style(figure, sum(heights) + 160)
    return figure


def _add_heat(
    figure: go.Figure, xs: list[int], layers: list[str], peaks: Sequence[Mapping[str, Peak]], top: float
) -> None:
    cells = [[column.get(layer, (None, "")) for column in peaks] for layer in layers]
    logs = [[math.log10(peak) if peak else None for peak, _ in row] for row in cells]
    texts = [[_cell_text(*cell) for cell in row] for row in cells]
    least = min((value for row in logs for value in row if value is not None), default=0.0)
    low, limit = math.floor(min(least, 2.0)), math.log10(FP16_MAX)
    ticks = [float(power) for power in range(low, 5)]
    figure.add_heatmap(
        x=xs,
        y=layers,
        z=logs,
        zmin=low,
        zmax=limit,
        colorscale=[list(stop) for stop in _SCALE],
        customdata=texts,
        hovertemplate="%{y}: %{customdata}<extra></extra>",
        hoverongaps=False,
        colorbar={
            "title": {"text": "max |activation|", "font": {"size": 12}, "side": "right"},
            "tickvals": [*ticks, limit],
            "ticktext": [*(f"{10**power:g}" for power in ticks), "65,504: limit"],
            "len": 1 - top,
            "y": 1,
            "yanchor": "top",
        },
        row=1,
        col=1,
    )
    figure.update_yaxes(type="category", title_text="", row=1, col=1)


def _cell_text(peak: float | None, tensor: str) -> str:
    if not tensor:
        return "not metered"
    inner = html.escape(tensor.split(".", 3)[-1]) if tensor.count(".") >= 3 else "output"
    if peak is None:
        return f"not finite ({inner})"
    return f"{peak:.4g} ({inner}), {FP16_MAX / peak:.3g} times below the limit" if peak else f"0 ({inner})"


def _add_overflows(figure: go.Figure, xs: list[int], layers: list[str], peaks: Sequence[Mapping[str, Peak]]) -> None:
    """Crosses where an activation was infinite or NaN."""
    spots = [(x, layer) for x, column in zip(xs, peaks, strict=True) for layer in layers if _overflowed(column, layer)]
    if spots:
        figure.add_scatter(
            x=[x for x, _ in spots],
            y=[layer for _, layer in spots],
            mode="markers",
            marker={"symbol": "x", "size": 7, "color": "#000"},
            name="not finite",
            showlegend=False,
            hovertemplate="%{y}: not finite<extra></extra>",
            row=1,
            col=1,
        )


def _overflowed(column: Mapping[str, Peak], layer: str) -> bool:
    return layer in column and column[layer][0] is None


def _add_headroom(figure: go.Figure, xs: list[int], lines: Sequence[Line]) -> None:
    values: list[float | None] = [
        line.headroom if line.headroom and math.isfinite(line.headroom) else None for line in lines
    ]
    figure.add_scatter(
        x=xs,
        y=values,
        mode="lines+markers",
        marker={"size": 4},
        line={"color": "#1f2933", "width": 1.6},
        name="headroom",
        showlegend=False,
        hovertemplate="headroom %{y:,.4g}<extra></extra>",
        row=2,
        col=1,
    )
    figure.add_hline(
        y=1,
        line={"color": _BAD, "width": 1.5, "dash": "dash"},
        row=2,
        col=1,
    )
    figure.add_annotation(
        x=xs[0],
        y=0,  # annotations, unlike shapes, count in powers of ten
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
        text="below: FP16 overflows",
        font={"color": _BAD, "size": 11},
        row=2,
        col=1,
    )
    finite = [value for value in values if value is not None]
    high = math.log10(max([*finite, 10.0])) + 0.3
    figure.update_yaxes(title_text="headroom, times", type="log", dtick=1, range=[-0.3, high], row=2, col=1)


def _add_rises(figure: go.Figure, run: Run) -> None:
    """Where the branch scale rose: the same values, written smaller from there on."""
    before: int | None = None
    for line in run.lines:
        earlier, before = (before, line.activations_branch_scale_bits), line.branch_scale_bits
        if before is not None and any(bits is not None and bits < before for bits in earlier):
            figure.add_vline(
                x=run.tokens_at(line),
                line={"color": "#2b6cb0", "width": 1.2, "dash": "dot"},
                annotation={
                    "text": f"branches 2^-{before}", "textangle": -90, "font": {"size": 11, "color": "#2b6cb0"},
                    "yanchor": "top", "xanchor": "left",
                },
                row=2,
                col=1,
            )  # fmt: skip


def _style(figure: go.Figure, height: int) -> None:
    layout: dict[str, Any] = {
        "height": height,
        "margin": {"t": 50, "r": 20, "b": 50, "l": 90},
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
    }
    figure.update_layout(**layout)
    figure.update_xaxes(showgrid=False, linecolor="#9aa5b1", exponentformat="B", title_font_size=13)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, title_font_size=13, row=2, col=1)
