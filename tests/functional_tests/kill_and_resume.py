"""Kill a run of two processes again and again, and compare its end with that of an undisturbed one.

`python -m tests.functional_tests.kill_and_resume --kills 20` from the repository root takes about ten minutes; the test
suite does it with fewer kills.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tests.functional_tests.training_run import (
    MODEL_FLAGS,
    STEPS,
    TRAINING_FLAGS,
    saved_tensors,
    write_corpus,
)

LIMIT = 240


@dataclass(frozen=True)
class Killed:
    """One start of the run that was ended."""

    how: str
    latest: int
    """What the tracker says then; 0 where there is none."""
    torn: list[str]
    """Folders without their last file."""


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Two processes that train, in a session of their own; stdout and stderr go to one pipe."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "-m", "megatron_kaiyuan.pretrain", *MODEL_FLAGS, *TRAINING_FLAGS, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """SIGKILL to every process of the run at once; torchrun gives each rank a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def run_until(folder: Path, marker: str, delay: float, *flags: str) -> tuple[str, bool]:
    """Start the run and kill it `delay` seconds after a line with `marker`.

    Returns:
        What it printed, and whether it was killed (it may come to its end before).
    """
    process = start(folder, *flags)
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if marker in line:
                time.sleep(delay)
                return "".join(lines), process.poll() is None
        assert process.wait(timeout=LIMIT) == 0, "".join(lines)[-4000:]
        return "".join(lines), False
    finally:
        end(process)


def flags_of(plan: Path, interval: int) -> list[str]:
    """A run in FP16 that saves, and continues what it has saved."""
    half = ["--fp16", "--initial-loss-scale", str(2**20), "--hysteresis", "1"]
    return ["--plan", str(plan), "--save", "saved", "--load", "saved", "--save-interval", str(interval), *half]


def lengthen(plan: Path, steps: int) -> None:
    """Rewrite the plan of `write_corpus` so that its run has so many steps, a multiple of six."""
    text = plan.read_text().replace("tokens: 768", f"tokens: {768 * steps // STEPS}")
    plan.write_text(
        text.replace("scored: all, plain: all", "scored: {repeat: 4}, plain: {repeat: 4}")
        .replace("repeat: 2}", "repeat: 16}")
        .replace("random 40%", "random 40%, repeat: 16")
    )


def saved_step(folder: Path) -> int:
    """What the tracker says; 0 where nothing has been saved."""
    tracker = folder / "saved" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def kill_often(folder: Path, plan: Path, steps: int, kills: int, interval: int, seed: int) -> list[Killed]:
    """Kill at random steps, in every second start while it saves; the run is left unfinished."""
    choice, history = random.Random(seed), []
    flags = flags_of(plan, interval)
    for number in range(kills):
        step = min(steps - 1, saved_step(folder) + choice.randint(1, interval))
        saving = number % 2 == 1
        marker = "saving checkpoint" if saving else f"iteration {step:8d}/"
        delay = choice.uniform(0, 0.06) if saving else choice.uniform(0, 0.03)
        output, killed = run_until(folder, marker, delay, *flags)
        if not killed:
            break
        torn = [str(path.name) for path in (folder / "saved").glob("iter_*") if not (path / "metadata.json").exists()]
        how = f"{'while saving' if saving else f'at step {step}'} + {delay * 1000:.0f} ms"
        fell_back = " (after a fallback)" if "FALLING BACK" in output else ""
        history.append(Killed(how + fell_back, saved_step(folder), sorted(torn)))
    return history


def different_tensors(one: Path, other: Path, step: int) -> list[str]:
    """Weights, main weights, optimizer and loss-scaler state that differ in the last checkpoints of two runs."""
    ours, theirs = (saved_tensors(folder / "saved" / f"iter_{step:07d}") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def main() -> None:
    """Report every kill and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = 60
        plan = write_corpus(folder)
        lengthen(plan, steps)
        for run in ("undisturbed", "killed"):
            (folder / run).mkdir()
        began = time.perf_counter()
        run_until(folder / "undisturbed", "never printed", 0, *flags_of(plan, 3))
        for event in kill_often(folder / "killed", plan, steps, arguments.kills, 3, arguments.seed):
            print(f"killed {event.how}: tracker {event.latest}, torn {event.torn}", flush=True)
        run_until(folder / "killed", "never printed", 0, *flags_of(plan, 3))
        different = different_tensors(folder / "undisturbed", folder / "killed", steps)
        print(f"{time.perf_counter() - began:.0f} s; tensors that differ at step {steps}: {different or 'none'}")


if __name__ == "__main__":
    main()
