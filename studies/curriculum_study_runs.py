"""The runs of the curriculum study: plans that differ in one word.

Our tools train, average and evaluate.
"""

import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.monitoring.metrics_file import read_metrics
from megatron_kaiyuan.quantile.reference_model import ReferenceModel
from studies.curriculum_study_data import DOMAINS, ROOT, StudyData

__all__ = ["ARMS", "SIZES", "Arm", "Clock", "Probe", "Run", "Study", "conduct", "finished", "measure_rate", "plan_of"]

WARM_UP, DECAY = 0.02, 0.20
"""Shares of the steps; all arms have the same three phases."""
STRONG_END, MODERATE_END = 0.01, 1 / 3
"""Last learning rate, relative to the peak."""
AVERAGED, AVERAGED_SPACING = 6, 0.025
"""Checkpoints in the average, and the share of the steps between two: the last eighth of the run."""
PROBE_STEPS, PROBE_WARM_UP = 40, 10
CURVE_POINTS = 240


@dataclass(frozen=True, slots=True)
class Size:
    """A model and the batch that it is trained with."""

    model: ReferenceModel
    seq_length: int
    batch: int
    micro_batch: int
    learning_rate: float
    vocab_size: int
    windows: int | None
    """Held-out windows of each domain that are evaluated; None: all."""


def _size(layers: int, hidden: int, heads: int, groups: int, **more: Any) -> Size:
    shape = ReferenceModel(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
    )
    usual = {"seq_length": 1024, "batch": 32, "micro_batch": 32, "vocab_size": 8192, "windows": None}
    return Size(shape, **{**usual, **more})


SIZES = {
    "tiny": _size(
        2, 64, 4, 2, seq_length=128, batch=16, micro_batch=16, learning_rate=8e-3, vocab_size=1024, windows=96
    ),
    "50m": _size(12, 512, 8, 4, learning_rate=2e-3),
    "100m": _size(12, 768, 12, 4, learning_rate=1.5e-3),
    "150m": _size(16, 896, 14, 2, learning_rate=1.2e-3),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to order the data and to end the learning rate."""

    key: str
    name: str
    ascending: bool
    end: float
    """Last learning rate, relative to the peak."""
    averaged: bool
    """Whether the average is this arm's final model, decided before anything runs."""


ARMS = (
    Arm("uniform_wsd", "(a) uniform, WSD", ascending=False, end=STRONG_END, averaged=False),
    Arm("ascending_wsd", "(b) ascending, WSD", ascending=True, end=STRONG_END, averaged=False),
    Arm("ascending_constant", "(c) ascending, constant, average", ascending=True, end=1.0, averaged=True),
    Arm(
        "ascending_moderate", "(d) ascending, moderate decay, average", ascending=True, end=MODERATE_END, averaged=True
    ),
    # Not in the claim: without them nobody can separate what the order gives from what the average gives.
    Arm("uniform_constant", "(e) uniform, constant, average", ascending=False, end=1.0, averaged=True),
    Arm("uniform_moderate", "(f) uniform, moderate decay, average", ascending=False, end=MODERATE_END, averaged=True),
)


@dataclass(frozen=True, slots=True)
class Study:
    """What all runs share."""

    size: str
    steps: int
    learning_rate: float
    precision: str
    data_digest: str

    @property
    def shape(self) -> Size:
        """Model and batch."""
        return SIZES[self.size]

    @property
    def step_tokens(self) -> int:
        """Predicted tokens of a step."""
        return self.shape.batch * self.shape.seq_length

    @property
    def tokens(self) -> int:
        """Predicted tokens of a run."""
        return self.steps * self.step_tokens

    @property
    def digest(self) -> str:
        """Identifies everything but arm and seed."""
        told = [asdict(self), [str(part) for part in (self.shape, WARM_UP, DECAY, AVERAGED, AVERAGED_SPACING)]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm.key}-seed{self.seed}"


class Clock:
    """How much of the time that was given is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Return the seconds left, infinity without a limit."""
        return self._end - time.monotonic()


def phases_of(study: Study, arm: Arm) -> list[dict[str, Any]]:
    """Return warm-up, the stable part and the end.

    The documents of each are those between two quantiles of the order.
    """
    warm, decay = max(1, round(study.steps * WARM_UP)), max(1, round(study.steps * DECAY))
    steps = {"warm-up": warm, "stable": study.steps - warm - decay, "end": decay}
    edges = [0.0, WARM_UP, 1.0 - DECAY, 1.0]
    peak = study.learning_rate
    last = {"start": peak, "end": peak * arm.end, "shape": "constant" if arm.end == 1.0 else "sqrt"}
    rates = [{"start": peak / 100, "end": peak, "shape": "warmup"}, {"start": peak, "end": peak}, last]
    return [
        {
            "name": name,
            "order": "curriculum",
            "tokens": steps[name] * study.step_tokens,
            "lr": rates[number],
            "band": f"band [{edges[number]:.0%}, {edges[number + 1]:.0%}) by tokens",
        }
        for number, name in enumerate(steps)
    ]


def plan_of(study: Study, run: Run, data: StudyData, *, averaging: bool = True) -> dict[str, Any]:
    """The plan of a run. Uniform and ascending differ in the name of the score alone, which is a lot in one of them."""
    score = f"{'noisy' if run.arm.ascending else 'lot'}_{run.seed}"
    passes = math.ceil(1.05 * study.tokens / data.total_tokens)
    phases = []
    for phase in phases_of(study, run.arm):
        band = phase.pop("band")
        parts = {name: {"keep": band, "weight": data.tokens[name], "max_repeat": passes} for name in DOMAINS}
        phases.append({**phase, "sources": parts})
    shard = {name: str(data.shards / f"{name}_text_document") for name in (*DOMAINS, *(f"clean_{d}" for d in DOMAINS))}
    held_out = [name for name in shard if name not in DOMAINS]
    every = max(1, round(study.steps * AVERAGED_SPACING))
    return {
        "seq_length": study.shape.seq_length,
        "seed": run.seed,
        "tokenizer": {"type": "HuggingFaceTokenizer", "model": str(data.tokenizer)},
        "sources": {name: {"shards": shard[name], "score": score, "domain": name} for name in DOMAINS}
        | {name: {"shards": shard[name], "domain": name} for name in held_out},
        "phases": phases,
        "validation": {name: {"documents": _documents(shard[name]) - 1} for name in held_out},
    } | ({"averaging": {"last": AVERAGED, "every": every, "weights": "mean"}} if averaging else {})


def _documents(prefix: str) -> int:
    from megatron_kaiyuan.shards.manifest import load_manifest

    return load_manifest(prefix).documents


def training_command(study: Study, run: Run, plan: Path, folder: Path, *more: str) -> list[str]:
    """Return the command that pretrains from the first sample.

    Only the averaged checkpoints and the last one are written, weights alone.
    """
    shape = study.shape
    optimizer = "--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0"
    return [
        *[sys.executable, "-m", "megatron_kaiyuan.pretrain", "--plan", str(plan), *shape.model.flags()],
        *f"--micro-batch-size {shape.micro_batch} --global-batch-size {shape.batch} {optimizer}".split(),
        *([] if study.precision == "fp32" else [f"--{study.precision}"]),
        *f"--seed {run.seed} --num-workers 0 --eval-iters 1 --eval-interval 1000000000".split(),
        *["--kaiyuan-metrics", str(folder / "metrics.jsonl"), "--kaiyuan-activation-interval", "0", *more],
    ]


def finished(study: Study, run: Run, results: Path) -> dict[str, Any] | None:
    """Return the result of a run, None if there is none.

    Raises:
        StudyError: it is of a study with other settings.
    """
    path = results / f"{run.name}.json"
    if not path.is_file():
        return None
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if told["study"] != study.digest:
        raise StudyError(
            f"{path}: is of a study with another size, budget, rate, precision or text ({told['study']}, not "
            f"{study.digest}); give the same flags as then, or another --output"
        )
    return told


def conduct(study: Study, run: Run, data: StudyData, folder: Path, clock: Clock) -> dict[str, Any]:
    """Train, average and evaluate.

    The result goes to `folder/results`, and checkpoints are deleted.

    Raises:
        StudyError: a command failed or the time ran out; the run's log says how far it came.
    """
    place = folder / "runs" / run.name
    shutil.rmtree(place, ignore_errors=True)  # what an interrupted attempt left
    place.mkdir(parents=True)
    plan, saved, averaged = place / "plan.yaml", place / "checkpoints", place / "averaged"
    content = plan_of(study, run, data)
    plan.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    began = time.monotonic()
    saving = ["--save", str(saved), "--save-interval", "1000000000", "--no-save-optim", "--no-save-rng"]
    _command(place, clock, training_command(study, run, plan, place, "--log-interval", "5", *saving))
    _tool(place, clock, "average_checkpoints.py", saved, "--planned", "--output", averaged)
    windows = [] if study.shape.windows is None else ["--windows", study.shape.windows]
    losses = place / "losses.json"
    _tool(place, clock, "evaluate.py", saved, averaged, "--plan", plan, "--json", losses, "--batch-size", 32, *windows)
    result = _result(study, run, plan, place, time.monotonic() - began)
    write_text_atomically(folder / "results" / f"{run.name}.json", json.dumps(result) + "\n")
    for checkpoints in (saved, averaged):
        shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def _result(study: Study, run: Run, plan: Path, place: Path, seconds: float) -> dict[str, Any]:
    """What is kept of a run."""
    entries = read_metrics(place / "metrics.jsonl")
    evaluated = json.loads((place / "losses.json").read_text(encoding="utf-8"))["results"]
    keep = max(1, len(entries) // CURVE_POINTS)
    return {
        "study": study.digest,
        "arm": run.arm.key,
        "seed": run.seed,
        "plan_fingerprint": Plan.load(plan).fingerprint,
        "steps": entries[-1]["iteration"],
        "tokens": study.tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": _rate(entries[len(entries) // 5 :]),
        "skipped_steps": sum(entry["skipped_steps"] for entry in entries),
        "held_out": {name: part["sources"] for name, part in zip(("last", "average"), evaluated, strict=True)},
        "curve": [
            [entry["iteration"] * study.step_tokens, entry["loss"], entry["learning_rate"]] for entry in entries[::keep]
        ],
    }


def _rate(entries: Sequence[dict[str, Any]]) -> float:
    return statistics.median(entry["tokens"] / entry["seconds"] for entry in entries)


@dataclass(frozen=True, slots=True)
class Probe:
    """A short measurement of what a machine does."""

    tokens_per_second: float
    """Of all runs that share it."""
    start_seconds: float
    """From the command to the first step."""


def measure_rate(study: Study, data: StudyData, folder: Path, concurrent: int, clock: Clock) -> Probe:
    """Train so many first runs for some steps at once.

    Raises:
        StudyError: one of them failed.
    """
    place = folder / "probe"
    shutil.rmtree(place, ignore_errors=True)
    began = time.monotonic()
    processes = []
    for number in range(concurrent):
        run, own = Run(ARMS[0], 1), place / str(number)
        own.mkdir(parents=True)
        plan = own / "plan.yaml"
        plan.write_text(yaml.safe_dump(plan_of(study, run, data, averaging=False), sort_keys=False), encoding="utf-8")
        more = ["--log-interval", "1", "--exit-interval", str(PROBE_STEPS)]
        log = (own / "log.txt").open("w")
        command = training_command(study, run, plan, own, *more)
        processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(), cwd=ROOT))
    try:
        codes = [process.wait(timeout=max(1.0, clock.left)) for process in processes]
    except subprocess.TimeoutExpired:
        raise StudyError("the probe took all the time that was given; say --tokens-per-second instead") from None
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise StudyError(f"the probe failed: {_tail(place / str(codes.index(max(codes, key=abs))) / 'log.txt')}")
    entries = [read_metrics(place / str(number) / "metrics.jsonl") for number in range(concurrent)]
    steps = statistics.mean(sum(entry["seconds"] for entry in part[1:]) for part in entries)
    rate = sum(_rate(part[PROBE_WARM_UP:]) for part in entries)
    return Probe(rate, max(1.0, time.monotonic() - began - steps))


def _tool(place: Path, clock: Clock, name: str, *arguments: object) -> None:
    _command(place, clock, [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)])


def _command(place: Path, clock: Clock, command: Sequence[str]) -> None:
    """Run it with its output in the run's log."""
    log = place / "log.txt"
    with log.open("a", encoding="utf-8") as stream:
        stream.write("$ " + " ".join(command) + "\n")
        stream.flush()
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=_environment(),
                cwd=ROOT,
                timeout=None if math.isinf(clock.left) else max(1.0, clock.left),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StudyError(f"{place.name}: the time that was given ran out; start the same command again") from None
    if done.returncode:
        raise StudyError(f"{place.name}: exit code {done.returncode} of {command[1:3]}: {_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])


def _environment() -> dict[str, str]:
    """One thread a process: several runs share the machine, and the GPU does the work."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
