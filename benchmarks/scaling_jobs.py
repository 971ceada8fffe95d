"""Jobs of the scaling benchmark: shapes, data, command lines, and what a finished job left in its log and its trace."""

import gzip
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.failures import line_that_matters
from megatron_kaiyuan.quantile.reference_model import ReferenceModel
from tests.unit_tests.data.tiny import write_shard

__all__ = [
    "FULL", "MIDDLE", "SMOKE", "Budget", "Communication", "Job", "Layout", "Shape", "communication_of",
    "default_micro_batch", "end_family", "family_of", "launch", "read_steps", "reason_in", "run_job", "stop_family",
    "tail", "write_data",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast can put the GPUs of a shared host out of service."""
HALF = ("--fp16", "--initial-loss-scale", "65536", "--accumulate-allreduce-grads-in-fp32")
OPTIMIZER = (
    "--weight-decay 0.1 --clip-grad 1.0 --seed 11 --num-workers 0 --log-interval 1 --log-memory-interval 1 "
    "--eval-iters 0"
)
STEP = re.compile(r" iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+)")
MEMORY = re.compile(r"max allocated: ([\d.]+)")
PROFILED = 2
"""Steps under torch's profiler, the last ones of a job."""
LEARNING_RATE = 1e-4
LARGE_MEMORY = 100 * 2**30
SECONDS_TO_SAY_WHERE = 5.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, its vocabulary and its samples."""

    name: str
    model: ReferenceModel
    vocab_size: int
    seq_length: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.model.parameters(self.vocab_size)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward."""
        return self.model.flops_per_token(self.vocab_size, self.seq_length)


def _model(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> ReferenceModel:
    return ReferenceModel(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads, num_query_groups=groups
    )


FULL = Shape("Kaiyuan-2B", _model(28, 2048, 6144, 16, 8), 151_936, 4096)
MIDDLE = Shape("100 M", _model(12, 768, 2304, 12, 4), 8192, 1024)
SMOKE = Shape("smoke", _model(2, 64, 192, 4, 2), 256, 64)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a job is spread."""

    processes: int
    tensor: int = 1
    pipeline: int = 1
    distributed_optimizer: bool = True
    overlap: bool = True

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.processes // (self.tensor * self.pipeline)

    @property
    def name(self) -> str:
        """For tables."""
        parts = [f"DP {self.data}"]
        parts += [f"TP {self.tensor}"] * (self.tensor > 1) + [f"PP {self.pipeline}"] * (self.pipeline > 1)
        return " x ".join(parts)

    def flags(self) -> list[str]:
        """Megatron's flags."""
        sizes = f"--tensor-model-parallel-size {self.tensor} --pipeline-model-parallel-size {self.pipeline}".split()
        optimizer = ["--use-distributed-optimizer"] if self.distributed_optimizer else []
        # Overlap of parameters exists with the distributed optimizer alone.
        overlap = ["--overlap-grad-reduce", *(["--overlap-param-gather"] if self.distributed_optimizer else [])]
        return [*sizes, *optimizer, *(overlap if self.overlap else [])]


@dataclass(frozen=True, slots=True)
class Job:
    """One start of the training program."""

    shape: Shape
    layout: Layout
    plan: Path
    folder: Path
    """Receives log, metrics, trace and recorded samples."""
    micro_batch: int
    global_batch: int
    exit_at: int
    """Last step."""
    precision: str
    flags: tuple[str, ...] = ()
    record: bool = False
    """Whether the numbers of the samples are written down."""
    extra_environment: dict[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """Of torchrun."""
        module = "benchmarks.scaling_pretrain" if self.record else "megatron_kaiyuan.pretrain"
        vocabulary = f"--tokenizer-type NullTokenizer --vocab-size {self.shape.vocab_size - 1}"
        batch = f"--micro-batch-size {self.micro_batch} --global-batch-size {self.global_batch}"
        return [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone"],
            *["--nproc-per-node", str(self.layout.processes), "-m", module, "--plan", str(self.plan)],
            *[*self.shape.model.flags(), *vocabulary.split(), "--padded-vocab-size", str(self.shape.vocab_size)],
            *[*batch.split(), *(HALF if self.precision == "fp16" else ()), *self.layout.flags()],
            *OPTIMIZER.split(),
            *["--transformer-impl", "local", "--exit-interval", str(self.exit_at)],
            *["--kaiyuan-activation-interval", "0", "--kaiyuan-metrics", str(self.folder / "metrics.jsonl")],
            *["--tensorboard-dir", str(self.folder / "tensorboard"), *self.flags],
        ]

    def environment(self) -> dict[str, str]:
        """Of all its processes."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        recorded = {"SCALING_SAMPLES": str(self.folder / "samples")} if self.record else {}
        return os.environ | NO_MULTICAST | own | recorded | self.extra_environment


def write_data(shape: Shape, folder: Path, samples: int) -> Path:
    """Write a shard of invented tokens, small ids more often, and a plan over it, and return the plan.

    Speed, memory and the order of samples do not depend on what the tokens say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    lengths = chance.integers(shape.seq_length // 8, 2 * shape.seq_length, size=256)
    documents = [(chance.random(length) ** 3 * (shape.vocab_size - 1)).astype(int).tolist() for length in lengths]
    write_shard(folder / "invented", documents)
    tokens = samples * shape.seq_length
    passes = -(-2 * tokens // int(lengths.sum()))
    content = {
        "seq_length": shape.seq_length,
        "sources": {"invented": {"shards": str(folder / "invented")}},
        "phases": [
            {
                "name": "all",
                "order": "shuffled",
                "tokens": tokens,
                "lr": {"start": LEARNING_RATE, "end": LEARNING_RATE},
                "sources": {"invented": {"max_repeat": passes}},
            }
        ],
    }
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return plan


@dataclass(frozen=True, slots=True)
class Budget:
    """Time that jobs may take."""

    limit: float
    """Seconds of one job."""
    deadline: float = float("inf")
    """Of all of them, on the monotonic clock."""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def require(self, jobs: int, what: str) -> None:
        """Refuse to start what cannot end in time.

        A job needs a third of its limit at least.

        Raises:
            StudyError: too little time is left.
        """
        least = jobs * self.limit / 3
        if self.left < least:
            raise StudyError(f"{what}: not started: {max(0.0, self.left):.0f} s are left, it needs {least:.0f} s")

    def seconds(self) -> float:
        """Of the next job."""
        return min(self.limit, self.left)


def launch(job: Job) -> subprocess.Popen[bytes]:
    """Start a job, with its output appended to `log.txt`."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("ab") as log:
        log.write(("$ " + " ".join(job.command()) + "\n").encode())
        log.flush()
        return subprocess.Popen(
            job.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=job.environment(),
            cwd=ROOT,
        )


def run_job(job: Job, limit: float) -> float:
    """Run a job to its end and return its seconds.

    Raises:
        StudyError: it failed, or was stopped after `limit` seconds.
    """
    began = time.monotonic()
    process = launch(job)
    try:
        code = process.wait(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        raise StudyError(f"{job.folder}: stopped after {limit:.0f} s; {tail(job.folder / 'log.txt', 3)}") from None
    finally:
        end_family(process)
    if code:
        raise StudyError(f"{job.folder}: exit code {code}: {reason_in(job.folder / 'log.txt')}")
    return time.monotonic() - began


def family_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return a job's first process and all below it.

    torchrun gives each rank a session of its own.
    """
    try:
        first = psutil.Process(process.pid)
        return [*first.children(recursive=True), first]
    except psutil.NoSuchProcess:
        return []


def end_family(process: subprocess.Popen[bytes], known: Sequence[psutil.Process] = ()) -> None:
    """Kill what is left of a job.

    Args:
        process: Its first process.
        known: Others of it: once torchrun is gone, nothing links to its ranks any more.
    """
    family = list({*known, *family_of(process)})
    for member in family:
        try:
            member.kill()  # psutil looks first whether the number belongs to another process by now
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
    process.wait()


def stop_family(process: subprocess.Popen[bytes], grace: float = SECONDS_TO_SAY_WHERE) -> None:
    """Have every rank write where it stands (PYTHONFAULTHANDLER), then kill the job."""
    family = family_of(process)
    for member in family:
        if member.pid == process.pid:
            continue  # torchrun would end the ranks before they have written anything
        try:
            member.send_signal(signal.SIGABRT)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs([member for member in family if member.pid != process.pid], timeout=grace)
    end_family(process, family)


def tail(log: Path, lines: int) -> str:
    """The end of a log."""
    return " / ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def reason_in(log: Path) -> str:
    """The error of the rank that failed first, or the end of the log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return (line_that_matters(lines) or tail(log, 3))[:300]


def read_steps(log: Path, warm_up: int, last: int) -> dict[str, float]:
    """Median milliseconds of the steps after the warm-up up to `last`, and torch's peak of allocated GiB on a rank.

    Raises:
        StudyError: the log has no such steps.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    found = [float(ms) for step, ms in STEP.findall(text) if warm_up < int(step) <= last]
    if not found:
        raise StudyError(f"{log}: no step between {warm_up} and {last}")
    peak = max((float(value) for value in MEMORY.findall(text)), default=0.0) / 1024
    return {"milliseconds": statistics.median(found), "peak_gib": peak}


@dataclass(frozen=True, slots=True)
class Communication:
    """Of a step on one rank."""

    milliseconds: float
    """With some collective under way."""
    exposed: float
    """Of these, with nothing else under way: what it costs."""


def communication_of(trace: Path, steps: int) -> Communication:
    """Read a trace of torch's profiler: NCCL's kernels on a GPU, gloo's calls on a CPU.

    A call of gloo may wait while its rank computes: the numbers of a CPU show that the trace is read, and nothing more.
    """
    with gzip.open(trace, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("dur")]
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_device:
        ours = [event for event in on_device if "nccl" in event["name"].lower()]
        others = [event for event in on_device if "nccl" not in event["name"].lower()]
    else:
        ours, others = [event for event in events if event["name"].startswith("gloo:")], []
    busy, computing = _union(ours), _union(others)
    total = sum(end - start for start, end in busy)
    return Communication(total / 1000 / steps, (total - _overlap(busy, computing)) / 1000 / steps)


Spans = list[tuple[float, float]]


def _union(events: Iterable[dict[str, Any]]) -> Spans:
    """Disjoint spans of time, microseconds, ascending."""
    spans: Spans = []
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def _overlap(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """Length of what both cover."""
    total, place = 0.0, 0
    for start, end in one:
        while place < len(other) and other[place][1] <= start:
            place += 1
        following = place
        while following < len(other) and other[following][0] < end:
            total += min(end, other[following][1]) - max(start, other[following][0])
            following += 1
    return total


def default_micro_batch() -> int:
    """Samples of a micro-batch of the full shape: 4, or 2 on GPUs below 100 GiB, where stock layers need 88 for 4."""
    if not torch.cuda.is_available():
        return 2
    return 4 if torch.cuda.get_device_properties(0).total_memory > LARGE_MEMORY else 2


def default_processes() -> int:
    """Return the number of all GPUs, or two processes without any."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 2
