#!/usr/bin/env python3
"""Training throughput of the Kaiyuan-2B shape on one GPU: stock Megatron-Core and ours, through the real entry point.

    python benchmarks/training_throughput.py --rows all

Each row is `examples/pretrain_kaiyuan_2b.sh` in a process of its own, with real tokens from shards, 16 sequences of
4096 tokens a step. Tokens a second are the median of the steps after the first four. MFU counts 6 operations a
parameter and token less the input embedding, plus causal attention at half, against the 989 TFLOP/s of the data sheet.
Stock rows are Megatron's model without QK-norm, sandwich norm and soft-cap. Memory is torch's peak of allocated bytes.
Rows that cannot run are named with their error. `--profile` adds where the time of a step of one row goes.
"""

import argparse
import gzip
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES, SEQ_LENGTH = 16, 4096
PEAK_FLOPS = 989e12
LIMIT_SECONDS = 110
LAYERS, HIDDEN, VOCABULARY, PARAMETERS = 28, 2048, 151_936, 2_031_739_904
FLOPS_PER_TOKEN = 6 * (PARAMETERS - VOCABULARY * HIDDEN) + 12 * LAYERS * HIDDEN * SEQ_LENGTH / 2
LOCAL = ("--transformer-impl", "local")
# The last word on a flag wins; --qk-layernorm has no opposite, so the script leaves its three features to
# MODEL_FEATURES.
STOCK = {"MODEL_FEATURES": ""}
UNFUSED = ("--kaiyuan-fusions", "none", "--no-gradient-accumulation-fusion")
NATIVE_LOSS = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native")
BF16 = {"PRECISION": "bf16"}
STEP = re.compile(
    r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: ([\d.E+-]+).*loss scale: ([\d.]+)"
    r".*number of skipped iterations: +(\d+)"
)
MEMORY = re.compile(r"max allocated: ([\d.]+)")


@dataclass(frozen=True)
class Row:
    """One configuration."""

    key: str
    name: str
    flags: tuple[str, ...] = LOCAL
    environment: dict[str, str] = field(default_factory=dict)
    micro_batch: int = 4


def without(fusion: str) -> tuple[str, ...]:
    """Flags of ours with one fusion left out."""
    return (
        *LOCAL,
        "--kaiyuan-fusions",
        ",".join(name for name in ("norm", "rotary", "swiglu", "loss") if name != fusion),
    )


ROWS = (
    Row("stock", "stock, local, SDPA, native loss fusion, bf16", LOCAL + UNFUSED + NATIVE_LOSS, STOCK | BF16),
    Row("stock16", "the same, FP16", LOCAL + UNFUSED + NATIVE_LOSS, STOCK),
    Row("ours", "ours, local, FP16"),
    Row("oursbf", "ours, local, bf16", LOCAL, BF16),
    Row("unfused", "ours, local, FP16, no fusion at all", LOCAL + UNFUSED),
    *(
        Row(f"no{name}", f"ours, local, FP16, without the fusion {name}", without(name))
        for name in ("norm", "rotary", "swiglu", "loss")
    ),
    Row("nowgrad", "ours, local, FP16, weight gradients unfused", (*LOCAL, "--no-gradient-accumulation-fusion")),
    *(Row(f"mb{size}", f"ours, local, FP16, micro-batch {size}", micro_batch=size) for size in (1, 2, 8, 16)),
    Row("testock", "stock, Transformer Engine, native loss fusion, bf16", UNFUSED + NATIVE_LOSS, STOCK | BF16),
    Row("te", "ours, Transformer Engine, FP16", ()),
    Row("tebf", "ours, Transformer Engine, bf16", (), BF16),
    Row(
        "naive",
        "stock, local, unfused attention, bf16",
        LOCAL + UNFUSED + ("--kaiyuan-attention", "unfused"),
        STOCK | BF16,
        1,
    ),
)


def main() -> int:
    """Run the rows and print the table; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks/one_gpu_plan.yaml")
    parser.add_argument(
        "--rows", default="stock,ours", help=f"all, or keys joined by commas: {', '.join(row.key for row in ROWS)}"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", metavar="KEY", help="also profile two steps of this row")
    parser.add_argument("--logs", type=Path, default=Path("runs/throughput"), help="folder for logs and results.json")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in ROWS if args.rows == "all" or row.key in args.rows.split(",")]
    results = []
    for row in chosen:
        results.append(run(row, args.plan, args.steps, args.logs))
        print(json.dumps(results[-1]), flush=True)
        (args.logs / "results.json").write_text(json.dumps(results, indent=2))
    print_table(results)
    if args.profile:
        [row] = [row for row in ROWS if row.key == args.profile]
        run(row, args.plan, 8, args.logs, PROFILE)
        print_profile(args.logs / row.key / "torch_profile" / "rank-0.json.gz", steps=2)
    return int(any("error" in result for result in results))


PROFILE = (
    "--profile",
    "--use-pytorch-profiler",
    "--profile-step-start",
    "5",
    "--profile-step-end",
    "7",
    "--profile-ranks",
    "0",
)


def run(row: Row, plan: Path, steps: int, logs: Path, extra: tuple[str, ...] = ()) -> dict[str, object]:
    """Train one configuration and read its log."""
    command = [
        "bash", str(ROOT / "examples/pretrain_kaiyuan_2b.sh"),
        "--global-batch-size", str(SEQUENCES), "--micro-batch-size", str(row.micro_batch),
        "--exit-interval", str(steps), "--log-interval", "1",
        "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY - 1),
        "--save", "", "--load", "", "--eval-iters", "0",
        *row.flags, *extra,
    ]  # fmt: skip
    environment = os.environ | {"NPROC_PER_NODE": "1", "PLAN": str(plan), "RUN": str(logs / row.key)} | row.environment
    environment |= {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    log = logs / f"{row.key}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # every process writes where it stands
            time.sleep(5)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"key": row.key, "name": row.name} | read_log(log.read_text())


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
    """The table that docs/benchmarks.md shows; ratios are to the first row."""
    table = Table(title="Kaiyuan-2B shape, one GPU, 16 x 4096 tokens a step", title_justify="left")
    for name in ("run", "tokens/s", "ratio", "MFU", "peak GiB", "loss first", "last", "skipped"):
        table.add_column(name, justify="left" if name == "run" else "right")
    first = results[0].get("tokens_per_second", float("nan"))
    for result in results:
        if "error" in result:
            table.add_row(str(result["name"]), str(result["error"]))
            continue
        table.add_row(
            str(result["name"]), f"{result['tokens_per_second']:,.0f}",
            f"{float(str(result['tokens_per_second'])) / float(str(first)):.2f}",
            f"{result['mfu']:.1%}", f"{result['peak_gib']:.1f}", f"{result['first_loss']:.3f}",
            f"{result['last_loss']:.3f}", str(result["skipped"]),
        )  # fmt: skip
    Console(width=130).print(table)


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


if __name__ == "__main__":
    sys.exit(main())
