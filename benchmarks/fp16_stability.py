#!/usr/bin/env python3
"""Does the variant keep FP16 training inside its range? Loss, activations and skipped steps of small models on one GPU.

    python benchmarks/fp16_stability.py --out runs/stability          # trains, prints the table, draws the plots

Every run sees the same samples from the same seed through the real entry point; what differs is the precision, the
learning rate and which stabilisers are on. All runs go at once, each in a process of its own. Numbers come from the
runs' `metrics.jsonl`. "Headroom" is 65 504 over the largest |activation| that the monitor saw, wherever in the model.
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_kaiyuan.training.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[1]
QK_NORM, SANDWICH, SOFTCAP = ("--qk-layernorm",), ("--kaiyuan-sandwich-norm",), ("--kaiyuan-logit-softcap", "30")
FP16 = ("--fp16", "--initial-loss-scale", "65536", "--loss-scale-window", "200", "--hysteresis", "2")
STOCK_KERNELS = ("--kaiyuan-attention", "unfused", "--kaiyuan-fusions", "none")
MODEL = shlex.split(
    "--num-layers 16 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --transformer-impl local --no-persist-layer-norm"
)
TRAINING = shlex.split(
    "--micro-batch-size 16 --global-batch-size 16 --num-workers 0 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 "
    "--lr-decay-style constant --lr-warmup-fraction 0.03 --eval-iters 1 --eval-interval 100000 --log-interval 10 "
    "--seed 11 "
    "--kaiyuan-activation-interval 20 --accumulate-allreduce-grads-in-fp32 --kaiyuan-max-skipped-steps 40"
)


@dataclass(frozen=True)
class Variant:
    """Which stabilisers are on, in which precision."""

    key: str
    name: str
    flags: tuple[str, ...]


VARIANTS = (
    Variant("stock", "stock, FP16", FP16 + STOCK_KERNELS),
    Variant("ours", "ours, FP16", QK_NORM + SANDWICH + SOFTCAP + FP16),
    Variant("bf16", "ours, bf16", (*QK_NORM, *SANDWICH, *SOFTCAP, "--bf16")),
    Variant("noqk", "ours without QK-norm, FP16", SANDWICH + SOFTCAP + FP16),
    Variant("nosandwich", "ours without sandwich norm, FP16", QK_NORM + SOFTCAP + FP16),
    Variant("nocap", "ours without soft-cap, FP16", QK_NORM + SANDWICH + FP16),
)


def main() -> int:
    """Train what is not there yet, print the table, draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="a folder for each run")
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks/fp16_stability_plan.yaml")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 3e-2], help="learning rates")
    parser.add_argument("--variants", default=",".join(variant.key for variant in VARIANTS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--limit", type=float, default=3600, help="seconds after which the runs are stopped where they are"
    )
    parser.add_argument("--report-only", action="store_true", help="only read what earlier runs left")
    parser.add_argument("--tar", type=Path, help="also pack the metrics files there")
    args = parser.parse_args()
    chosen = [variant for variant in VARIANTS if variant.key in args.variants.split(",")]
    if not args.report_only:
        train(chosen, args.rates, args)
    rows = [
        (variant, rate, read_metrics(folder(args.out, variant, rate) / "metrics.jsonl"))
        for rate in args.rates
        for variant in chosen
    ]
    print_table(rows)
    if args.tar:
        with tarfile.open(args.tar, "w:gz") as archive:
            for path in sorted(args.out.glob("*/metrics.jsonl")):
                archive.add(path, str(path.relative_to(args.out)))
    else:
        draw(rows, args.out / "stability.html")
    return 0


def folder(out: Path, variant: Variant, rate: float) -> Path:
    """Where a run leaves its log and metrics."""
    return out / f"{variant.key}_{rate:g}"


def train(variants: list[Variant], rates: list[float], args: argparse.Namespace) -> None:
    """All runs at once; those that end with an error leave it in their log."""
    running = []
    for rate in rates:
        for variant in variants:
            place = folder(args.out, variant, rate)
            place.mkdir(parents=True, exist_ok=True)
            (place / "metrics.jsonl").unlink(missing_ok=True)
            command = [
                sys.executable, "-m", "megatron_kaiyuan.pretrain", "--plan", str(args.plan), *MODEL, *TRAINING,
                *variant.flags, "--lr", str(rate), "--exit-interval", str(args.steps), "--kaiyuan-metrics", str(place /
            "metrics.jsonl"), ]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            log = (place / "log.txt").open("w")
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT))
    deadline = args.limit
    for process in running:
        try:
            process.wait(timeout=max(1.0, deadline))
        except subprocess.TimeoutExpired:
            deadline = 0
            process.kill()
            process.wait()


Rows = list[tuple[Variant, float, list[dict[str, Any]]]]


def print_table(rows: Rows) -> None:
    """One line a run: how far it came, its last losses, its peaks, its skips."""
    table = Table(title="FP16 stability", title_justify="left")
    for name in (
        "lr",
        "run",
        "steps",
        "loss, last 50 steps",
        "to bf16",
        "skipped",
        "after warm-up",
        "last scale",
        "peak",
        "where",
        "headroom",
    ):
        table.add_column(name, justify="left" if name in ("run", "where") else "right")
    for variant, rate, entries in rows:
        if not entries:
            table.add_row(f"{rate:g}", variant.name, "no line was written; see its log.txt")
            continue
        reference = next((other for its, at, other in rows if its.key == "bf16" and at == rate), [])
        peak, where = worst_activation(entries)
        headroom = "overflow" if not math.isfinite(peak) else f"{65504 / peak:,.0f}x" if peak else "-"
        table.add_row(
            f"{rate:g}", variant.name, str(entries[-1]["iteration"]),
            shown(last_loss(entries)), difference(entries, reference),
            str(sum(entry["skipped_steps"] for entry in entries)),
            str(sum(entry["skipped_steps"] for entry in entries if entry["iteration"] > 100)),
            f"{entries[-1]['loss_scale']:g}", f"{peak:,.1f}", where, headroom,
        )  # fmt: skip
    Console(width=190).print(table)


def last_loss(entries: list[dict[str, Any]]) -> float:
    """Mean of the last five lines; NaN if one of them has no finite loss."""
    losses = [entry["loss"] for entry in entries[-5:]]
    return math.nan if None in losses else sum(losses) / len(losses)


def shown(loss: float) -> str:
    """A loss, or that there is none."""
    return f"{loss:.4f}" if math.isfinite(loss) else "not finite"


def difference(entries: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """Relative difference of the last losses at the last step that both runs reached."""
    last = min(entries[-1]["iteration"], reference[-1]["iteration"]) if reference else 0
    ours, theirs = ([entry for entry in part if entry["iteration"] <= last] for part in (entries, reference))
    if not ours or not theirs:
        return "-"
    return f"{last_loss(ours) / last_loss(theirs) - 1:+.2%}"


def worst_activation(entries: list[dict[str, Any]]) -> tuple[float, str]:
    """The largest peak of all readings and its place; of an overflow the first place in the order of computation."""
    largest = (0.0, "-")
    for entry in entries:
        for name, value in entry.get("activations", {}).items():
            if value is None:  # not finite
                return math.inf, name
            largest = max(largest, (value, name))
    return largest


def draw(rows: Rows, path: Path) -> None:
    """Loss, largest activation and loss scale over the steps, one column a learning rate."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rates = sorted({rate for _, rate, _ in rows})
    titles = [f"{what}, lr {rate:g}" for what in ("loss", "largest |activation|", "loss scale") for rate in rates]
    figure = make_subplots(rows=3, cols=len(rates), subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.07)
    colors = ("#d62728", "#1f77b4", "#000000", "#ff7f0e", "#2ca02c", "#9467bd")
    for variant, rate, entries in rows:
        column = rates.index(rate) + 1
        style = {"color": colors[VARIANTS.index(variant)]}
        metered = [entry for entry in entries if entry.get("activations")]
        series = (
            ([entry["iteration"] for entry in entries], [entry["loss"] for entry in entries]),
            ([entry["iteration"] for entry in metered], [worst_activation([entry])[0] for entry in metered]),
            ([entry["iteration"] for entry in entries], [entry["loss_scale"] for entry in entries]),
        )
        for row, (x, y) in enumerate(series, 1):
            figure.add_trace(
                go.Scatter(x=x, y=y, name=variant.name, legendgroup=variant.key, line=style, showlegend=row == 1 and
                column == 1), row=row, col=column,
            )  # fmt: skip
    for row in (2, 3):
        figure.update_yaxes(type="log", row=row)
    figure.update_layout(height=900, width=700 * len(rates), template="plotly_white", title="FP16 stability")
    figure.update_xaxes(title_text="step", row=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
