"""Runs that are stopped, or started twice, end as they should; benchmarks/faults.py does it all again and again."""

import os
import random
import re
import signal
from pathlib import Path

import pytest

from benchmarks.fault_trials import flip
from benchmarks.faults import try_all
from megatron_kaiyuan.checkpoints.damage import damage
from megatron_kaiyuan.checkpoints.hold import HOLD_NAME
from megatron_kaiyuan.checkpoints.reading import iteration_folder
from tests.functional_tests.kill_and_resume import different_tensors, flags_of, lengthen, saved_step
from tests.functional_tests.stopped_run import running
from tests.functional_tests.training_run import STEPS, write_corpus


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so many steps that no run here comes to its end."""
    plan = write_corpus(tmp_path_factory.mktemp("corpus"))
    lengthen(plan, 600)
    return plan


def reached_step(output: str) -> int:
    """The last step that a run has logged."""
    return int(re.findall(r"\] iteration +(\d+)/", output)[-1])


def test_a_second_start_is_refused_and_an_interrupt_saves_the_first(plan: Path, tmp_path: Path) -> None:
    """One process with a loader worker, after two earlier saves."""
    flags = [*flags_of(plan, 2), "--num-workers", "1"]
    with running(tmp_path, *flags) as first:
        first.wait_for("successfully saved", times=2)
        with running(tmp_path, *flags) as second:
            code, _ = second.end(timeout=120)
        assert code == 1
        assert (
            f"ResumeError: --save {tmp_path}/saved is in use by another run: process {first.process.pid} on"
            in second.output
        )
        assert "Traceback" not in second.output
        first.process.send_signal(signal.SIGINT)
        code, seconds = first.end(timeout=60)
    assert code == 0, first.output[-3000:]
    assert seconds < 30
    assert "exiting program after receiving SIGINT" in first.output
    assert "Traceback" not in first.output
    assert saved_step(tmp_path) == reached_step(first.output) > 4
    assert not (tmp_path / "saved" / HOLD_NAME).exists()


SLOW_DISK = """
import os, time
write = os.fsync
def fsync(file):
    number = file if isinstance(file, int) else file.fileno()
    if os.path.exists("slow") and os.readlink(f"/proc/self/fd/{number}").endswith(".distcp"):
        time.sleep(60)
    write(file)
os.fsync = fsync
"""


@pytest.mark.slow
def test_a_save_of_a_minute_is_waited_for(plan: Path, tmp_path: Path) -> None:
    """torchrun would kill the ranks after 30 s, in the midst of it."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with running(tmp_path, *flags_of(plan, 2), processes=2, launcher="ours", environment=paths) as run:
        run.wait_for("successfully saved", times=2)
        (tmp_path / "slow").touch()
        run.process.send_signal(signal.SIGTERM)
        code, seconds = run.end(timeout=200)
    assert code == 0, run.output[-3000:]
    assert seconds > 60
    assert saved_step(tmp_path) == reached_step(run.output) >= 4
    assert damage(iteration_folder(tmp_path / "saved", saved_step(tmp_path))) is None


@pytest.mark.slow
def test_two_ranks_fall_back_together_and_end_bit_for_bit_alike(tmp_path: Path) -> None:
    """A bit of the part that the second rank has written, and compares: rank 0 learns of it."""
    plan, flags = write_corpus(tmp_path), ["--num-workers", "1"]
    for name in ("undisturbed", "damaged"):
        (tmp_path / name).mkdir()
        with running(tmp_path / name, *flags_of(plan, 2), *flags, processes=2, launcher="ours") as run:
            assert run.end(timeout=120)[0] == 0, run.output[-3000:]
    flip(iteration_folder(tmp_path / "damaged" / "saved", STEPS) / "__1_0.distcp", random.Random(16))
    with running(tmp_path / "damaged", *flags_of(plan, 2), *flags, processes=2, launcher="ours") as run:
        assert run.end(timeout=120)[0] == 0, run.output[-3000:]
    told = f"iter_{STEPS:07d} has other bytes in __1_0.distcp"
    assert told in run.output
    assert f"FALLING BACK to the checkpoint of iteration {STEPS - 2}" in run.output
    assert "Traceback" not in run.output
    assert different_tensors(tmp_path / "undisturbed", tmp_path / "damaged", STEPS) == []


@pytest.mark.slow
def test_some_of_the_faults_of_the_benchmark(tmp_path: Path) -> None:
    outcomes, differences = try_all(tmp_path, trials=1, flips=2, seed=16, only="SIGKILL of everything")
    assert differences == []
    assert len(outcomes) == 2 + 5 + 1
    for name, outcome in outcomes.items():
        assert outcome.problems == [], name
        assert outcome.survived == outcome.tried > 0, name
