"""Runs of two processes that are killed, signalled and restarted end as if nothing had happened."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from megatron_kaiyuan.training.checkpoint_io import saved_iterations
from tests.functional_tests.kill_and_resume import different_tensors, end, flags_of, lengthen, run_until, start
from tests.functional_tests.training_run import write_corpus

AVERAGING = "averaging: {last: 3, every: 2, weights: wma}\n"
STEPS = 48
"""Enough for a signal to arrive in time on any machine."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = write_corpus(tmp_path_factory.mktemp("corpus"))
    lengthen(plan, STEPS)
    plan.write_text(plan.read_text() + AVERAGING)
    return plan


@pytest.fixture(scope="module")
def undisturbed(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Saved every fifteenth step, of which the newest is kept; steps 44, 46 and 48 are for the average."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_until(folder, "never printed", 0, *flags_of(plan, 15), "--kaiyuan-keep-checkpoints", "1")[0]


def test_the_averaged_steps_are_saved_and_never_deleted(undisturbed: tuple[Path, str]) -> None:
    folder, output = undisturbed
    assert saved_iterations(folder / "saved") == [44, 46, 48]
    assert "deleting the checkpoint of iteration 15" in output
    assert "deleting the checkpoint of iteration 45" in output
    assert "the plan averages iterations 44, 46, 48 (wma)" in output
    assert "tools/average_checkpoints.py saved --planned --output saved-averaged" in output


def signal_at(folder: Path, marker: str, number: signal.Signals, *flags: str, to_ranks: bool) -> tuple[int, str]:
    """Start the run and send a signal, to the ranks or to torchrun, when `marker` is printed; exit code and output."""
    process: subprocess.Popen[str] = start(folder, *flags)
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if marker in line and not any(marker in earlier for earlier in lines):
                children = [child.pid for child in psutil.Process(process.pid).children()]
                for pid in children if to_ranks else [process.pid]:
                    os.kill(pid, number)
            lines.append(line)
        return process.wait(timeout=60), "".join(lines)
    finally:
        end(process)


def test_a_run_killed_and_signalled_again_and_again_ends_bit_for_bit_alike(
    undisturbed: tuple[Path, str], plan: Path, tmp_path: Path
) -> None:
    rarely, tracker = flags_of(plan, 100), tmp_path / "saved" / "latest_checkpointed_iteration.txt"
    assert run_until(tmp_path, "iteration        2/", 0, *rarely)[1], "killed at a step"
    assert not tracker.exists()
    code, output = signal_at(tmp_path, "iteration        1/", signal.SIGUSR1, *rarely, to_ranks=True)
    assert code == 0, output[-3000:]
    first = int(tracker.read_text())
    assert 1 <= first < STEPS
    assert run_until(tmp_path, "saving checkpoint", 0.01, *flags_of(plan, 1))[1], "killed while saving"
    second = int(tracker.read_text())
    code, output = signal_at(tmp_path, f"iteration {second + 1:8d}/", signal.SIGTERM, *rarely, to_ranks=False)
    assert "exiting program after receiving SIGTERM" in output, output[-3000:]
    assert second < int(tracker.read_text()) < STEPS
    run_until(tmp_path, "never printed", 0, *rarely)
    assert different_tensors(undisturbed[0], tmp_path, STEPS) == []


def test_a_run_that_is_complete_says_so_and_succeeds(undisturbed: tuple[Path, str], plan: Path) -> None:
    assert "the run is complete" in run_until(undisturbed[0], "never printed", 0, *flags_of(plan, 15))[0]


def test_a_start_that_would_write_over_the_run_is_refused(undisturbed: tuple[Path, str], plan: Path) -> None:
    folder, _ = undisturbed
    flags = [flag for flag in flags_of(plan, 15) if flag != "--load"]
    flags.pop(flags.index("saved") + 1)  # what --load named
    process = start(folder, *flags)
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        end(process)
    assert process.returncode == 1
    assert "ResumeError: --save saved already holds a run (its last checkpoint: 48): --load saved continues" in output
    assert output.count("ResumeError") == 1
