"""The headline of a run as plain data, what is worth a remark, and the table for the terminal."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.table import Table

from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.run_curves import half_life, smoothed
from megatron_kaiyuan.reporting.run_data_figures import cumulative_bands, cumulative_tokens
from megatron_kaiyuan.reporting.run_expected import expected_band_tokens, expected_tokens
from megatron_kaiyuan.reporting.run_held_out import last_held_out, spell_average
from megatron_kaiyuan.reporting.run_metrics import Run

__all__ = [
    "HELD_OUT_COLUMNS",
    "format_duration",
    "format_optional",
    "format_times",
    "held_out_cells",
    "print_summaries",
    "summarize",
]

HELD_OUT_COLUMNS = {"held_out": "held-out loss", "held_out_average": "of the average"}
"""Headings in a table of runs, by the key of a summary."""


def summarize(run: Run, description: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return everything of `tools/report_run.py --json` for one run.

    Ready for JSON, so null stands for what is not finite or unknown.
    """
    last = run.lines[-1]
    rates = [rate for line in run.lines if (rate := line.tokens_per_second) is not None]
    rate = statistics.median(rates) if rates else None
    headrooms = [(line.headroom, line.iteration) for line in run.lines if line.headroom is not None]
    least = min(headrooms, default=None)
    planned = None if description is None else description["tokens"]
    left = None if planned is None else max(0, planned - run.tokens_at(last))
    return {
        "run": run.name,
        "metrics": str(run.path),
        "lines": len(run.lines),
        "steps": last.iteration,
        "samples": last.consumed_samples,
        "tokens": run.tokens_at(last) if run.seq_length else None,
        "planned_tokens": planned,
        "loss": last.loss,
        "smoothed_loss": smoothed([line.loss for line in run.lines], half_life(len(run.lines)))[-1],
        "learning_rate": last.learning_rate,
        "loss_scale": last.loss_scale,
        "tokens_per_second": rate,
        "seconds": sum(line.seconds for line in run.lines),
        "seconds_left": None if left is None or not rate else left / rate,
        "skipped_steps": sum(line.skipped_steps for line in run.lines),
        "lines_without_finite_loss": sum(line.loss is None for line in run.lines),
        "smallest_headroom": least[0] if least and math.isfinite(least[0]) else None,
        "smallest_headroom_step": least[1] if least else None,
        "torn_lines": run.torn_lines,
        "restarts": [{"first_step": first, "had_been_at": before} for first, before in run.restarts],
        "sources": {name: _summarize_source(run, name, description) for name in run.sources},
        **last_held_out(run),
        "remarks": _remarks(run, description),
    }


def _summarize_source(run: Run, name: str, description: Mapping[str, Any] | None) -> dict[str, Any]:
    consumed = run.lines[-1].consumed_samples
    losses = [line.sources[name].loss if name in line.sources else None for line in run.lines]
    known = [loss for loss in smoothed(losses, half_life(len(losses))) if loss is not None]
    told: dict[str, Any] = {
        "tokens": cumulative_tokens(run, name)[-1],
        "smoothed_loss": known[-1] if known else None,
        "bands": [row[-1] for row in cumulative_bands(run, name)] if name in run.scored_sources else None,
    }
    if description is not None:
        told["expected_tokens"] = round(expected_tokens(description, name, consumed))
        if name in run.scored_sources:
            told["expected_bands"] = [round(count) for count in expected_band_tokens(description, name, consumed)]
    return told


def _remarks(run: Run, description: Mapping[str, Any] | None) -> list[str]:
    """What a person should know before they trust the curves."""
    remarks = []
    lost = [line.iteration for line in run.lines if line.loss is None]
    if lost:
        remarks.append(f"{_count(len(lost), 'line')} without a finite loss, the first at step {lost[0]:,}")
    overflowed = [line for line in run.lines if line.headroom == 0.0]
    if overflowed:
        first = overflowed[0]
        name = next(tensor for tensor, peak in first.activations.items() if peak is None)
        remarks.append(
            f"activations were not finite at {_count(len(overflowed), 'reading')}, first in {name} at step "
            f"{first.iteration:,}"
        )
    for first_step, before in run.restarts:
        remarks.append(
            f"the run resumed from an older checkpoint: steps {first_step:,} to {before:,} were trained again "
            "and are shown as they were the second time"
        )
    if run.torn_lines:
        remarks.append(f"{_count(run.torn_lines, 'line')} of the file could not be read (torn by a crash); left out")
    if uncounted := _uncounted_tokens(run):
        remarks.append(
            f"{format_tokens(uncounted)} tokens are in no line: a checkpoint between two log lines was resumed; the "
            "sums by source lack them"
        )
    if not run.sources:
        remarks.append("no tokens by source: the run was trained without --plan")
    if description is not None and run.lines[-1].consumed_samples > description["samples"]:
        remarks.append(
            f"the run has consumed {counted(run.lines[-1].consumed_samples, 'sample')}, the plan ends at "
            f"{description['samples']:,}: expected tokens stop there"
        )
    return remarks


def _uncounted_tokens(run: Run) -> int:
    length = run.seq_length or 0
    first = run.lines[0]
    missing = first.consumed_samples * length - first.tokens
    return missing + sum(
        (line.consumed_samples - before.consumed_samples) * length - line.tokens for before, line in pairwise(run.lines)
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def print_summaries(summaries: Sequence[Mapping[str, Any]]) -> None:
    """A row for each run, and the sources of a single run, on stdout."""
    console = SafeConsole()
    if not console.is_terminal:
        console = SafeConsole(width=140)
    table = Table(title="Runs" if len(summaries) > 1 else None, title_justify="left")
    table.add_column("run")
    held_out = [name for name in HELD_OUT_COLUMNS if any(told[name] for told in summaries)]
    names = ("steps", "tokens", "loss", *(HELD_OUT_COLUMNS[name] for name in held_out))
    for name in (*names, "tokens/s", "skipped", "FP16 headroom", "time left"):
        table.add_column(name, justify="right")
    for told in summaries:
        table.add_row(
            told["run"],
            f"{told['steps']:,}",
            format_optional(told["tokens"], format_tokens),
            format_optional(told["smoothed_loss"], "{:.4f}".format),
            *(format_optional(told[name] and told[name]["loss"], "{:.4f}".format) for name in held_out),
            format_optional(told["tokens_per_second"], format_tokens),
            f"{told['skipped_steps']:,}",
            format_optional(told["smallest_headroom"], format_times),
            format_optional(told["seconds_left"] or None, format_duration),
        )
    console.print(table)
    if len(summaries) == 1 and summaries[0]["sources"]:
        console.print(_sources_table(summaries[0]["sources"]))
    if len(summaries) == 1 and (summaries[0]["held_out"] or summaries[0]["held_out_average"]):
        console.print(_held_out_table(summaries[0]))
    for told in summaries:
        for remark in told["remarks"]:
            console.print(f"{told['run']}: {remark}", style="yellow", markup=False, highlight=False)


def held_out_cells(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of the last held-out losses: of the run's own weights, and of the average."""
    own, average = told["held_out"], told["held_out_average"]
    found = [(f"step {own['step']:,}", own)] if own else []
    found += [(spell_average(average["averaged"]), average)] if average else []
    names = list(dict.fromkeys(name for _, entry in found for name in entry["sources"]))
    losses = [[entry["loss"], *(entry["sources"].get(name) for name in names)] for _, entry in found]
    cells = [[format_optional(loss, "{:.4f}".format) for loss in row] for row in losses]
    return ["held-out loss of", "all", *names], [[label, *row] for (label, _), row in zip(found, cells, strict=True)]


def _held_out_table(told: Mapping[str, Any]) -> Table:
    header, rows = held_out_cells(told)
    table = Table(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _sources_table(sources: Mapping[str, Mapping[str, Any]]) -> Table:
    planned = any("expected_tokens" in told for told in sources.values())
    total = sum(told["tokens"] for told in sources.values()) or 1
    table = Table()
    table.add_column("source")
    for name in ("loss", "tokens", "share", *(("expected",) if planned else ())):
        table.add_column(name, justify="right")
    for name, told in sources.items():
        cells = [
            format_optional(told["smoothed_loss"], "{:.4f}".format),
            format_tokens(told["tokens"]),
            f"{told['tokens'] / total:.1%}",
        ]
        table.add_row(name, *cells, *((format_tokens(told["expected_tokens"]),) if planned else ()))
    return table


def format_optional(value: Any, spell: Any) -> str:
    """A dash for what is unknown."""
    return "-" if value is None else str(spell(value))


def format_times(ratio: float) -> str:
    """Return a ratio for people: `4,720 x`, `31.2 x`, `2.41 x`, and `overflow` for 0."""
    if ratio <= 0:
        return "overflow"
    places = 2 - math.floor(math.log10(ratio))
    return f"{round(ratio, places):,.{max(0, places)}f} x"


def format_duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}" if unit != "min" else f"{seconds / size:.0f} min"
    return f"{seconds:.0f} s"
