"""Two proofs on several ranks: a resume on fewer goes on with the same samples, and the loss of a rank is survived."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.scaling_jobs import LEARNING_RATE, Budget, Job, Layout, Shape, end_family, launch, run_job, tail
from megatron_kaiyuan.checkpoints.reading import TRACKER_NAME
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.monitoring.metrics_file import read_metrics

__all__ = [
    "Elastic",
    "LostRank",
    "as_data",
    "elastic_proof",
    "loss_tolerance",
    "lost_rank_proof",
    "recorded_steps",
    "resume_layouts",
    "undisturbed",
]

RESHARDABLE = ("--dist-ckpt-optim-fully-reshardable",)
POLL_SECONDS = 0.05
ROUNDING = {"fp32": 2.0**-18, "fp16": 2.0**-10}
"""Relative difference of a gradient, and of a logit, that another order of the same sums may make."""


@dataclass(frozen=True, slots=True)
class Elastic:
    """One resume on other ranks, compared with the run that was not interrupted."""

    layout: str
    processes: int
    steps: int
    same_samples: bool
    """Whether every step had the same sample numbers as in the run that was not interrupted."""
    first_samples: list[int]
    """Of the first step after the resume, ascending, at most eight of them."""
    largest_difference: float
    """Of the losses, over all steps."""
    first_difference: float
    """Of the first step, whose weights are the same: forward rounding alone."""
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether both claims do."""
        return self.same_samples and self.largest_difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class LostRank:
    """What happened after one process was killed."""

    victim: int
    killed_after_step: int
    seconds: float
    """From the kill until the job had ended."""
    exit_code: int
    message: str
    """The lines that name the rank; empty if none does."""
    resumed_from: int
    """Checkpoint that the next start continued."""
    repeats: bool
    """Whether the steps after it saw the samples of the undisturbed run."""
    largest_difference: float
    """Of the losses after the resume."""
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the job stopped, said who was lost, and went on as if nothing had happened."""
        survived = self.repeats and self.largest_difference <= self.tolerance
        return self.exit_code != 0 and bool(self.message) and self.resumed_from > 0 and survived


def loss_tolerance(precision: str, steps: int, parameters: int, gradient_norm: float, loss: float) -> float:
    """How far the loss may move when the same sums are taken in another order.

    Gradients differ by a factor of 1 +- r, and Adam turns that into at most 2 r lr a weight and step. After `steps`
    steps the weights differ by at most 2 r lr steps sqrt(parameters) in norm, and the loss by that times the norm of
    its gradient. The forward pass rounds too: r times the loss.
    """
    rounding = ROUNDING[precision]
    return 2 * rounding * LEARNING_RATE * steps * parameters**0.5 * gradient_norm + rounding * loss


def resume_layouts(processes: int) -> list[Layout]:
    """Return the layouts to resume on: half the ranks with a tensor-parallel size of 2, and a quarter.

    Where there are two ranks: both and one.
    """
    half, quarter = (2, 1) if processes == 2 else (processes // 2, max(1, processes // 4))
    return [Layout(half, tensor=2), Layout(quarter)]


def recorded_steps(folder: Path, global_batch: int, data_parallel: int, steps: int) -> list[set[int]]:
    """Sample numbers of each step, from what every process wrote.

    Raises:
        StudyError: a process read fewer samples than its share of the steps.
    """
    share = global_batch // data_parallel
    found: list[set[int]] = [set() for _ in range(steps)]
    files = [path for path in sorted(folder.glob("rank*.txt")) if path.stat().st_size]
    for path in files:
        numbers = [int(line) for line in path.read_text().split()]
        if len(numbers) < share * steps:
            raise StudyError(f"{path}: {len(numbers)} samples, but {steps} steps of {share} a rank were asked for")
        for step in range(steps):
            found[step] |= set(numbers[step * share : (step + 1) * share])
    if not files:
        raise StudyError(f"{folder}: no process recorded a sample")
    return found


def saving(folder: Path, interval: int) -> tuple[str, ...]:
    """Flags of a run that saves there and continues what it has saved."""
    return ("--save", str(folder), "--load", str(folder), "--save-interval", str(interval), *RESHARDABLE)


def undisturbed(
    shape: Shape,
    plan: Path,
    folder: Path,
    processes: int,
    precision: str,
    steps: int,
    global_batch: int,
    budget: Budget,
) -> Job:
    """Run `2 x steps` steps on all ranks with a checkpoint midway.

    It is run once, and used as it is after that.

    Raises:
        StudyError: the job failed or did not end.
    """
    job = Job(
        shape, Layout(processes), plan, folder, global_batch // processes, global_batch, 2 * steps, precision,
        saving(folder / "checkpoints", steps), record=True,
    )  # fmt: skip
    stamp, told = folder / "finished.txt", " ".join(job.command())
    if not stamp.is_file() or stamp.read_text() != told:
        shutil.rmtree(folder, ignore_errors=True)
        budget.require(1, folder.name)
        run_job(job, budget.seconds())
        stamp.write_text(told)
    return job


def elastic_proof(whole: Job, layout: Layout, folder: Path, budget: Budget) -> Elastic:
    """The second half of the undisturbed run again, from its checkpoint, on other ranks.

    Raises:
        StudyError: the job was not started, failed or did not end.
    """
    budget.require(1, f"elastic, {layout.name}")
    steps = whole.exit_at // 2
    name = layout.name.replace(" ", "")
    shutil.rmtree(folder / name, ignore_errors=True)  # its metrics would be appended to
    flags = ("--load", str(whole.folder / "checkpoints"), "--ckpt-step", str(steps), *RESHARDABLE)
    micro = whole.global_batch // layout.data // 2 or 1
    job = replace(whole, layout=layout, folder=folder / name, flags=flags, micro_batch=micro)
    run_job(job, budget.seconds())
    expected = recorded_steps(whole.folder / "samples", whole.global_batch, whole.layout.data, 2 * steps)[steps:]
    seen = recorded_steps(job.folder / "samples", job.global_batch, layout.data, steps)
    largest, first, tolerance = _differences(whole, job, steps)
    numbers = sorted(seen[0])[:8]
    return Elastic(layout.name, layout.processes, steps, seen == expected, numbers, largest, first, tolerance)


def _differences(whole: Job, other: Job, after: int) -> tuple[float, float, float]:
    """Largest and first difference of the losses of the steps after `after`, and the tolerance.

    Raises:
        StudyError: a step is missing.
    """
    runs = [
        {entry["iteration"]: entry for entry in read_metrics(job.folder / "metrics.jsonl")} for job in (whole, other)
    ]
    wanted = range(after + 1, whole.exit_at + 1)
    if missing := [step for step in wanted if any(step not in run or run[step]["loss"] is None for run in runs)]:
        raise StudyError(f"{other.folder}: steps {missing} have no loss in metrics.jsonl of both runs")
    differences = [abs(runs[0][step]["loss"] - runs[1][step]["loss"]) for step in wanted]
    norm = max(runs[0][step]["grad_norm"] for step in wanted)
    loss = max(runs[0][step]["loss"] for step in wanted)
    tolerance = loss_tolerance(whole.precision, len(wanted), whole.shape.parameters, norm, loss)
    return max(differences), differences[0], tolerance


def lost_rank_proof(whole: Job, folder: Path, interval: int, timeout: float, budget: Budget) -> LostRank:
    """Kill the last rank after the first checkpoint, wait for the job to end, start it again.

    Args:
        whole: The undisturbed run, finished: same layout, same samples.
        folder: For the job that is killed.
        interval: Steps between its checkpoints; at least three of them must fit the run.
        timeout: Seconds within which the job must have ended.
        budget: Time of both starts.

    Raises:
        StudyError: the job was not started, ended by itself, hung, or could not be started again.
    """
    budget.require(2, "lost")
    shutil.rmtree(folder, ignore_errors=True)
    job = replace(whole, folder=folder, flags=saving(folder / "checkpoints", interval))
    victim = whole.layout.processes - 1
    patience = min(timeout, budget.left)
    killed_after, seconds, code = _kill_one(job, victim, interval, patience, budget.seconds())
    message = "\n".join(lines_that_name(victim, folder / "log.txt"))
    shutil.move(folder / "samples", folder / "samples_before")
    # By Megatron's tracker: a checkpoint that was being written when the rank died is there, and is none.
    from_step = int((folder / "checkpoints" / TRACKER_NAME).read_text())
    run_job(job, budget.seconds())
    steps = whole.exit_at - from_step
    expected = recorded_steps(whole.folder / "samples", whole.global_batch, whole.layout.data, whole.exit_at)[
        from_step:
    ]
    seen = recorded_steps(folder / "samples", job.global_batch, job.layout.data, steps)
    largest, _, tolerance = _differences(whole, job, from_step)
    return LostRank(
        victim, killed_after, round(seconds, 1), code, message, from_step, seen == expected, largest, tolerance
    )


def _kill_one(job: Job, victim: int, interval: int, timeout: float, limit: float) -> tuple[int, float, int]:
    """Step after which the rank was killed, seconds until the job had ended, its exit code."""
    process = launch(job)
    try:
        step = _wait_for(job, process, interval + 1, limit)
        _worker(process, victim).send_signal(signal.SIGKILL)
        began = time.monotonic()
        code = process.wait(timeout=timeout)
        return step, time.monotonic() - began, code
    except subprocess.TimeoutExpired:
        end = tail(job.folder / "log.txt", 2)
        raise StudyError(f"{job.folder}: still runs {timeout:.0f} s after rank {victim} was killed: {end}") from None
    finally:
        end_family(process)


def _wait_for(job: Job, process: subprocess.Popen[bytes], step: int, limit: float) -> int:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        entries = read_metrics(job.folder / "metrics.jsonl")
        if entries and entries[-1]["iteration"] >= step:
            return int(entries[-1]["iteration"])
        if process.poll() is not None:
            raise StudyError(f"{job.folder}: ended before step {step}: {tail(job.folder / 'log.txt', 3)}")
        time.sleep(POLL_SECONDS)
    raise StudyError(f"{job.folder}: did not reach step {step} within {limit:.0f} s")


def _worker(process: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process of a rank.

    Raises:
        StudyError: there is none.
    """
    for child in psutil.Process(process.pid).children():  # a rank's own children carry its number too
        if child.environ().get("RANK") == str(rank):
            return child
    raise StudyError(f"no process of rank {rank} was found under torchrun ({os.getpid()})")


def lines_that_name(rank: int, log: Path) -> list[str]:
    """Lines of torchrun's summary that say which rank failed, and by what."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [number for number, line in enumerate(lines) if re.search(rf"\brank\s*:\s*{rank}\b", line)]
    return [line.strip() for number in named[-1:] for line in lines[number : number + 4]]


def as_data(proofs: Sequence[Elastic | LostRank]) -> list[dict[str, Any]]:
    """For the results file."""
    return [asdict(proof) | {"holds": proof.holds} for proof in proofs]
