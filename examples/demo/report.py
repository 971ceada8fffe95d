"""The demo's report: read from the files that the stages left, printed with rich."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from stages import StageOutcome
from training_log import LogLine, read_training_log, scale_changes

__all__ = ["print_report"]

_SHOWN_SCALES = 12


def print_report(console: Console, folder: Path, outcomes: Sequence[StageOutcome], peak_bytes: int) -> None:
    """Print what the demo shows.

    Args:
        console: Where to.
        folder: Output of the demo.
        outcomes: How the stages went.
        peak_bytes: Largest resident set of a process that ran now; 0: nothing ran.
    """
    steps = read_training_log(folder / "logs" / "train.log")
    plan = json.loads((folder / "plan.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    console.rule("[bold]Report")
    console.print(_loss_table(evaluation["results"]))
    console.print(_band_table(plan))
    console.print(_scale_table(steps))
    console.print(Text(_training_summary(steps, plan, json.loads((folder / "baseline.json").read_text()))))
    console.print(Text("\nGenerated with the averaged weights:\n", style="bold"))
    console.print(Text((folder / "generated.txt").read_text(encoding="utf-8")), soft_wrap=True)
    console.print(_stage_table(outcomes, peak_bytes))
    console.print(_file_table(folder))


def _loss_table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("weights", title="Held-out loss, nats per token (bits per byte)", title_justify="left")
    for name in results[0]["sources"]:
        table.add_column(name, justify="right")
    labels = ["untrained", f"last (step {results[1]['iteration']})", "average of the last"]
    for label, result in zip(labels, results, strict=True):
        table.add_row(
            label, *(f"{loss['loss']:.3f} ({loss['bits_per_byte']:.3f})" for loss in result["sources"].values())
        )
    return table


def _band_table(plan: dict[str, Any]) -> Table:
    phases = [phase["name"] for phase in plan["phases"]]
    table = Table("source", "quality band", title="Tokens seen per quality band (best first)", title_justify="left")
    for name in [*phases, "all", "times seen"]:
        table.add_column(name, justify="right")
    for name, source in plan["sources"].items():
        for band in reversed(source["bands"]):
            seen = [band["seen"].get(phase, 0) for phase in phases]
            label = f"{band['low']:.0%} to {band['high']:.0%}"
            table.add_row(name, label, *(f"{count:,}" for count in [*seen, sum(seen)]), f"{band['epochs']:.2f}")
        table.add_section()
    return table


def _scale_table(steps: Sequence[LogLine]) -> Table:
    changes = scale_changes(steps)
    table = Table("step", "loss scale", "why", title="Loss-scale history (FP16)", title_justify="left")
    hidden = max(0, len(changes) - _SHOWN_SCALES)
    shown = changes if not hidden else [*changes[: _SHOWN_SCALES // 2], *changes[-(_SHOWN_SCALES // 2) :]]
    for number, change in enumerate(shown):
        if hidden and number == _SHOWN_SCALES // 2:
            table.add_row("...", "...", f"{hidden} more changes")
        table.add_row(str(change.iteration), f"{change.scale:,.0f}", change.reason)
    return table


def _training_summary(steps: Sequence[LogLine], plan: dict[str, Any], baseline: dict[str, Any]) -> str:
    seconds = sum(step.milliseconds for step in steps) / 1000
    losses = [step.loss for step in steps if step.loss is not None]
    skipped = sum(step.skipped for step in steps)
    rate = plan["tokens"] / seconds if seconds else 0.0
    typical = plan["tokens"] / len(steps) * 1000 / statistics.median(step.milliseconds for step in steps)
    return (
        f"{len(steps)} steps, {plan['tokens']:,} tokens in {seconds:.0f} s = {rate:,.0f} tokens/s; "
        f"training loss {losses[0]:.3f} to {losses[-1]:.3f}; {skipped} steps skipped by the loss scaler; "
        f"plan {plan['fingerprint']}.\n"
        f"Median step: {typical:,.0f} tokens/s; of a plain PyTorch GPT of the same shape, {baseline['place']} too: "
        f"{baseline['tokens_per_second']:,.0f} tokens/s (median of {baseline['steps']} steps)."
    )


def _stage_table(outcomes: Sequence[StageOutcome], peak_bytes: int) -> Table:
    table = Table("stage", title="Wall time", title_justify="left")
    table.add_column("seconds", justify="right")
    for outcome in outcomes:
        table.add_row(outcome.name + (" (earlier run)" if outcome.skipped else ""), f"{outcome.seconds:.1f}")
    table.add_section()
    table.add_row("all", f"{sum(outcome.seconds for outcome in outcomes):.1f}")
    if peak_bytes:
        table.add_row("largest process, MiB", f"{peak_bytes / 2**20:,.0f}")
    return table


def _file_table(folder: Path) -> Table:
    described = {
        "corpus/": "documents with scores: two JSONL files, one Parquet file",
        "tokenizer/": "Hugging Face tokenizer",
        "shards/": "Megatron .bin/.idx, score sidecars, manifests, rank indices",
        "plan.yaml": "the plan that was trained on",
        "plan.html": "the plan as plots",
        "checkpoints/": "torch_dist checkpoints of the run",
        "averaged/": "average of the last ones; loads like a checkpoint",
        "tensorboard/": "curves: tensorboard --logdir",
        "evaluation.json": "held-out losses",
        "logs/": "all output of every command",
    }
    table = Table("file", "what", title=f"Files in {folder}", title_justify="left")
    for name, text in described.items():
        table.add_row(name, text)
    return table
