"""Numbers of the rows of `benchmarks/training_throughput.py`, from their logs, and its tables."""

import gzip
import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.scaling_jobs import reason_in
from benchmarks.throughput_rows import PEAK_FLOPS, Size
from megatron_kaiyuan.monitoring.metrics_file import read_metrics

__all__ = ["OUT_OF_MEMORY", "is_unfinished", "monitor_cost", "print_profile", "print_table", "read_row"]

STEP = re.compile(
    r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: ([\d.E+-]+).*loss scale: ([\d.]+)"
)
MEMORY = re.compile(r"max allocated: ([\d.]+)")
WAITING = re.compile(r"batch-generator \.*: \([\d.]+, ([\d.]+)\)")
WARM_UP = 4
FEWEST_STEPS = 6
OUT_OF_MEMORY = "out of memory"
MONITOR_INTERVAL = 100
"""Default of --kaiyuan-activation-interval."""


def read_row(log: Path, metrics: Path, size: Size) -> dict[str, Any]:
    """Medians and last values of a training run, or why there are none."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = STEP.findall(text)  # a step that was skipped logs no loss
    if len(found) < FEWEST_STEPS:
        return {"error": _reason(log, text)}
    milliseconds = statistics.median(float(step[1]) for step in found if int(step[0]) > WARM_UP)
    tokens = size.sequences * size.seq_length / milliseconds * 1000
    memory = [float(value) for value in MEMORY.findall(text)]
    waits = [float(value) for value in WAITING.findall(text)][WARM_UP:]
    return {
        "tokens_per_second": tokens,
        "milliseconds": milliseconds,
        "mfu": tokens * size.flops_per_token / PEAK_FLOPS,
        # After every step: where the first ones are skipped, Adam's state comes later.
        "peak_gib": max(memory, default=0) / 1024,
        "data_share": statistics.median(waits) / milliseconds if waits else None,
        "first_loss": float(found[0][2]),
        "last_loss": float(found[-1][2]),
        "last_loss_scale": float(found[-1][3]),
        # Megatron's log reports a skip at the first step twice.
        "skipped": sum(entry["skipped_steps"] for entry in read_metrics(metrics)),
        "steps": len(found),
    }


def _reason(log: Path, text: str) -> str:
    if "OutOfMemoryError" in text or "CUDA out of memory" in text:
        return OUT_OF_MEMORY
    return reason_in(log) or "no steps in the log"


def is_unfinished(result: Mapping[str, Any]) -> bool:
    """Return whether a row is worth another try.

    That it does not fit the memory is a result.
    """
    return "error" in result and result["error"] != OUT_OF_MEMORY


def print_table(results: Sequence[Mapping[str, Any]], size: Size, device: str) -> None:
    """Print the table that docs/benchmarks.md shows.

    Ratios are to the first row.
    """
    title = f"{size.parameters:,} parameters, {device}, {size.sequences} x {size.seq_length} tokens a step"
    table = Table(title=title, title_justify="left")
    left = ("run", "optimizer")
    for name in (
        *("run", "micro-batch", "optimizer", "tokens/s", "ratio", "MFU", "peak GiB", "memory", "data"),
        *("loss first", "last", "skipped"),
    ):
        table.add_column(name, justify="left" if name in left else "right")
    for result in results:
        told = (str(result["name"]), str(result["micro_batch"]), _short(result["optimizer"]))
        if "error" in result:
            table.add_row(*told, "-" if is_unfinished(result) else str(result["error"]))
            continue
        share = result["data_share"]
        table.add_row(
            *told, f"{result['tokens_per_second']:,.0f}", _ratio(result, results[0], "tokens_per_second"),
            f"{result['mfu']:.1%}", f"{result['peak_gib']:.1f}", _ratio(result, results[0], "peak_gib"),
            f"{share:.2%}" if share is not None else "", f"{result['first_loss']:.3f}", f"{result['last_loss']:.3f}",
            str(result["skipped"]),
        )  # fmt: skip
    console = Console(width=180)
    console.print(table)
    failed = [f"{result['key']}: {result['error']}" for result in results if is_unfinished(result)]
    for line in (*failed, *monitor_cost(results), "Ratios (speed, memory) are to the first row.", size.formula()):
        console.print(line, highlight=False, markup=False)


def _short(optimizer: object) -> str:
    """`torch AdamW` of `torch.optim.adamw.AdamW`."""
    parts = str(optimizer).split(".")
    return f"{parts[0]} {parts[-1]}" if len(parts) > 1 else parts[0]


def _ratio(result: Mapping[str, Any], first: Mapping[str, Any], key: str) -> str:
    ours, theirs = float(str(result[key])), float(str(first.get(key, 0)))
    return f"{ours / theirs:.2f}" if theirs else "-"


def monitor_cost(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What metering activations at every hundredth step costs, from metering at every step and never."""
    found = {result["key"]: result["milliseconds"] for result in results if "milliseconds" in result}
    if not {"monitor1", "nomonitor"} <= found.keys():
        return []
    metered = found["monitor1"] - found["nomonitor"]
    share = metered / MONITOR_INTERVAL / found["nomonitor"]
    return [
        f"Monitor: a metered step takes {metered:+.1f} ms; at the default interval of {MONITOR_INTERVAL} steps that is "
        f"{metered / MONITOR_INTERVAL:+.3f} ms a step, {share:+.3%}."
    ]


PARTS = (
    ("attention", ("fmha", "cudnn_generated", "flash", "sdpa", "attention")),
    ("loss kernels", ("_statistics", "_gradient")),
    ("norm kernels", ("_forward", "_backward", "rms", "norm")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "sm90_")),
    ("optimizer", ("adam", "multi_tensor")),
    ("copies and sets", ("memcpy", "memset", "copy")),
)


def print_profile(trace: Path, steps: int) -> None:
    """Milliseconds a step by part, then the kernels that take most."""
    with gzip.open(trace, "rt") as file:
        events = [
            event
            for event in json.load(file)["traceEvents"]
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
    parts: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in events:
        name = event["name"]
        part = next(
            (part for part, words in PARTS if any(word in name.lower() for word in words)), "elementwise and others"
        )
        parts[part] += event["dur"] / 1000 / steps
        kernels[name[:100]] += event["dur"] / 1000 / steps
    table = Table(title=f"GPU time a step, {sum(parts.values()):,.0f} ms", title_justify="left")
    table.add_column("part")
    table.add_column("ms", justify="right")
    for name, milliseconds in [*parts.most_common(), ("", 0.0), *kernels.most_common(28)]:
        table.add_row(name, f"{milliseconds:,.1f}")
    Console(width=130).print(table)
