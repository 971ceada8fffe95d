"""Training of a study's runs: several at a time, each resumable, none twice, failures reported with their last lines.

A run is finished when `run.json` in its folder says so for the same digest. Whoever trains a run holds a lock on its
folder, which its process inherits, so two tasks never write one checkpoint and an orphaned process keeps its lock.
"""

import fcntl
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.failures import line_that_matters
from megatron_kaiyuan.quantile.runs import Run, last_step, run_folder, training_command
from megatron_kaiyuan.quantile.study import Study

__all__ = ["FinishedRun", "RunOutcome", "TrainingProgress", "check_trunks", "finished_run", "train_runs"]

_STEP = re.compile(rb" iteration +(\d+)/ *(\d+) \|.*?elapsed time per iteration \(ms\): ([\d.]+)")
_TAIL_LINES = 12
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60.0

TrainingProgress = Callable[[int], None]
"""Called with the number of training steps that were done since the last call."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that reached its last step."""

    digest: str
    steps: int
    tokens: int
    seconds: float
    """Wall time of all attempts of this process; start-up and saving included."""
    tokens_per_second: float
    """Of the median step of the last attempt."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What became of a run."""

    run: Run
    state: str
    """`trained`, `already finished`, `busy` (another task trains it) or `failed`."""
    detail: str = ""
    """Of a failure: the exit code and the end of the log."""
    log: str = ""


@dataclass
class _Active:
    """A run in training."""

    run: Run
    process: subprocess.Popen[bytes]
    lock: IO[bytes]
    slot: int
    log: Path
    read: int
    """Bytes of the log that were read."""
    began: float
    steps: int = 0


def finished_run(study: Study, run: Run) -> FinishedRun | None:
    """The record of a run that is finished, None when it is not.

    Raises:
        StudyError: the folder holds a run of another study.
    """
    path = run_folder(study, run) / "run.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["digest"] != run.digest:
        raise StudyError(
            f"{path.parent}: holds a run with another plan, model or training ({record['digest']}, not {run.digest}); "
            "give the study another output folder, or remove this one"
        )
    return FinishedRun(**record) if record.get("steps") == last_step(study, run) else None


def check_trunks(study: Study, trunks: Sequence[Run]) -> None:
    """Refuse to branch from trunks that are not there.

    Raises:
        StudyError: a trunk is not finished, or was trained on another mix, model or rate.
    """
    for trunk in trunks:
        if finished_run(study, trunk) is None:
            raise StudyError(
                f"{run_folder(study, trunk)}: the trunk is not trained to its last step; run `train --trunk` with "
                "the study that trains it, then `train` again"
            )


def train_runs(
    study: Study, runs: Sequence[Run], *, concurrent: int = 1, progress: TrainingProgress = lambda _: None
) -> list[RunOutcome]:
    """Train what is not finished yet, in order.

    A failure does not stop the others.

    Args:
        study: The study.
        runs: Which of its runs.
        concurrent: How many at a time. They share the visible GPUs in turn, one for each process of a run.
        progress: Notified of finished steps.

    Raises:
        StudyError: a folder holds a run of another study.
    """
    if concurrent < 1:
        raise StudyError(f"--concurrent {concurrent}: give at least 1")
    outcomes: dict[str, RunOutcome] = {}
    waiting = []
    for run in runs:
        if finished_run(study, run) is None:
            waiting.append(run)
        else:
            outcomes[run.name] = RunOutcome(run, "already finished")
            progress(_own_steps(study, run))
    _run_all(study, waiting, concurrent, progress, outcomes)
    return [outcomes[run.name] for run in runs]


def _run_all(
    study: Study, waiting: list[Run], concurrent: int, progress: TrainingProgress, outcomes: dict[str, RunOutcome]
) -> None:
    active: list[_Active] = []
    try:
        while waiting or active:
            while waiting and len(active) < concurrent:
                slot = min(set(range(concurrent)) - {other.slot for other in active})
                started = _start(study, waiting[0], slot, concurrent)
                run = waiting.pop(0)
                if isinstance(started, RunOutcome):
                    outcomes[run.name] = started
                    progress(_own_steps(study, run) if started.state == "already finished" else 0)
                else:
                    active.append(started)
            for one in list(active):
                _follow(one, progress)
                if one.process.poll() is not None:
                    active.remove(one)
                    _follow(one, progress)
                    outcomes[one.run.name] = _finish(study, one)
            if active:
                time.sleep(_POLL_SECONDS)
    finally:
        _stop(active)


def _start(study: Study, run: Run, slot: int, concurrent: int) -> _Active | RunOutcome:
    """Start a run, or say why there is nothing to start."""
    folder = run_folder(study, run)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return RunOutcome(run, "busy", "another process holds its lock")
    try:
        if finished_run(study, run) is not None:  # by another task, after this one had looked
            lock.close()
            return RunOutcome(run, "already finished")
        _claim_folder(study, run)
    except StudyError:
        lock.close()
        raise
    command = training_command(study, run)
    log = folder / "log.txt"
    with log.open("ab") as stream:
        began_at = stream.tell()
        stream.write(("$ " + " ".join(command) + "\n").encode())
        stream.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=_environment(study, slot, concurrent),
            pass_fds=[lock.fileno()],
        )
    before = last_step(study, run) - _own_steps(study, run)
    return _Active(run, process, lock, slot, log, began_at, time.monotonic(), before)


def _own_steps(study: Study, run: Run) -> int:
    """Steps that a run does itself: those of a trunk come before its branches."""
    return study.trunk_steps if run.control == "trunk" else study.steps


def _claim_folder(study: Study, run: Run) -> None:
    """Refuse to continue checkpoints of another run, and remember whose they will be.

    Raises:
        StudyError: they are of a run with another plan, model or training.
    """
    path = run_folder(study, run) / "digest.txt"
    if path.is_file() and path.read_text().strip() != run.digest:
        raise StudyError(
            f"{path.parent}: holds an unfinished run with another plan, model or training ({path.read_text().strip()}, "
            f"not {run.digest}); give the study another output folder, or remove this one"
        )
    write_text_atomically(path, run.digest + "\n")


def _environment(study: Study, slot: int, concurrent: int) -> dict[str, str]:
    """Return the environment that gives each concurrent run GPUs of its own, as far as they reach.

    CPU threads are shared out where nobody has set them.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    threads = max(1, (os.cpu_count() or 1) // (concurrent * study.training.processes))
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if concurrent > 1:
        devices, each = _visible_devices(environment.get("CUDA_VISIBLE_DEVICES")), study.training.processes
        groups = [devices[first : first + each] for first in range(0, len(devices) - each + 1, each)]
        if groups:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(groups[slot % len(groups)])
    return environment


def _visible_devices(told: str | None) -> list[str]:
    """Return the names of the GPUs that a process may use, as CUDA reads `CUDA_VISIBLE_DEVICES`.

    Without the variable these are all GPUs.
    """
    if told is None:
        return [str(number) for number in range(_device_count())]
    names = [name.strip() for name in told.split(",")]
    return list(takewhile(lambda name: name and not name.startswith("-"), names))


@functools.cache
def _device_count() -> int:
    """Return the number of GPUs of this machine.

    torch asks the driver's library, which makes no context here.
    """
    import torch  # takes seconds, and nothing else here needs it

    return torch.cuda.device_count()


def _follow(one: _Active, progress: TrainingProgress) -> None:
    """Read what is new in the log up to its last whole line."""
    with one.log.open("rb") as stream:
        stream.seek(one.read)
        new = stream.read()
    whole = new[: new.rfind(b"\n") + 1]
    one.read += len(whole)
    found = _STEP.findall(whole)
    if found:
        last = int(found[-1][0])
        progress(max(0, last - one.steps))
        one.steps = max(one.steps, last)


def _finish(study: Study, one: _Active) -> RunOutcome:
    """Record what became of a run.

    Its lock is kept until then, or another task would start it once more.
    """
    with one.lock:
        return _outcome(study, one)


def _outcome(study: Study, one: _Active) -> RunOutcome:
    folder = run_folder(study, one.run)
    saved = _saved_step(folder / "checkpoints")
    last, own = last_step(study, one.run), _own_steps(study, one.run)
    if one.process.returncode != 0 or saved != last:
        lines = one.log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = line_that_matters(lines)
        lines = lines[-_TAIL_LINES:] if told is None else [told]
        reason = f"exit code {one.process.returncode}, checkpoint at step {saved} of {last}"
        return RunOutcome(one.run, "failed", "\n".join([reason, *lines]), str(one.log))
    steps = [float(ms) for _, _, ms in _STEP.findall(one.log.read_bytes())]
    per_step = statistics.median(steps) if steps else float("nan")
    record = FinishedRun(
        digest=one.run.digest,
        steps=last,
        tokens=own * study.training.global_batch_size * study.seq_length,
        seconds=time.monotonic() - one.began,
        tokens_per_second=study.training.global_batch_size * study.seq_length / per_step * 1000,
    )
    write_text_atomically(folder / "run.json", json.dumps(asdict(record)) + "\n")
    _remove_earlier_checkpoints(folder / "checkpoints", last)
    return RunOutcome(one.run, "trained")


def _saved_step(checkpoints: Path) -> int:
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def _remove_earlier_checkpoints(checkpoints: Path, last: int) -> None:
    for folder in checkpoints.glob("iter_*"):
        if int(folder.name.removeprefix("iter_")) < last:
            shutil.rmtree(folder)


def _stop(active: Sequence[_Active]) -> None:
    """End what still runs.

    torchrun ends its own workers.
    """
    for one in active:
        one.process.send_signal(signal.SIGTERM)
    for one in active:
        try:
            one.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        one.lock.close()
