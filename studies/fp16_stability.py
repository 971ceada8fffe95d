#!/usr/bin/env python3
"""Does the variant keep FP16 training inside its range? Loss, activations and skipped steps of small models on one GPU.

    python -m studies.fp16_stability --out runs/stability --limit 540 --tar stability.tgz     # trains, reports
    python -m studies.fp16_stability --out runs/stability --report-only                       # of what is there
    python -m studies.fp16_stability --smoke --out runs/smoke      # tiny models, invented text, any CPU
    python -m studies.fp16_stability --shape kaiyuan-2b --together 1 --rates 3e-3 --steps 240 --out runs/stability_2b

Every run sees the same samples in the same order through the real entry point; what differs is the precision, the
learning rate, which stabilisers are on, and the seed of the initial weights. Runs go side by side over all GPUs, each
in a process of its own, and are stopped by the clock. A run that reached its end, or that FP16 ended, is not repeated;
one that the clock stopped counts as far as it came, and the next call trains it again. Numbers come from the runs'
`metrics.jsonl` and are written after every run. "Headroom" is 65 504 over the largest |activation| that the monitor
saw, wherever in the model; with scaled branches that is the scaled value.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from benchmarks.benchmark_data import plan_digest, require_shards, smoke_plan
from benchmarks.packing import pack
from benchmarks.scaling_jobs import end_family
from benchmarks.throughput_rows import NATIVE_LOSS, UNFUSED
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.cli import run_tool
from megatron_kaiyuan.monitoring.metrics_file import read_metrics
from studies.fp16_stability_report import RunRecord, draw, print_over_seeds, print_table, write_json

ROOT = Path(__file__).resolve().parents[1]
QK_NORM, SANDWICH, SOFTCAP = ("--qk-layernorm",), ("--kaiyuan-sandwich-norm",), ("--kaiyuan-logit-softcap", "30")
OURS = QK_NORM + SANDWICH + SOFTCAP
OVERFLOWED = re.compile(
    rb"^TrainingStopped: \d+ (steps in a row were|of the last \d+ steps were) skipped", re.MULTILINE
)
"""What the run monitor says at the end of a run that FP16 ended."""
FP16 = ("--fp16", "--initial-loss-scale", "65536", "--loss-scale-window", "200", "--hysteresis", "2")
STOCK_KERNELS = ("--kaiyuan-attention", "unfused", "--kaiyuan-fusions", "none")
LARGE_STOCK_KERNELS = ("--kaiyuan-attention", "sdpa", *UNFUSED, *NATIVE_LOSS)
"""Stock's own kernels would take three times as long, and 100 GiB for the loss."""
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
KAIYUAN_2B = shlex.split(
    "--num-layers 28 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 16 --group-query-attention "
    "--num-query-groups 8 --kv-channels 128 --norm-epsilon 1e-6 --init-method-std 0.018 --padded-vocab-size 151936 "
    "--max-position-embeddings 4096 --micro-batch-size 4 --global-batch-size 16 --use-distributed-optimizer "
    "--tokenizer-type NullTokenizer --vocab-size 151935"
)
"""The shape of examples/pretrain_kaiyuan_2b.sh, which a test compares."""


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
    Variant("stock", "stock, FP16", FP16),
    Variant("ours", "ours, FP16", OURS + FP16),
    scaled(4),
    scaled(8),
    Variant(
        "rising",
        "ours, 2^-4 and rising below 8x, FP16",
        (*scaled(4).flags, "--kaiyuan-raise-branch-scale-below", "8"),
    ),
    Variant("bf16", "ours, bf16", (*OURS, "--bf16")),
    Variant("noqk", "ours without QK-norm, FP16", SANDWICH + SOFTCAP + FP16),
    Variant("nosandwich", "ours without sandwich norm, FP16", QK_NORM + SOFTCAP + FP16),
    Variant("nocap", "ours without soft-cap, FP16", QK_NORM + SANDWICH + FP16),
)


@dataclass(frozen=True)
class Shape:
    """What is trained, on which windows."""

    flags: list[str]
    plan: Path
    stock_kernels: tuple[str, ...] = STOCK_KERNELS

    def flags_of(self, variant: Variant) -> list[str]:
        """Return the flags of a variant.

        The order is part of what finished runs are known by.
        """
        return [*self.flags, *variant.flags, *(self.stock_kernels if variant.key == "stock" else ())]


SMALL_PLAN, LARGE_PLAN = (ROOT / f"studies/fp16_stability{name}_plan.yaml" for name in ("", "_2b"))
SHAPES = {
    "small": Shape(SMALL, SMALL_PLAN),
    "kaiyuan-2b": Shape(KAIYUAN_2B, LARGE_PLAN, LARGE_STOCK_KERNELS),
    "tiny": Shape(TINY, SMALL_PLAN),
}


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

    @property
    def log(self) -> Path:
        """What it said."""
        return self.place / "log.txt"

    @property
    def stamp(self) -> Path:
        """Written when it has ended by itself."""
        return self.place / "finished.json"

    def setting(self, args: argparse.Namespace) -> list[str]:
        """Return what distinguishes this run from others: its flags, and the plan by what it says."""
        return [*self.flags(args), "--plan", plan_digest(args.plan)]

    def flags(self, args: argparse.Namespace) -> list[str]:
        """Of the training, without places."""
        return [
            *COMMON, *SHAPES[args.shape].flags_of(self.variant), "--lr", str(self.rate),
            "--seed", str(self.seed), "--exit-interval", str(args.steps),
        ]  # fmt: skip

    def finished(self, args: argparse.Namespace) -> bool:
        """Whether it need not be trained again.

        Raises:
            StudyError: it was trained with other settings.
        """
        if not self.stamp.is_file():
            return False
        known = json.loads(self.stamp.read_text(encoding="utf-8"))["setting"]
        if known != self.setting(args):
            raise StudyError(f"{self.place} was trained with {shlex.join(known)}; name another --out")
        return True

    def record(self) -> RunRecord:
        """What it left."""
        return RunRecord(self.variant.key, self.variant.name, self.rate, self.seed, read_metrics(self.metrics))


def main() -> None:
    """Train what is missing, print the table, write the numbers, and draw the plots.

    Raises:
        StudyError: runs are missing.
    """
    args = parsed_arguments()
    runs = chosen_runs(args)
    if not args.report_only:
        if args.smoke:
            args.plan = smoke_plan(args.out, 768_000, 16)
        require_shards(args.plan)
        Batch(args, lambda: save(runs, args)).train(runs)
    records = save(runs, args)
    print_table(records)
    if len(args.seeds) > 1:
        print_over_seeds(records)
    try:
        draw(records, args.out / "stability.html", args.png)
    except ModuleNotFoundError as error:
        print(f"no plots: {error}; unpack --tar where plotly is, into --out, and run this with --report-only there")
    if missing := [run.place.name for run in runs if not read_metrics(run.metrics)]:
        raise StudyError(f"no line of {', '.join(missing)}; the reason is in each one's log.txt, if it was started")


def chosen_runs(args: argparse.Namespace) -> list[Run]:
    """Seed after seed, so that the first ones compare.

    Raises:
        StudyError: an unknown variant.
    """
    known = {variant.key: variant for variant in VARIANTS}
    if unknown := [key for key in args.variants.split(",") if key not in known]:
        raise StudyError(f"--variants: {', '.join(unknown)} is unknown; use some of {', '.join(known)}")
    chosen = [variant for variant in VARIANTS if variant.key in args.variants.split(",")]
    return [
        Run(variant, rate, seed, args.out / f"{variant.key}_{rate:g}_{seed}")
        for seed in args.seeds
        for rate in args.rates
        for variant in chosen
    ]


def save(runs: list[Run], args: argparse.Namespace) -> list[RunRecord]:
    """Numbers of the runs so far, and the archive."""
    records = [run.record() for run in runs]
    numbers = args.out / "stability.json"
    write_json(records, numbers)
    if args.tar:
        pack(args.tar, args.out, [numbers, *(path for run in runs for path in (run.metrics, run.log, run.stamp))])
    return records


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="a folder for each run; the reports")
    parser.add_argument("--shape", choices=[*SHAPES], default="small", help="kaiyuan-2b needs a GPU of 139 GiB a run")
    parser.add_argument("--plan", type=Path, help="default: that of the shape")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 3e-2], help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11], help="seeds of the initial weights")
    parser.add_argument(
        "--variants", default=",".join(variant.key for variant in VARIANTS), help="keys joined by commas (default: all)"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--together", type=int, default=8, help="runs at a time on each GPU (default 8: for 78 GiB)")
    parser.add_argument("--run-seconds", type=float, default=3600, help="a run is stopped where it is after so long")
    parser.add_argument("--limit", type=float, default=7200, help="all runs are stopped after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="the shape tiny on invented text, made on the spot")
    parser.add_argument("--report-only", action="store_true", help="only read what earlier runs left")
    parser.add_argument("--tar", type=Path, help="also pack numbers and logs there, after every run")
    parser.add_argument("--png", type=Path, help="also draw the plots there; needs a Chromium")
    args = parser.parse_args()
    args.shape = "tiny" if args.smoke else args.shape
    args.plan = args.plan or SHAPES[args.shape].plan
    return args


@dataclass
class Running:
    """A run under way."""

    run: Run
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    gpu: int
    since: float = field(default_factory=time.monotonic)


@dataclass
class Batch:
    """The processes of one call."""

    args: argparse.Namespace
    save: Callable[[], object]
    """Called whenever a run has ended."""
    started: float = field(default_factory=time.monotonic)
    running: list[Running] = field(default_factory=list)
    longest: float = 0.0
    """Seconds of a run that ended by itself."""

    def train(self, runs: list[Run]) -> None:
        """Train all runs that are not finished, so many at a time.

        Those that end with an error leave it in their log.
        """
        waiting = [run for run in runs if not run.finished(self.args)]
        print(f"{len(runs)} runs, {len(waiting)} to train", flush=True)
        places = self.args.together * max(1, torch.cuda.device_count())
        try:
            while (waiting or self.running) and self._left() > 0:
                while waiting and len(self.running) < places and self._left() > self.longest:
                    self._start(waiting.pop(0))
                if not self.running:
                    break
                time.sleep(0.2)
                self._reap(self.args.run_seconds)
        finally:
            self._reap(0)
        for run in waiting:
            print(f"not started within --limit: {run.place.name}")

    def _left(self) -> float:
        return float(self.args.limit - (time.monotonic() - self.started))

    def _start(self, run: Run) -> None:
        run.place.mkdir(parents=True, exist_ok=True)
        run.metrics.unlink(missing_ok=True)  # lines are appended
        command = [
            sys.executable, "-m", "megatron_kaiyuan.pretrain", "--plan", str(self.args.plan), *run.flags(self.args),
            "--kaiyuan-metrics", str(run.metrics),
        ]  # fmt: skip
        busy = [one.gpu for one in self.running]
        gpu = min(range(max(1, torch.cuda.device_count())), key=busy.count)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        if torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        log = run.log.open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.running.append(Running(run, process, log, gpu))

    def _reap(self, seconds: float) -> None:
        """Stop the runs that are older, and write down those that ended."""
        kept, ended = [], False
        for one in self.running:
            age = time.monotonic() - one.since
            if one.process.poll() is None and age < seconds:
                kept.append(one)
                continue
            code = one.process.poll()
            end_family(one.process)
            one.log.close()
            ended = True
            self._write_down(one, code, age)
        self.running = kept
        if ended:
            self.save()

    def _write_down(self, one: Running, code: int | None, seconds: float) -> None:
        """Mark a run that reached its end, or whose loss scale has.

        One that broke is tried again.
        """
        over = code == 0 or (code is not None and OVERFLOWED.search(one.run.log.read_bytes()) is not None)
        state = "ended" if over else "stopped by the clock" if code is None else f"failed with exit code {code}"
        print(f"{one.run.place.name}: {state}, {seconds:.0f} s", flush=True)
        if over:
            self.longest = max(self.longest, seconds)
            told = {"setting": one.run.setting(self.args), "exit_code": code, "seconds": round(seconds, 1)}
            write_text_atomically(one.run.stamp, json.dumps(told) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(main))
