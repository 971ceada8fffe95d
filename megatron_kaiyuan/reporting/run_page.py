"""Runs as one self-contained HTML page."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.reporting.html_page import Figures, html_card, html_page, html_table
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.run_activations import activation_figure
from megatron_kaiyuan.reporting.run_curves import colour_of, curves_figure, format_count, source_loss_figure
from megatron_kaiyuan.reporting.run_data_figures import bands_figure, sources_figure
from megatron_kaiyuan.reporting.run_expected import phase_marks
from megatron_kaiyuan.reporting.run_held_out import held_out_figure, read_averages, read_evaluations
from megatron_kaiyuan.reporting.run_metrics import Run
from megatron_kaiyuan.reporting.run_summary import (
    HELD_OUT_COLUMNS,
    format_duration,
    format_optional,
    format_times,
    held_out_cells,
)

__all__ = ["write_run_page"]

_READ_DATA = "Tokens that counted, summed over the run."
_READ_EXPECTED = " The dashed lines are where the plan puts the edges: areas that leave them were not fed as planned."
_READ_HELD_OUT = (
    "Loss on documents that no phase shows, the same ones at each evaluation. Right, by tenths of a source's documents "
    "from the lowest scores to the highest: the last evaluation, and dotted the first one."
)
_READ_AVERAGE = " Stars: the average of the checkpoints that the plan averages, as far as they were saved by then."
_READ_ACTIVATIONS = (
    "The largest absolute value in each layer when it was metered: red is near 65,504, where FP16 ends, crosses were "
    "not finite. Below, how many times larger the largest one could still grow; a trend matters more than the level."
)


def write_run_page(
    runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]], description: Mapping[str, Any] | None, path: Path
) -> None:
    """Write the page atomically; it loads nothing from elsewhere.

    Args:
        runs: One, or several to be compared.
        summaries: What `summarize` returned of each.
        description: What `Plan.describe` returned of their plan; None without one.
        path: The HTML file.
    """
    figures, marks = Figures(), phase_marks(description)
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += _head_of_one(runs[0], summaries[0]) if len(runs) == 1 else [_comparison(summaries)]
    parts += [
        f'<p class="note">{html.escape(told["run"] + ": " if len(runs) > 1 else "")}{html.escape(remark)}</p>'
        for told in summaries
        for remark in told["remarks"]
    ]
    parts += [
        '<p class="read">Strong lines are smoothed (half-life 0.5 % of the run, two log lines at least), faint ones as '
        "logged. Drag to zoom, all rows follow; double-click to return; click a name to hide it.</p>",
        figures.add(curves_figure(runs, marks)),
    ]
    if len(runs) > 1 and (names := list(dict.fromkeys(name for run in runs for name in run.sources))):
        plots = "".join(figures.add(source_loss_figure(runs, name, marks)) for name in names)
        parts.append(f'<h2>Loss by source</h2><div class="plots">{plots}</div>')
    for run, told in zip(runs, summaries, strict=True):
        parts += _details(run, told, description, figures, named=len(runs) > 1)
    write_text_atomically(path, html_page(title, parts))


def _details(
    run: Run, told: Mapping[str, Any], description: Mapping[str, Any] | None, figures: Figures, *, named: bool
) -> list[str]:
    marks, prefix = phase_marks(description), f"{html.escape(run.name)}: " if named else ""
    parts: list[str] = []
    evaluations, averages = read_evaluations(run), read_averages(run)
    if evaluations or averages:
        read = _READ_HELD_OUT + (_READ_AVERAGE if averages else "")
        parts.append(f'<h2>{prefix}Held-out documents</h2><p class="read">{read}</p>')
        parts.append(figures.add(held_out_figure(run, evaluations, averages, marks)))
        parts.append(_held_out_losses(told))
    if any(line.activations for line in run.lines):
        parts.append(f'<h2>{prefix}Activations and FP16</h2><p class="read">{_READ_ACTIVATIONS}</p>')
        parts.append(figures.add(activation_figure(run, marks)))
    if run.sources:
        read = _READ_DATA + (_READ_EXPECTED if description is not None else "")
        parts += [f'<h2>{prefix}What it was fed</h2><p class="read">{read}</p>']
        parts.append(figures.add(sources_figure(run, description, marks)))
        parts += [figures.add(bands_figure(run, name, description, marks)) for name in run.scored_sources]
    return parts


def _held_out_losses(told: Mapping[str, Any]) -> str:
    """The last losses of the run's own weights and of the average, in all and by source."""
    header, rows = held_out_cells(told)
    return html_table(header, rows, numbers=set(range(1, len(header))))


def _head_of_one(run: Run, told: Mapping[str, Any]) -> list[str]:
    first = run.lines[0]
    lead = f"{run.path}: {len(run.lines):,} log lines, steps {first.iteration:,} to {told['steps']:,}"
    if told["learning_rate"] is not None:
        lead += f"; learning rate now {told['learning_rate']:.3g}"
    if told["loss_scale"] is not None:
        lead += f", loss scale {format_count(told['loss_scale'])}"
    cards = "".join([html_card(f"{told['steps']:,}", "steps"), _tokens_card(told), *_other_cards(told)])
    return [f'<p class="lead">{html.escape(lead)}</p>', f'<div class="cards">{cards}</div>']


def _tokens_card(told: Mapping[str, Any]) -> str:
    planned, tokens = told["planned_tokens"], told["tokens"]
    if not planned or tokens is None:
        return html_card(format_optional(tokens, format_tokens), "tokens")
    share = min(1.0, tokens / planned)
    return html_card(format_tokens(tokens), f"tokens, {share:.1%} of {format_tokens(planned)}", bar=share)


def _other_cards(told: Mapping[str, Any]) -> list[str]:
    headroom, skipped, lost = told["smallest_headroom"], told["skipped_steps"], told["lines_without_finite_loss"]
    cards = [
        html_card(
            format_optional(told["smoothed_loss"], "{:.4f}".format),
            f"loss, smoothed; last {format_optional(told['loss'], '{:.4f}'.format)}",
            "bad" if lost else "",
        ),
        html_card(
            format_optional(told["tokens_per_second"], format_tokens),
            f"tokens/s, median; {format_duration(told['seconds'])} in all",
        ),
        html_card(f"{skipped:,}", f"skipped steps, {skipped / max(told['steps'], 1):.2%} of all"),
    ]
    if told["smallest_headroom_step"] is not None:
        kind = "good" if headroom is not None and headroom >= 8 else "bad"
        value = format_optional(headroom, format_times)
        cards.append(html_card(value, f"smallest FP16 headroom, step {told['smallest_headroom_step']:,}", kind))
    if average := told["held_out_average"]:
        own = told["held_out"] and told["held_out"]["loss"]
        beside = f"held-out loss of the average; {format_optional(own, '{:.4f}'.format)} of the last weights"
        cards.append(html_card(format_optional(average["loss"], "{:.4f}".format), beside))
    if told["seconds_left"]:
        cards.append(html_card(format_duration(told["seconds_left"]), "left of the plan at this rate"))
    return cards


def _comparison(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A row for each run, with the colour of its curves; the losses of its sources beside it."""
    sources = list(dict.fromkeys(name for told in summaries for name in told["sources"]))
    held_out = [name for name in HELD_OUT_COLUMNS if any(told[name] for told in summaries)]
    header = ["steps", "tokens", "loss", *sources, *(HELD_OUT_COLUMNS[name] for name in held_out)]
    header += ["tokens/s", "skipped steps", "smallest FP16 headroom"]
    rows = []
    for number, told in enumerate(summaries):
        losses = [told["sources"].get(name, {}).get("smoothed_loss") for name in sources]
        cells = [
            f"{told['steps']:,}",
            format_optional(told["tokens"], format_tokens),
            *(format_optional(loss, "{:.4f}".format) for loss in (told["smoothed_loss"], *losses)),
            *(format_optional(told[name] and told[name]["loss"], "{:.4f}".format) for name in held_out),
            format_optional(told["tokens_per_second"], format_tokens),
            f"{told['skipped_steps']:,}",
            format_optional(told["smallest_headroom"], format_times),
        ]
        dot = f'<i class="dot" style="background:{colour_of(number)}"></i>'
        numbers = "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in cells)
        rows.append(f"<tr><td>{dot}{html.escape(told['run'])}</td>{numbers}</tr>")
    top = "".join(f'<th class="n">{html.escape(name)}</th>' for name in header)
    return (
        '<p class="lead">Losses are smoothed and of the last log line; compare runs at equal tokens.</p>'
        f'<div class="wide"><table><tr><th>run</th>{top}</tr>{"".join(rows)}</table></div>'
    )
