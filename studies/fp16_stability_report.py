"""Table, numbers and plots of `studies/fp16_stability.py`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.quantile.statistics import Estimate

__all__ = ["RunRecord", "draw", "print_over_seeds", "print_table", "write_json"]

COLORS = ("#d62728", "#1f77b4", "#17becf", "#8c564b", "#000000", "#ff7f0e", "#2ca02c", "#9467bd", "#e377c2")
WARM_UP = 100
"""Steps in which a loss scale that started too high is expected to fall."""


@dataclass(frozen=True)
class RunRecord:
    """What one run left."""

    key: str
    name: str
    rate: float
    seed: int
    entries: list[dict[str, Any]]
    """Lines of its `metrics.jsonl`."""

    def before(self, iteration: int) -> list[dict[str, Any]]:
        """Its lines up to a step."""
        return [entry for entry in self.entries if entry["iteration"] <= iteration]


def print_table(records: Sequence[RunRecord]) -> None:
    """One line a run: how far it came, its last losses, its peaks, its skips."""
    table = Table(title="FP16 stability", title_justify="left")
    for name in ("lr", "run", "seed", "steps", "loss, last 50 steps", "to bf16", "skipped", "after warm-up",
                 "last scale", "peak", "where", "headroom"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("run", "where") else "right")
    for record in records:
        if not record.entries:
            table.add_row(f"{record.rate:g}", record.name, str(record.seed), "no line was written; see its log.txt")
            continue
        row = summary(record, records)
        peak = row["peak"]
        table.add_row(
            f"{record.rate:g}", record.name, str(record.seed), str(row["steps"]), _shown(row["loss"], ".4f"),
            _shown(row["to_bf16"], "+.2%"), str(row["skipped"]), str(row["skipped_after_warm_up"]),
            f"{row['last_loss_scale']:g}", _shown(peak, ",.1f"), str(row["where"]),
            "overflow" if peak is None else f"{65504 / peak:,.1f}x" if peak else "-",
        )  # fmt: skip
    Console(width=200).print(table)


def print_over_seeds(records: Sequence[RunRecord]) -> None:
    """One line a variant and rate, where there are several seeds: ranges over them."""
    table = Table(title="Over the seeds: lowest to highest", title_justify="left")
    for name in ("lr", "run", "reached the end", "steps", "loss, last 50 steps", "to bf16", "mean, 95 %", "skipped",
                 "after warm-up", "headroom"):  # fmt: skip
        table.add_column(name, justify="left" if name == "run" else "right")
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for record in records:
        if record.entries:
            groups.setdefault((record.rate, record.name), []).append(summary(record, records))
    if not groups:
        return
    longest = max(row["steps"] for rows in groups.values() for row in rows)
    for (rate, name), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        ended = sum(row["steps"] == longest for row in rows)
        table.add_row(
            f"{rate:g}", name, f"{ended} of {len(rows)}", _range([row["steps"] for row in rows], "d"),
            _range([row["loss"] for row in rows], ".3f"), _range([row["to_bf16"] for row in rows], "+.2%"),
            _mean_with_interval([row["to_bf16"] for row in rows]),
            _range([row["skipped"] for row in rows], "d"), _range([row["skipped_after_warm_up"] for row in rows], "d"),
            _range([65504 / row["peak"] if row["peak"] else None for row in rows], ".3g"),
        )  # fmt: skip
    Console(width=190).print(table)


def _mean_with_interval(values: Sequence[float | None]) -> str:
    """Return the mean over the seeds and half of its 95 % interval (Student's t).

    Nothing where a seed has no value.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values) or len(known) < 2 or not any(known):
        return "-"
    difference = Estimate(mean(known), stdev(known) / math.sqrt(len(known)), len(known) - 1)
    return f"{difference.value:+.2%} ± {difference.half_width(0.95):.2%}"


def _range(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = format(min(known), form), format(max(known), form)
    shown = low if low == high else f"{low} to {high}"
    return shown if len(known) == len(values) else f"{shown}; {len(values) - len(known)} without"


def summary(record: RunRecord, records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return a run in numbers.

    None where a number would not be finite, or where there is nothing to compare with.
    """
    peak, where = worst_activation(record.entries)
    return {
        "key": record.key,
        "run": record.name,
        "lr": record.rate,
        "seed": record.seed,
        "steps": record.entries[-1]["iteration"],
        "loss": last_loss(record.entries),
        "to_bf16": _to_bf16(record, records),
        "skipped": sum(entry["skipped_steps"] for entry in record.entries),
        "skipped_after_warm_up": sum(e["skipped_steps"] for e in record.entries if e["iteration"] > WARM_UP),
        "last_loss_scale": record.entries[-1]["loss_scale"],
        "peak": peak,
        "where": where,
        "overflow_step": next((e["iteration"] for e in record.entries if worst_activation([e])[0] is None), None),
    }


def last_loss(entries: Sequence[dict[str, Any]]) -> float | None:
    """Return the mean of the last five lines, None if one of them has no finite loss."""
    losses = [entry["loss"] for entry in entries[-5:]]
    return None if None in losses or not losses else mean(losses)


def _to_bf16(record: RunRecord, records: Sequence[RunRecord]) -> float | None:
    """Relative difference of the last losses to bf16's, at the last step that both runs reached."""
    for other in records:
        if (other.key, other.rate, other.seed) == ("bf16", record.rate, record.seed) and other.entries:
            last = min(record.entries[-1]["iteration"], other.entries[-1]["iteration"])
            ours, theirs = last_loss(record.before(last)), last_loss(other.before(last))
            return None if ours is None or theirs is None else ours / theirs - 1
    return None


def worst_activation(entries: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
    """Return the largest peak of all readings and its place.

    Of an overflow None and the first place, as computed.
    """
    largest = (0.0, "-")
    for entry in entries:
        for name, value in entry.get("activations", {}).items():
            if value is None:  # not finite
                return None, name
            largest = max(largest, (value, name))
    return largest


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def write_json(records: Sequence[RunRecord], path: Path) -> None:
    """Summaries and curves of all runs."""
    runs = [
        summary(record, records) | {
            "iterations": [entry["iteration"] for entry in record.entries],
            "losses": [entry["loss"] for entry in record.entries],
            "loss_scales": [entry["loss_scale"] for entry in record.entries],
            "peaks": [[entry["iteration"], *worst_activation([entry])] for entry in _metered(record)],
        }
        for record in records
        if record.entries
    ]  # fmt: skip
    write_text_atomically(path, json.dumps(runs, indent=1) + "\n")


def _metered(record: RunRecord) -> list[dict[str, Any]]:
    return [entry for entry in record.entries if entry.get("activations")]


def draw(records: Sequence[RunRecord], page: Path, picture: Path | None) -> None:
    """Loss, largest activation and loss scale over the steps, one column a learning rate, one colour a variant."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from benchmarks.plot_image import write_png

    rates = sorted({record.rate for record in records})
    keys = list(dict.fromkeys(record.key for record in records))
    titles = [f"{what}, lr {rate:g}" for what in ("loss", "largest |activation|", "loss scale") for rate in rates]
    figure = make_subplots(rows=3, cols=len(rates), subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.07)
    named: set[str] = set()
    for record in records:
        style = {"color": COLORS[keys.index(record.key) % len(COLORS)], "width": 1.5}
        for row, (x, y) in enumerate(_curves(record), 1):
            line = go.Scatter(
                x=x, y=y, name=record.name, legendgroup=record.key, line=style, showlegend=record.key not in named
            )
            named.add(record.key)
            figure.add_trace(line, row=row, col=rates.index(record.rate) + 1)
    for row in (2, 3):
        figure.update_yaxes(type="log", row=row)
    figure.update_layout(height=900, width=700 * len(rates), template="plotly_white", title="FP16 stability")
    figure.update_xaxes(title_text="step", row=3)
    page.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(page, include_plotlyjs=True)
    print(page)
    if picture:
        write_png(figure, picture, 400 + 500 * len(rates), 900)


def _curves(record: RunRecord) -> list[tuple[list[int], list[float | None]]]:
    steps = [entry["iteration"] for entry in record.entries]
    metered = _metered(record)
    return [
        (steps, [entry["loss"] for entry in record.entries]),
        ([entry["iteration"] for entry in metered], [worst_activation([entry])[0] for entry in metered]),
        (steps, [entry["loss_scale"] for entry in record.entries]),
    ]
