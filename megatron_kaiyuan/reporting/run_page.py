"""Runs as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.html_page import Card, figure_block, render_page
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.run_activations import activation_figure
from megatron_kaiyuan.reporting.run_curves import colour_of, curves_figure, format_count, source_loss_figure
from megatron_kaiyuan.reporting.run_data_figures import bands_figure, sources_figure
from megatron_kaiyuan.reporting.run_expected import PhaseMark, phase_marks
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


def write_run_page(
    runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]], description: Mapping[str, Any] | None, path: Path
) -> None:
    """Write the page atomically.

    It loads nothing from elsewhere.

    Args:
        runs: One, or several to be compared.
        summaries: What `summarize` returned of each.
        description: What `Plan.describe` returned of their plan; None without one.
        path: The HTML file.
    """
    marks = phase_marks(description)
    alone = len(runs) == 1
    names = [] if alone else list(dict.fromkeys(name for run in runs for name in run.sources))
    page = render_page(
        "run.html",
        title=f"Run {runs[0].name}" if alone else f"{counted(len(runs), 'run')} compared",
        comparison=None if alone else _comparison(summaries),
        lead=_lead(runs[0], summaries[0]) if alone else "",
        cards=_cards(summaries[0]) if alone else [],
        remarks=[("" if alone else f"{told['run']}: ") + remark for told in summaries for remark in told["remarks"]],
        curves=figure_block(curves_figure(runs, marks)),
        source_losses=[figure_block(source_loss_figure(runs, name, marks)) for name in names],
        runs=[
            _details(run, told, description, prefix="" if alone else f"{run.name}: ")
            for run, told in zip(runs, summaries, strict=True)
        ],
    )
    write_text_atomically(path, page)


def _details(
    run: Run, told: Mapping[str, Any], description: Mapping[str, Any] | None, *, prefix: str
) -> dict[str, Any]:
    marks = phase_marks(description)
    metered = any(line.activations for line in run.lines)
    return {
        "prefix": prefix,
        "held_out": _held_out(run, told, marks),
        "activations": figure_block(activation_figure(run, marks)) if metered else None,
        "fed": _fed(run, description, marks) if run.sources else None,
    }


def _held_out(run: Run, told: Mapping[str, Any], marks: Sequence[PhaseMark]) -> dict[str, Any] | None:
    """Return the evaluations, and the last losses of the run's own weights and of the average by source."""
    evaluations, averages = read_evaluations(run), read_averages(run)
    if not evaluations and not averages:
        return None
    header, rows = held_out_cells(told)
    return {
        "averages": bool(averages),
        "figure": figure_block(held_out_figure(run, evaluations, averages, marks)),
        "header": header,
        "rows": rows,
        "numbers": range(1, len(header)),
    }


def _fed(run: Run, description: Mapping[str, Any] | None, marks: Sequence[PhaseMark]) -> dict[str, Any]:
    bands = [figure_block(bands_figure(run, name, description, marks)) for name in run.scored_sources]
    return {
        "planned": description is not None,
        "figures": [figure_block(sources_figure(run, description, marks)), *bands],
    }


def _lead(run: Run, told: Mapping[str, Any]) -> str:
    lead = f"{run.path}: {len(run.lines):,} log lines, steps {run.lines[0].iteration:,} to {told['steps']:,}"
    if told["learning_rate"] is not None:
        lead += f"; learning rate now {told['learning_rate']:.3g}"
    if told["loss_scale"] is not None:
        lead += f", loss scale {format_count(told['loss_scale'])}"
    return lead


def _cards(told: Mapping[str, Any]) -> list[Card]:
    return [(f"{told['steps']:,}", "steps"), _tokens_card(told), *_other_cards(told)]


def _tokens_card(told: Mapping[str, Any]) -> Card:
    planned, tokens = told["planned_tokens"], told["tokens"]
    if not planned or tokens is None:
        return format_optional(tokens, format_tokens), "tokens"
    share = min(1.0, tokens / planned)
    return format_tokens(tokens), f"tokens, {share:.1%} of {format_tokens(planned)}", "", share


def _other_cards(told: Mapping[str, Any]) -> list[Card]:
    headroom, skipped, lost = told["smallest_headroom"], told["skipped_steps"], told["lines_without_finite_loss"]
    cards: list[Card] = [
        (
            format_optional(told["smoothed_loss"], "{:.4f}".format),
            f"loss, smoothed; last {format_optional(told['loss'], '{:.4f}'.format)}",
            "bad" if lost else "",
        ),
        (
            format_optional(told["tokens_per_second"], format_tokens),
            f"tokens/s, median; {format_duration(told['seconds'])} in all",
        ),
        (f"{skipped:,}", f"skipped steps, {skipped / max(told['steps'], 1):.2%} of all"),
    ]
    if told["smallest_headroom_step"] is not None:
        kind = "good" if headroom is not None and headroom >= 8 else "bad"
        value = format_optional(headroom, format_times)
        cards.append((value, f"smallest FP16 headroom, step {told['smallest_headroom_step']:,}", kind))
    if average := told["held_out_average"]:
        own = told["held_out"] and told["held_out"]["loss"]
        beside = f"held-out loss of the average; {format_optional(own, '{:.4f}'.format)} of the last weights"
        cards.append((format_optional(average["loss"], "{:.4f}".format), beside))
    if told["seconds_left"]:
        cards.append((format_duration(told["seconds_left"]), "left of the plan at this rate"))
    return cards


def _comparison(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row for each run, with the colour of its curves and the losses of its sources."""
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
        rows.append({"name": told["run"], "colour": colour_of(number), "cells": cells})
    return {"header": header, "rows": rows}
