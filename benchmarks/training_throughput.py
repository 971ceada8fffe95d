#!/usr/bin/env python3
"""Training throughput of the Kaiyuan-2B shape on one GPU: stock Megatron-Core and ours, through the real entry point.

    python benchmarks/training_throughput.py --rows core --limit 560       # or fusions, micro, te, all, or keys
    python benchmarks/training_throughput.py --smoke --rows core           # a tiny shape, invented text, any CPU

Each row is `examples/pretrain_kaiyuan_2b.sh` in a process of its own, with real tokens from shards, 16 sequences of
4096 tokens a step. Tokens a second are the median of the steps after the first four. The formula of MFU is printed
under the table. Stock rows are Megatron's model without QK-norm, sandwich norm and soft-cap. Memory is torch's peak of
allocated bytes. Rows that cannot run are named with their error. "Data" is the time that the training loop waits for
batches, Megatron's timer `batch-generator`, over the time of the step; only that row has timers, which synchronise.
`--profile` adds where the time of a step of one row goes.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PEAK_FLOPS = 989e12
LIMIT_SECONDS = 110
LOCAL = ("--transformer-impl", "local")
# The last word on a flag wins; --qk-layernorm has no opposite, so the script leaves its three features to
# MODEL_FEATURES.
STOCK = {"MODEL_FEATURES": ""}
UNFUSED = ("--kaiyuan-fusions", "none", "--no-gradient-accumulation-fusion")
NATIVE_LOSS = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native")
TORCH_ORDER = ("--kaiyuan-attention", "sdpa-torch-order")
BF16 = {"PRECISION": "bf16"}
TIMERS = ("--timing-log-level", "2")
STEP = re.compile(
    r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: ([\d.E+-]+).*loss scale: ([\d.]+)"
)
SKIPPED = re.compile(r"number of skipped iterations: +(\d+)")  # a step that was skipped logs no loss
MEMORY = re.compile(r"max allocated: ([\d.]+)")
WAITING = re.compile(r"batch-generator \.*: \([\d.]+, ([\d.]+)\)")


@dataclass(frozen=True)
class Size:
    """What is trained, in the numbers that the rates are computed from."""

    sequences: int = 16
    seq_length: int = 4096
    layers: int = 28
    hidden: int = 2048
    vocabulary: int = 151_936
    parameters: int = 2_031_739_904
    flags: tuple[str, ...] = ()
    """Of the script, where they differ from its own."""

    @property
    def flops_per_token(self) -> float:
        """Operations that the formula counts for a token, forward and backward."""
        of_matrices = 6 * (self.parameters - self.vocabulary * self.hidden)
        return of_matrices + 12 * self.layers * self.hidden * self.seq_length / 2

    def formula(self) -> str:
        """What MFU counts, with its numbers."""
        return (
            f"MFU: tokens/s x FLOP a token / {PEAK_FLOPS / 1e12:.0f} TFLOP/s (data sheet, dense FP16 or bf16).\n"
            "FLOP a token = 6 (P - V h) + 12 L h s / 2 = "
            f"6 ({self.parameters:,} - {self.vocabulary:,} x {self.hidden:,})"
            f" + 12 x {self.layers} x {self.hidden:,} x {self.seq_length:,} / 2 = {self.flops_per_token / 1e9:.4g} G:\n"
            "all matrix products without the input embedding, and causal attention at half; no recomputation."
        )


KAIYUAN = Size()
TINY = Size(
    sequences=16, seq_length=64, layers=2, hidden=64, vocabulary=256, parameters=131_456,
    flags=(
        "--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "192", "--num-attention-heads", "4",
        "--num-query-groups", "2", "--kv-channels", "16", "--seq-length", "64", "--max-position-embeddings", "64",
        "--padded-vocab-size", "256", "--distributed-backend", "gloo", "--no-masked-softmax-fusion",
        "--no-bias-swiglu-fusion", "--no-rope-fusion", "--no-gradient-accumulation-fusion",
    ),
)  # fmt: skip
"""For `--smoke`."""


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
    left = ",".join(name for name in ("norm", "rotary", "swiglu", "loss") if name != fusion)
    return (*LOCAL, "--kaiyuan-fusions", left)


STOCK_LOCAL = LOCAL + UNFUSED + NATIVE_LOSS
GROUPS = {
    "core": (
        Row("stocktorch", "stock, local, SDPA in torch's order, bf16", STOCK_LOCAL + TORCH_ORDER, STOCK | BF16),
        Row("stock", "stock, local, SDPA in our order, bf16", STOCK_LOCAL, STOCK | BF16),
        Row("ours", "ours, local, FP16"),
        Row("data", "ours, with timers", (*LOCAL, *TIMERS)),
        Row("scaled", "ours, branches scaled by 2^-4", (*LOCAL, "--kaiyuan-branch-scale-bits", "4")),
        Row("nomonitor", "ours, activations never metered", (*LOCAL, "--kaiyuan-activation-interval", "0")),
        Row("monitor1", "ours, activations metered at every step", (*LOCAL, "--kaiyuan-activation-interval", "1")),
        Row("oursbf", "ours, local, bf16", LOCAL, BF16),
        Row("stock16", "stock, local, SDPA in our order, FP16", STOCK_LOCAL, STOCK),
    ),
    "fusions": (
        *(Row(f"no{name}", f"ours, without the fusion {name}", without(name)) for name in
          ("norm", "rotary", "swiglu", "loss")),
        Row("nowgrad", "ours, weight gradients unfused", (*LOCAL, "--no-gradient-accumulation-fusion")),
        Row("torchorder", "ours, SDPA in torch's order", LOCAL + TORCH_ORDER),
        Row("unfused", "ours, no fusion at all", LOCAL + UNFUSED),
    ),
    "micro": (
        *(Row(f"mb{size}", f"ours, micro-batch {size}", micro_batch=size) for size in (1, 2, 8, 16)),
        *(Row(f"stockmb{size}", f"stock in torch's order, bf16, micro-batch {size}", STOCK_LOCAL + TORCH_ORDER,
              STOCK | BF16, size) for size in (1, 2)),
    ),
    "te": (
        Row("testock", "stock, Transformer Engine, native loss fusion, bf16", UNFUSED + NATIVE_LOSS, STOCK | BF16),
        Row("te", "ours, Transformer Engine, FP16", ()),
        Row("tescaled", "ours, TE, branches scaled by 2^-4", ("--kaiyuan-branch-scale-bits", "4")),
        Row("tebf", "ours, Transformer Engine, bf16", (), BF16),
    ),
    "naive": (
        Row("naive", "stock, local, unfused attention, bf16",
            LOCAL + UNFUSED + ("--kaiyuan-attention", "unfused"), STOCK | BF16, 1),
    ),
}  # fmt: skip
ROWS = tuple(row for group in GROUPS.values() for row in group)


def main() -> int:
    """Run the rows and print the table; 1 if one failed."""
    args = parsed_arguments()
    args.logs.mkdir(parents=True, exist_ok=True)
    size = TINY if args.smoke else KAIYUAN
    plan = smoke_plan(args.logs) if args.smoke else args.plan
    until = time.monotonic() + args.limit
    results: list[dict[str, object]] = []
    for row in chosen_rows(args.rows):
        if time.monotonic() + args.row_seconds > until:
            results.append({"key": row.key, "name": row.name, "error": "not started: --limit leaves too little time"})
        else:
            results.append(run(row, size, plan, args))
        print(json.dumps(results[-1]), flush=True)
        (args.logs / "results.json").write_text(json.dumps({"formula": size.formula(), "rows": results}, indent=2))
    print_table(results, size)
    if args.profile:
        [row] = [row for row in ROWS if row.key == args.profile]
        run(row, size, plan, args, PROFILE)
        print_profile(args.logs / row.key / "torch_profile" / "rank-0.json.gz", steps=2)
    return int(any("error" in result for result in results))


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks/one_gpu_plan.yaml")
    groups = "; ".join(f"{name}: {', '.join(row.key for row in rows)}" for name, rows in GROUPS.items())
    parser.add_argument("--rows", default="stocktorch,ours", help=f"all, or groups or keys joined by commas. {groups}")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--row-seconds", type=float, default=LIMIT_SECONDS, help="a row is stopped after so long")
    parser.add_argument("--limit", type=float, default=7200, help="no row starts that could end after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on invented text, made on the spot")
    parser.add_argument("--profile", metavar="KEY", help="also profile two steps of this row")
    parser.add_argument("--logs", type=Path, default=Path("runs/throughput"), help="folder for logs and results.json")
    return parser.parse_args()


def chosen_rows(names: str) -> list[Row]:
    """The rows of groups and keys, in the order asked for."""
    if names == "all":
        return list(ROWS)
    known = GROUPS | {row.key: (row,) for row in ROWS}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"--rows {names}: {', '.join(unknown)} is unknown; use {', '.join(known)} or all")
    return list({row.key: row for name in names.split(",") for row in known[name]}.values())


def smoke_plan(logs: Path) -> Path:
    """A plan over invented text, in windows of 64 tokens."""
    from benchmarks.fp16_stability_data import write_markov_text

    text, plan = logs.resolve() / "text", logs.resolve() / "plan.yaml"
    write_markov_text(text, vocabulary=256, documents=600)
    plan.write_text(
        f"seq_length: 64\nseed: 1234\nsources:\n  text: {{shards: {text}}}\nphases:\n  - name: all\n"
        "    order: shuffled\n    tokens: 65536\n    lr: {start: 0, end: 1.0e-3, shape: warmup}\n"
        "    sources: {text: all}\n"
    )
    return plan


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


def run(row: Row, size: Size, plan: Path, args: argparse.Namespace, extra: Sequence[str] = ()) -> dict[str, object]:
    """Train one configuration and read its log."""
    command = [
        "bash", str(ROOT / "examples/pretrain_kaiyuan_2b.sh"), *size.flags,
        "--global-batch-size", str(size.sequences), "--micro-batch-size", str(row.micro_batch),
        "--exit-interval", str(args.steps), "--log-interval", "1",
        "--tokenizer-type", "NullTokenizer", "--vocab-size", str(size.vocabulary - (not args.smoke)),
        "--save", "", "--load", "", "--eval-iters", "0", "--kaiyuan-metrics", str(args.logs / f"{row.key}.jsonl"),
        *row.flags, *extra,
    ]  # fmt: skip
    environment = os.environ | {"NPROC_PER_NODE": "1", "PLAN": str(plan), "RUN": str(args.logs / row.key)}
    environment |= row.environment | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    log = args.logs / f"{row.key}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=args.row_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # every process writes where it stands
            time.sleep(5)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"key": row.key, "name": row.name} | read_log(log.read_text(), size)


def read_log(log: str, size: Size) -> dict[str, object]:
    """Medians and last values of a training log."""
    found = STEP.findall(log)
    if len(found) < 6:
        lines = [line for line in log.splitlines() if "Error" in line]
        return {"error": (lines or ["no steps in the log"])[-1][:160]}
    milliseconds = statistics.median(float(step[1]) for step in found[4:])
    tokens = size.sequences * size.seq_length / milliseconds * 1000
    memory = [float(value) for value in MEMORY.findall(log)]
    waits = [float(value) for value in WAITING.findall(log)][4:]
    return {
        "tokens_per_second": tokens,
        "milliseconds": milliseconds,
        "mfu": tokens * size.flops_per_token / PEAK_FLOPS,
        "peak_gib": max(memory, default=0) / 1024,
        "data_share": statistics.median(waits) / milliseconds if waits else None,
        "first_loss": float(found[0][2]),
        "last_loss": float(found[-1][2]),
        "last_loss_scale": float(found[-1][3]),
        "skipped": sum(int(number) for number in SKIPPED.findall(log)),
        "steps": len(found),
    }


def print_table(results: list[dict[str, object]], size: Size) -> None:
    """The table that docs/benchmarks.md shows; ratios are to the first row."""
    title = f"{size.parameters:,} parameters, one device, {size.sequences} x {size.seq_length} tokens a step"
    table = Table(title=title, title_justify="left")
    for name in ("run", "tokens/s", "ratio", "MFU", "peak GiB", "memory", "data", "loss first", "last", "skipped"):
        table.add_column(name, justify="left" if name == "run" else "right")
    first = results[0]
    for result in results:
        if "error" in result:
            table.add_row(str(result["name"]), str(result["error"]))
            continue
        share = result["data_share"]
        table.add_row(
            str(result["name"]), f"{result['tokens_per_second']:,.0f}", _ratio(result, first, "tokens_per_second"),
            f"{result['mfu']:.1%}", f"{result['peak_gib']:.1f}", _ratio(result, first, "peak_gib"),
            f"{share:.2%}" if share is not None else "", f"{result['first_loss']:.3f}", f"{result['last_loss']:.3f}",
            str(result["skipped"]),
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    console.print(f"Ratios (speed, memory) are to the first row.\n{size.formula()}", highlight=False)


def _ratio(result: dict[str, object], first: dict[str, object], key: str) -> str:
    ours, theirs = float(str(result[key])), float(str(first.get(key, 0)))
    return f"{ours / theirs:.2f}" if theirs else "-"


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
