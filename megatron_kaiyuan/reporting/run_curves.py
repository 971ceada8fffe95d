"""The curves of runs over tokens: loss, learning rate, gradient norm, loss scale, throughput, on one shared axis."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_kaiyuan.reporting.run_expected import PhaseMark
from megatron_kaiyuan.reporting.run_metrics import Line, Run

__all__ = [
    "colour_of",
    "curves_figure",
    "format_count",
    "half_life",
    "mark_phases",
    "smoothed",
    "source_loss_figure",
    "thinned",
]

_COLOURS = (
    "#2b6cb0",
    "#dd8a1d",
    "#2f855a",
    "#b83280",
    "#6b46c1",
    "#0f8b8d",
    "#c05621",
    "#718096",
    "#97266d",
    "#5a67d8",
)
_TOTAL, _BAD, _GRID, _QUIET = "#1f2933", "#c53030", "#e4e7eb", "#52606d"
_MOST_POINTS = 1600
_MOST_RAW = 4
"""Sources whose raw losses a reader can distinguish."""
_HEIGHTS = (400, 120, 150, 150, 130)
_GAP = 34

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class _Curve:
    name: str
    colour: str
    xs: Sequence[int]
    ys: Values
    width: float = 2.0
    raw: bool = True
    """Show the values as logged, too, faintly."""


def colour_of(number: int) -> str:
    """Return a colour for a curve.

    Well-chosen colours come first. Beyond them come hues a golden angle apart in three shades, so that neighbours
    differ.
    """
    if number < len(_COLOURS):
        return _COLOURS[number]
    return f"hsl({number * 137.508 % 360:.0f},{(52, 42, 60)[number % 3]}%,{(50, 66, 38)[number % 3]}%)"


def half_life(lines: int) -> float:
    """Return the half-life of the smoothing of all losses, in log lines.

    It is two where there are few, so that lines of one step still read.
    """
    return max(2.0, lines / 200)


def smoothed(values: Values, half_life: float) -> list[float | None]:
    """Return an exponential moving average without a bias at the start.

    Gaps stay gaps and weigh nothing.

    Args:
        values: One a log line; None where there is none.
        half_life: Lines after which a value weighs half; 0 = no smoothing.
    """
    if half_life <= 0:
        return list(values)
    keep = 0.5 ** (1 / half_life)
    total = weight = 0.0
    result: list[float | None] = []
    for value in values:
        if value is None:
            result.append(None)
            continue
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def thinned(xs: Sequence[int], ys: Values, most: int = _MOST_POINTS) -> tuple[list[int], list[float | None]]:
    """At most about `most` points, with every spike and every gap: of each bucket the least, the largest and a gap."""
    if len(xs) <= most:
        return list(xs), list(ys)
    buckets = max(1, most // 4)
    kept = {0, len(xs) - 1}
    for bucket in range(buckets):
        places = range(bucket * len(xs) // buckets, (bucket + 1) * len(xs) // buckets)
        finite = [(value, place) for place in places if (value := ys[place]) is not None]
        kept.update(place for _, place in (min(finite), max(finite)) if finite) if finite else None
        kept.update([next(place for place in places if ys[place] is None)] if len(finite) < len(places) else [])
    order = sorted(kept)
    return [xs[place] for place in order], [ys[place] for place in order]


def curves_figure(runs: Sequence[Run], marks: Sequence[PhaseMark]) -> go.Figure:
    """Draw all curves, with the loss by source where there is one run.

    Zooming in one zooms in all.
    """
    figure = make_subplots(
        rows=len(_HEIGHTS),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=_GAP / (sum(_HEIGHTS) + _GAP * len(_HEIGHTS)),
        row_heights=[height / sum(_HEIGHTS) for height in _HEIGHTS],
    )
    for curve in _loss_curves(runs):
        _add_raw_and_smooth(figure, curve, row=1)
    quantities: tuple[tuple[str, Callable[[Line], float | None]], ...] = (
        ("learning rate", lambda line: line.learning_rate),
        ("gradient norm", lambda line: line.grad_norm),
        ("loss scale", lambda line: line.loss_scale),
        ("tokens/s", lambda line: line.tokens_per_second),
    )
    for row, (label, value) in enumerate(quantities, start=2):
        for number, run in enumerate(runs):
            colour = colour_of(number) if len(runs) > 1 else _TOTAL
            ys = [value(line) for line in run.lines]
            _add_plain(figure, _Curve(f"{run.name}: {label}", colour, _places(run), ys, 1.6), row)
        figure.update_yaxes(title_text=label, row=row, col=1)
    for run in runs:
        _mark_trouble(figure, run)
    _style_axes(figure, runs)
    mark_phases(figure, marks, max(run.tokens_at(run.lines[-1]) for run in runs))
    _style(figure, sum(_HEIGHTS) + _GAP * len(_HEIGHTS) + 120)
    return figure


def source_loss_figure(runs: Sequence[Run], source: str, marks: Sequence[PhaseMark]) -> go.Figure:
    """The loss of one source in several runs."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        ys = [_source_loss(line, source) for line in run.lines]
        curve = _Curve(run.name, colour_of(number), _places(run), ys)
        _add_raw_and_smooth(figure, curve, row=None)
    mark_phases(figure, marks, max(run.tokens_at(run.lines[-1]) for run in runs), names=False)
    figure.update_layout(title={"text": html.escape(source), "font": {"size": 14}, "x": 0.02})
    _style(figure, 300)
    figure.update_layout(margin={"t": 40, "b": 45, "l": 50, "r": 10}, showlegend=False)
    return figure


def mark_phases(figure: go.Figure, marks: Sequence[PhaseMark], end: int, *, names: bool = True) -> None:
    """Draw a dotted line where each phase begins, through all rows, with its name on top.

    The axis goes from 0 to `end`.
    """
    figure.update_xaxes(range=[0, end])
    for mark in marks:
        if mark.start >= end:
            continue
        stop = min(mark.stop, end)
        if mark.start:
            figure.add_shape(
                type="line",
                x0=mark.start,
                x1=mark.start,
                y0=0,
                y1=1,
                xref="x",
                yref="paper",
                line={"color": "#9aa5b1", "width": 1, "dash": "dot"},
            )
        if names and stop - mark.start > 0.02 * end:
            figure.add_annotation(
                x=(mark.start + stop) / 2,
                xref="x",
                y=1,
                yref="paper",
                yanchor="bottom",
                showarrow=False,
                font={"size": 12, "color": _QUIET},
                text=f"<b>{html.escape(mark.name)}</b> {mark.order}",
            )


def format_count(value: float) -> str:
    """Return powers of two as such, as loss scales are, and other numbers in four digits."""
    power = math.log2(value) if value > 0 else 0.5
    return f"2^{power:.0f}" if power == int(power) and abs(power) >= 4 else f"{value:.4g}"


def _loss_curves(runs: Sequence[Run]) -> list[_Curve]:
    if len(runs) > 1:
        return [
            _Curve(run.name, colour_of(number), _places(run), [line.loss for line in run.lines])
            for number, run in enumerate(runs)
        ]
    run = runs[0]
    curves = [
        _Curve(
            name,
            colour_of(number),
            _places(run),
            [_source_loss(line, name) for line in run.lines],
            raw=len(run.sources) <= _MOST_RAW,
        )
        for number, name in enumerate(run.sources)
    ]
    return [*curves, _Curve("all", _TOTAL, _places(run), [line.loss for line in run.lines], 2.6)]


def _source_loss(line: Line, source: str) -> float | None:
    return line.sources[source].loss if source in line.sources else None


def _places(run: Run) -> list[int]:
    return [run.tokens_at(line) for line in run.lines]


def _add_raw_and_smooth(figure: go.Figure, curve: _Curve, row: int | None) -> None:
    place = {} if row is None else {"row": row, "col": 1}
    name = html.escape(curve.name)
    smooth = smoothed(curve.ys, half_life(len(curve.ys)))
    for ys, raw in [*([(curve.ys, True)] if curve.raw else []), (smooth, False)]:
        xs, values = thinned(curve.xs, ys)
        figure.add_scatter(
            x=xs,
            y=values,
            mode="lines+markers" if len(xs) == 1 else "lines",
            name=name,
            legendgroup=name,
            showlegend=not raw,
            line={"color": curve.colour, "width": 1 if raw else curve.width},
            opacity=0.22 if raw else 1,
            hoverinfo="skip" if raw else None,
            hovertemplate=None if raw else f"{name} %{{y:.4f}}<extra></extra>",
            connectgaps=not raw,
            **place,
        )


def _add_plain(figure: go.Figure, curve: _Curve, row: int) -> None:
    xs, ys = thinned(curve.xs, curve.ys)
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="lines+markers" if len(xs) == 1 else "lines",
        name=html.escape(curve.name),
        showlegend=False,
        line={"color": curve.colour, "width": curve.width, "shape": "hv" if row == 4 else "linear"},
        hovertemplate=f"{html.escape(curve.name)} %{{y:,.5g}}<extra></extra>",
        row=row,
        col=1,
    )


def _mark_trouble(figure: go.Figure, run: Run) -> None:
    """Skipped steps on the loss scale, lines without a loss and restarts at the foot of the loss."""
    scales = [line for line in run.lines if line.skipped_steps and line.loss_scale]
    _add_marks(
        figure,
        [run.tokens_at(line) for line in scales],
        [line.loss_scale for line in scales],
        [f"{html.escape(run.name)}, step {line.iteration:,}: skipped {line.skipped_steps:,}" for line in scales],
        ("skipped steps", "triangle-down", _BAD, 4),
    )
    finite = [line.loss for line in run.lines if line.loss is not None]
    floor = min(finite, default=0.0)
    lost = [line for line in run.lines if line.loss is None]
    _add_marks(
        figure,
        [run.tokens_at(line) for line in lost],
        [floor] * len(lost),
        [f"{html.escape(run.name)}, step {line.iteration:,}: the loss is not finite" for line in lost],
        ("loss not finite", "x", _BAD, 1),
    )
    again = [
        (run.tokens_at(line), last) for first, last in run.restarts for line in run.lines if line.iteration == first
    ]
    _add_marks(
        figure,
        [place for place, _ in again],
        [floor] * len(again),
        [f"{html.escape(run.name)} resumed here; had been at step {last:,}" for _, last in again],
        ("resumed", "triangle-up", "#2b6cb0", 1),
    )


def _add_marks(figure: go.Figure, xs: list[int], ys: Values, texts: list[str], look: tuple[str, str, str, int]) -> None:
    if not xs:
        return
    name, symbol, colour, row = look
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="markers",
        marker={"symbol": symbol, "color": colour, "size": 9, "line": {"color": "white", "width": 1}},
        name=name,
        legendgroup=name,
        showlegend=all(trace.name != name for trace in figure.data),
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
        row=row,
        col=1,
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten, with their double and fivefold where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return ticks if len(ticks) < 9 else ticks[:: len(ticks) // 5]


def _style_axes(figure: go.Figure, runs: Sequence[Run]) -> None:
    unit = "tokens" if any(run.seq_length for run in runs) else "samples"
    figure.update_yaxes(title_text="loss, nats a token", row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=2, col=1)
    norms = [line.grad_norm for run in runs for line in run.lines if line.grad_norm]
    ticks = _log_ticks(min(norms, default=1.0), max(norms, default=1.0))
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks], row=3, col=1)
    figure.update_yaxes(rangemode="tozero", row=5, col=1)
    scales = sorted({line.loss_scale for run in runs for line in run.lines if line.loss_scale})
    if scales:
        low, high = math.floor(math.log2(scales[0])), math.ceil(math.log2(scales[-1]))
        step = max(1, (high - low + 4) // 5)
        powers = range(low - low % step, high + step, step)
        figure.update_yaxes(
            type="log",
            tickvals=[2.0**power for power in powers],
            ticktext=[f"2<sup>{power}</sup>" for power in powers],
            row=4,
            col=1,
        )
    figure.update_xaxes(title_text=unit, row=len(_HEIGHTS), col=1)
    choices = [
        {"label": label, "method": "relayout", "args": [{"yaxis.type": kind}]}
        for label, kind in (("linear loss", "linear"), ("log loss", "log"))
    ]
    figure.update_layout(
        updatemenus=[
            {"buttons": choices, "type": "buttons", "direction": "right", "x": 1, "xanchor": "right", "y": 1.0}
            | {"yanchor": "bottom", "pad": {"b": 24}, "font": {"size": 11}, "showactive": True}
        ]
    )


def _style(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        height=height,
        margin={"t": 70, "r": 20, "b": 50, "l": 80},
        plot_bgcolor="white",
        hovermode="x unified",
        hoversubplots="axis",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        legend={"x": 1.01, "y": 1, "yanchor": "top", "tracegroupgap": 0, "font": {"size": 12}},
    )
    figure.update_xaxes(
        showgrid=False, linecolor="#9aa5b1", tickcolor="#9aa5b1", exponentformat="B", title_font_size=13
    )
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, exponentformat="B", title_font_size=13)
