"""The dry run of a plan as one self-contained HTML page."""

import html
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_kaiyuan.data.learning_rate import rate_at, rate_warnings
from megatron_kaiyuan.data.retention import repetition_warnings, retention_warnings
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.html_page import Card, figure_block, render_page
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.run_curves import colour_of

__all__ = ["write_plan_page"]


def write_plan_page(description: dict[str, Any], path: Path) -> None:
    """Write the page atomically: mix and learning rate over tokens, and a source by quality band map of epochs.

    Args:
        description: what `Plan.describe` returned.
        path: the HTML file; it loads nothing from elsewhere.
    """
    scored = [name for name, source in description["sources"].items() if source["bands"]]
    page = render_page(
        "plan.html",
        title=f"Plan {description['fingerprint']}",
        lead=f"Seed {description['seed']}, fingerprint {description['fingerprint']}.",
        warnings=rate_warnings(description)
        + repetition_warnings(description)
        + retention_warnings(description.get("retained", [])),
        retained=[
            [row["phase"], row["source"], *("-" if kept is None else f"{kept:.2f}" for kept in reversed(row["bands"]))]
            for row in description.get("retained", [])
        ],
        cards=_cards(description),
        mix_figure=figure_block(_mix_figure(description)),
        bands_figure=figure_block(_bands_figure(description, scored)) if scored else None,
        phases=[_phase(phase) for phase in description["phases"]],
    )
    write_text_atomically(path, page)


def _cards(description: dict[str, Any]) -> list[Card]:
    sources = description["sources"].values()
    scored = sum(bool(source["bands"]) for source in sources)
    return [
        (format_tokens(description["tokens"]), "tokens in all"),
        (f"{description['samples']:,}", f"samples of {counted(description['seq_length'], 'token')}"),
        (f"{len(description['phases'])}", "phases"),
        (f"{len(sources)}", f"sources, {scored} of them scored"),
    ]


def _phase(phase: dict[str, Any]) -> dict[str, Any]:
    """What is kept of each source, how often, and which share of the phase it is."""
    rows = [
        [
            name,
            row["keep"],
            row["order"],
            format_tokens(row["unique_tokens"]),
            format_tokens(row["tokens"]),
            f"x{row['repeat']:.3g}",
            f"{row['share']:.1%}",
        ]
        for name, row in phase["sources"].items()
    ]
    return {
        "title": f"{phase['name']}: {phase['order']}, {format_tokens(phase['tokens'])} tokens{_windows(phase)}",
        "header": ["source", "keep", "order", "unique tokens", "tokens shown", "repeat", "share"],
        "rows": rows,
        "numbers": (3, 4, 5, 6),
    }


def _windows(phase: dict[str, Any]) -> str:
    """How long the windows of a phase are, where they are several samples."""
    return f", windows of {phase['seq_length']:,}" if phase["samples_per_window"] > 1 else ""


def _mix_figure(description: dict[str, Any]) -> go.Figure:
    """Over the tokens of the run: the learning rate, under it the quality of each scored source, and the mix."""
    scored = [name for name, source in description["sources"].items() if source["bands"]]
    with_lr = any(phase["lr"] for phase in description["phases"])
    heights = [200] * with_lr + [28 * len(scored) + 20] * bool(scored) + [330]
    figure = make_subplots(
        rows=len(heights),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.05,
        row_heights=[height / sum(heights) for height in heights],
    )
    row = len(heights)
    for number, name in enumerate(description["sources"]):
        places, widths, shares, texts = _mix_bars(description, name)
        if places:
            figure.add_bar(
                x=places,
                y=shares,
                width=widths,
                name=name,
                marker_color=colour_of(number),
                marker_line={"width": 0.5, "color": "white"},
                customdata=texts,
                hovertemplate="%{customdata}<extra></extra>",
                row=row,
                col=1,
            )
    if with_lr:
        xs, ys = _learning_rate_line(description)
        figure.add_scatter(x=xs, y=ys, mode="lines", name="learning rate", line={"color": "#222"}, row=1, col=1)
        figure.update_yaxes(title_text="learning rate", rangemode="tozero", row=1, col=1)
    if scored:
        _add_quality(figure, description, scored, row - 1)
    _mark_phases(figure, description)
    figure.update_yaxes(title_text="share of tokens", tickformat=".0%", range=[0, 1], row=row, col=1)
    ticks = _round_ticks(description["tokens"])
    figure.update_xaxes(
        range=[0, description["tokens"]],
        tickvals=ticks,
        ticktext=[format_tokens(tick) for tick in ticks],
    )
    figure.update_xaxes(title_text="tokens of the run", row=row, col=1)
    height = sum(heights) + 60 * len(heights)
    figure.update_layout(barmode="stack", height=height, margin={"t": 90, "r": 20}, bargap=0)
    _style(figure)
    if scored:
        figure.update_xaxes(showgrid=False, row=row - 1, col=1)
        figure.update_yaxes(showgrid=False, row=row - 1, col=1)
    return figure


def _add_quality(figure: go.Figure, description: dict[str, Any], scored: list[str], row: int) -> None:
    """A strip for each scored source: dark where the run shows its best documents."""
    strips = [description["sources"][name]["quality"] for name in scored]
    width = description["tokens"] / len(strips[0])
    figure.add_heatmap(
        x=[width * (column + 0.5) for column in range(len(strips[0]))],
        y=scored,
        z=strips,
        colorscale="Greens",
        zmin=0,
        zmax=1,
        showscale=False,
        hoverongaps=False,
        hovertemplate="%{y}: score quantile %{z:.0%}<extra>darker = better</extra>",
        row=row,
        col=1,
    )
    figure.update_yaxes(autorange="reversed", row=row, col=1)


def _round_ticks(total: int) -> list[int]:
    """At most ten round numbers from 0 up to `total`."""
    magnitude = 10 ** max(0, len(str(total)) - 2)
    step = next(magnitude * factor for factor in (1, 2, 5, 10, 20) if total <= 10 * magnitude * factor)
    return list(range(0, total + 1, step))


def _mix_bars(description: dict[str, Any], source: str) -> tuple[list[float], list[int], list[float], list[str]]:
    places, widths, shares, texts = [], [], [], []
    for phase in description["phases"]:
        row = phase["sources"].get(source)
        if row is None:
            continue
        places.append(phase["first_sample"] * description["seq_length"] + phase["tokens"] / 2)
        widths.append(phase["tokens"])
        shares.append(row["share"])
        texts.append(
            f"{html.escape(source)} in {html.escape(phase['name'])}: {row['keep']}, repeat x{row['repeat']:g}<br>"
            f"{format_tokens(row['tokens'])} tokens, {row['share']:.1%} of the phase, {row['epochs']:.2f} epochs, "
            f"{row['order']}"
        )
    return places, widths, shares, texts


def _learning_rate_line(description: dict[str, Any]) -> tuple[list[float], list[float | None]]:
    xs: list[float] = []
    ys: list[float | None] = []
    for phase in description["phases"]:
        start = phase["first_sample"] * description["seq_length"]
        for step in range(65):
            xs.append(start + phase["tokens"] * step / 64)
            ys.append(_rate_at(phase["lr"], step / 64) if phase["lr"] else None)
    return xs, ys


def _rate_at(lr: dict[str, Any], progress: float) -> float:
    return rate_at(lr["shape"], lr["start"], lr["end"], progress)


def _mark_phases(figure: go.Figure, description: dict[str, Any]) -> None:
    for phase in description["phases"]:
        start = phase["first_sample"] * description["seq_length"]
        figure.add_vline(x=start, line={"color": "#777", "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=start + phase["tokens"] / 2,
            y=1.0,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
            text=f"<b>{html.escape(phase['name'])}</b><br>{phase['order']}<br>{format_tokens(phase['tokens'])}",
        )


def _bands_figure(description: dict[str, Any], scored: list[str]) -> go.Figure:
    """Epochs per source and quality band over all phases."""
    sources = description["sources"]
    bands = sources[scored[0]]["bands"]
    columns = [f"{band['low'] * 100:.0f}-{band['high'] * 100:.0f}%" for band in bands]
    epochs = [[band["epochs"] for band in sources[name]["bands"]] for name in scored]
    figure = go.Figure(
        go.Heatmap(
            z=epochs,
            x=columns,
            y=scored,
            colorscale="Blues",
            zmin=0,
            texttemplate="%{z:.2f}",
            xgap=2,
            ygap=2,
            showscale=False,
            hovertemplate="%{y}, score quantiles %{x}: seen %{z:.2f} times<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis_title="score quantile of the source's documents (0 = worst)",
        height=110 + 38 * len(scored),
        margin={"t": 10, "l": 140, "r": 20, "b": 60},
    )
    _style(figure)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(showgrid=False)
    return figure


def _style(figure: go.Figure) -> None:
    figure.update_layout(plot_bgcolor="white", font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"})
    figure.update_xaxes(title_font_size=13, linecolor="#9aa5b1", gridcolor="#e4e7eb")
    figure.update_yaxes(title_font_size=13, gridcolor="#e4e7eb")
