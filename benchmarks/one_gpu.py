#!/usr/bin/env python3
"""The Kaiyuan-2B shape on one GPU through the real entry point, with real tokens: speed, memory, loss, loss scale.

    python benchmarks/one_gpu.py --plan benchmarks/one_gpu_plan.yaml --steps 24

Each row is `examples/pretrain_kaiyuan_2b.sh` for so many steps of 16 sequences of 4096 tokens, in micro-batches of
4 and a process of its own; tokens a second are the median of the steps after the first four. MFU counts 6
operations a parameter and token less the input embedding, plus causal attention at half, against the 989 TFLOP/s of
the data sheet. Rows that cannot run here (no Transformer Engine, say) are named with their error.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES, SEQ_LENGTH = 16, 4096
PEAK_FLOPS = 989e12
LAYERS, HIDDEN, VOCABULARY, PARAMETERS = 28, 2048, 151_936, 2_031_739_904
FLOPS_PER_TOKEN = 6 * (PARAMETERS - VOCABULARY * HIDDEN) + 12 * LAYERS * HIDDEN * SEQ_LENGTH / 2
STOCK = ("--no-kaiyuan-sandwich-norm", "--kaiyuan-logit-softcap", "0")
LOCAL = ("--transformer-impl", "local")
STEP = re.compile(
    r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: ([\d.E+-]+).*loss scale: ([\d.]+)"
    r".*number of skipped iterations: +(\d+)"
)
MEMORY = re.compile(r"max allocated: ([\d.]+)")


@dataclass(frozen=True)
class Row:
    """One configuration."""

    name: str
    flags: tuple[str, ...]


ROWS = (
    Row("ours, local", LOCAL),
    Row("ours, Transformer Engine", ()),
    Row("soft-cap and sandwich norm off, Transformer Engine", STOCK),
)


def main() -> int:
    """Run all rows and print the table; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks/one_gpu_plan.yaml")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--logs", type=Path, default=Path("runs/one_gpu"), help="folder for logs and one_gpu.json")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    results = [run(row, number, args.plan, args.steps, args.logs) for number, row in enumerate(ROWS)]
    (args.logs / "one_gpu.json").write_text(json.dumps(results, indent=2))
    print_table(results)
    return int(any("error" in result for result in results))


def run(row: Row, number: int, plan: Path, steps: int, logs: Path) -> dict[str, object]:
    """Train one configuration and read its log."""
    command = [
        "bash", str(ROOT / "examples/pretrain_kaiyuan_2b.sh"),
        "--global-batch-size", str(SEQUENCES), "--exit-interval", str(steps), "--log-interval", "1",
        "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY - 1),
        "--save", "", "--load", "", "--eval-iters", "0",
        *row.flags,
    ]  # fmt: skip
    environment = os.environ | {"NPROC_PER_NODE": "1", "PLAN": str(plan), "RUN": str(logs / f"run{number}")}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (logs / f"row{number}.log").write_text(finished.stdout + finished.stderr)
    return {"name": row.name} | read_log(finished.stdout + finished.stderr)


def read_log(log: str) -> dict[str, object]:
    """Medians and last values of a training log."""
    found = STEP.findall(log)
    if len(found) < 6:
        lines = [line for line in log.splitlines() if "Error" in line]
        return {"error": (lines or ["no steps in the log"])[-1][:160]}
    milliseconds = statistics.median(float(step[1]) for step in found[4:])
    tokens = SEQUENCES * SEQ_LENGTH / milliseconds * 1000
    memory = [float(value) for value in MEMORY.findall(log)]
    return {
        "tokens_per_second": tokens,
        "mfu": tokens * FLOPS_PER_TOKEN / PEAK_FLOPS,
        "peak_gib": max(memory, default=0) / 1024,
        "first_loss": float(found[0][2]),
        "last_loss": float(found[-1][2]),
        "last_loss_scale": float(found[-1][3]),
        "skipped": int(found[-1][4]),
        "steps": len(found),
    }


def print_table(results: list[dict[str, object]]) -> None:
    """The table that docs/benchmarks.md shows."""
    table = Table(title="Kaiyuan-2B shape in FP16, one GPU, micro-batch 4 x 4", title_justify="left")
    for name in ("run", "tokens/s", "MFU", "peak GiB", "loss first", "last", "loss scale", "skipped"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for result in results:
        if "error" in result:
            table.add_row(str(result["name"]), str(result["error"]))
            continue
        table.add_row(
            str(result["name"]), f"{result['tokens_per_second']:,.0f}",
            f"{result['mfu']:.1%}", f"{result['peak_gib']:.1f}", f"{result['first_loss']:.3f}",
            f"{result['last_loss']:.3f}", f"{result['last_loss_scale']:,.0f}", str(result["skipped"]),
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
