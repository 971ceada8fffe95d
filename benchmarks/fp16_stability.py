#!/usr/bin/env python3
"""Does the variant keep FP16 training inside its range? Loss, activations and skipped steps of small models on one GPU.

    python benchmarks/fp16_stability.py --out runs/stability          # trains, prints the table, draws the plots
    python benchmarks/fp16_stability.py --smoke --out runs/smoke      # tiny models, invented text, any CPU

Every run sees the same samples in the same order through the real entry point; what differs is the precision, the
learning rate, which stabilisers are on, and the seed of the initial weights. Runs go side by side, each in a process of
its own, and are stopped by the clock. Numbers come from the runs' `metrics.jsonl`. "Headroom" is 65 504 over the
largest |activation| that the monitor saw, wherever in the model; with scaled branches that is the scaled value.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.fp16_stability_report import RunRecord, draw, print_table, write_json
from megatron_kaiyuan.training.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[1]
QK_NORM, SANDWICH, SOFTCAP = ("--qk-layernorm",), ("--kaiyuan-sandwich-norm",), ("--kaiyuan-logit-softcap", "30")
OURS = QK_NORM + SANDWICH + SOFTCAP
FP16 = ("--fp16", "--initial-loss-scale", "65536", "--loss-scale-window", "200", "--hysteresis", "2")
STOCK_KERNELS = ("--kaiyuan-attention", "unfused", "--kaiyuan-fusions", "none")
COMMON = shlex.split(
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --transformer-impl local "
    "--no-persist-layer-norm --num-workers 0 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 "
    "--lr-decay-style constant --lr-warmup-fraction 0.03 --eval-iters 1 --eval-interval 100000 --log-interval 10 "
    "--kaiyuan-activation-interval 20 --accumulate-allreduce-grads-in-fp32 --kaiyuan-max-skipped-steps 40"
)
SMALL = shlex.split(
    "--num-layers 16 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 "
    "--micro-batch-size 16 --global-batch-size 16"
)
TINY = shlex.split(
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4 "
    "--micro-batch-size 8 --global-batch-size 8 --tokenizer-type NullTokenizer --vocab-size 256"
)


@dataclass(frozen=True)
class Variant:
    """Which stabilisers are on, in which precision."""

    key: str
    name: str
    flags: tuple[str, ...]


def scaled(bits: int) -> Variant:
    """Ours with scaled branches."""
    return Variant(
        f"k{bits}",
        f"ours, branches scaled by 2^-{bits}, FP16",
        (*OURS, "--kaiyuan-branch-scale-bits", str(bits), *FP16),
    )


VARIANTS = (
    Variant("stock", "stock, FP16", FP16 + STOCK_KERNELS),
    Variant("ours", "ours, FP16", OURS + FP16),
    scaled(4),
    scaled(8),
    Variant("bf16", "ours, bf16", (*OURS, "--bf16")),
    Variant("noqk", "ours without QK-norm, FP16", SANDWICH + SOFTCAP + FP16),
    Variant("nosandwich", "ours without sandwich norm, FP16", QK_NORM + SOFTCAP + FP16),
    Variant("nocap", "ours without soft-cap, FP16", QK_NORM + SANDWICH + FP16),
)


@dataclass(frozen=True)
class Run:
    """One process."""

    variant: Variant
    rate: float
    seed: int
    place: Path

    @property
    def metrics(self) -> Path:
        """Its file of metrics."""
        return self.place / "metrics.jsonl"

    def record(self) -> RunRecord:
        """What it left."""
        return RunRecord(self.variant.key, self.variant.name, self.rate, self.seed, read_metrics(self.metrics))


def main() -> int:
    """Train what is asked for, print the table, write the numbers, draw the plots."""
    args = parsed_arguments()
    chosen = [variant for variant in VARIANTS if variant.key in args.variants.split(",")]
    runs = [
        Run(variant, rate, seed, args.out / f"{variant.key}_{rate:g}_{seed}")
        for seed in args.seeds
        for rate in args.rates
        for variant in chosen
    ]
    if not args.report_only:
        Batch(args, smoke_plan(args.out) if args.smoke else args.plan).train(runs)
    records = [run.record() for run in runs]
    print_table(records)
    write_json(records, args.out / "stability.json")
    if args.tar:
        with tarfile.open(args.tar, "w:gz") as archive:
            for path in sorted(args.out.glob("*/*.*")):
                if path.name in ("metrics.jsonl", "log.txt"):
                    archive.add(path, str(path.relative_to(args.out)))
    draw(records, args.out / "stability.html", args.png)
    return int(any(not record.entries for record in records))


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="a folder for each run; the reports")
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks/fp16_stability_plan.yaml")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 3e-2], help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11], help="seeds of the initial weights")
    parser.add_argument(
        "--variants", default=",".join(variant.key for variant in VARIANTS), help="keys joined by commas (default: all)"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--together", type=int, default=16, help="runs at a time")
    parser.add_argument("--run-seconds", type=float, default=3600, help="a run is stopped where it is after so long")
    parser.add_argument("--limit", type=float, default=7200, help="all runs are stopped after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="tiny models on invented text, made on the spot")
    parser.add_argument("--report-only", action="store_true", help="only read what earlier runs left")
    parser.add_argument("--tar", type=Path, help="also pack metrics and logs there")
    parser.add_argument("--png", type=Path, help="also draw the plots there; needs a Chromium")
    return parser.parse_args()


@dataclass
class Batch:
    """The processes of one call."""

    args: argparse.Namespace
    plan: Path
    started: float = field(default_factory=time.monotonic)
    running: list[tuple[subprocess.Popen[bytes], float, IO[bytes]]] = field(default_factory=list)

    def train(self, runs: list[Run]) -> None:
        """All runs, so many at a time; those that end with an error leave it in their log."""
        waiting = list(runs)
        while (waiting or self.running) and time.monotonic() - self.started < self.args.limit:
            while waiting and len(self.running) < self.args.together:
                self._start(waiting.pop(0))
            time.sleep(0.2)
            self._reap(self.args.run_seconds)
        self._reap(0)
        for run in waiting:
            print(f"not started within --limit: {run.place.name}")

    def _start(self, run: Run) -> None:
        run.place.mkdir(parents=True, exist_ok=True)
        run.metrics.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "megatron_kaiyuan.pretrain", "--plan", str(self.plan), *COMMON,
            *(TINY if self.args.smoke else SMALL), *run.variant.flags, "--lr", str(run.rate), "--seed", str(run.seed),
            "--exit-interval", str(self.args.steps), "--kaiyuan-metrics", str(run.metrics),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        log = (run.place / "log.txt").open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.running.append((process, time.monotonic(), log))

    def _reap(self, seconds: float) -> None:
        """Stop the runs that are older, and forget those that ended."""
        kept = []
        for process, since, log in self.running:
            if process.poll() is None and time.monotonic() - since < seconds:
                kept.append((process, since, log))
                continue
            if process.poll() is None:
                process.kill()
                process.wait()
            log.close()
        self.running = kept


def smoke_plan(out: Path) -> Path:
    """A plan over invented text; 1 500 steps of eight windows of 64 tokens."""
    from benchmarks.fp16_stability_data import write_markov_text

    out = out.resolve()
    write_markov_text(out / "text", vocabulary=256, documents=600)
    plan = out / "plan.yaml"
    plan.write_text(
        "seq_length: 64\nseed: 1234\nsources:\n  text: {shards: " + str(out / "text") + "}\nphases:\n"
        "  - {name: all, order: shuffled, tokens: 768000, sources: {text: {max_repeat: 16}}}\n"
    )
    return plan


if __name__ == "__main__":
    sys.exit(main())
