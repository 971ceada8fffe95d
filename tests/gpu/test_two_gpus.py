"""Two GPUs give the numbers of one, and a run that loses a rank or is told to stop can be continued."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.functional_tests import test_interruption as interruption
from tests.functional_tests.kill_and_resume import (
    different_tensors,
    end,
    flags_of,
    lengthen,
    run_until,
    saved_step,
    start,
)
from tests.functional_tests.training_run import STEPS, train_well, write_corpus
from tests.helpers import run_distributed
from tests.unit_tests.model import test_parallel, tiny
from tests.unit_tests.model.test_model import assert_matches_reference

pytestmark = [pytest.mark.usefixtures("two_gpus"), pytest.mark.timeout(400)]
FP16 = ("--fp16", "--initial-loss-scale", "4096")
ZERO = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
LONG_RUN = 240
"""Steps: enough for a signal to arrive in time."""
ENDS_WITHIN = 60.0
"""Seconds from the death of a rank to the end of the run, torchrun's own grace for the others included."""


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_distributed(tiny.train_steps, 2, test_parallel.CASES, timeout=300)


@pytest.mark.parametrize("case", test_parallel.CASES, ids=lambda case: case.name)
def test_every_rank_has_the_float64_models_loss_and_gradients(case: tiny.Case, results: list[dict[str, Any]]) -> None:
    for found in results:
        assert_matches_reference(case, tiny.outcomes_of(found)[case.name])


def test_tensor_and_data_parallel_runs_go_on_with_the_losses_of_one_gpu(tmp_path: Path) -> None:
    """From one checkpoint, because each layout draws other initial weights."""
    flags = ("--plan", str(write_corpus(tmp_path)), *FP16, *ZERO, "--dist-ckpt-optim-fully-reshardable")
    flags += ("--save", "saved", "--load", "saved", "--save-interval", "100")
    train_well(tmp_path, *flags, "--exit-interval", "2")
    ways: dict[str, tuple[int, tuple[str, ...]]] = {
        "one": (1, ()),
        "TP 2": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
        "DP 2": (2, ()),
    }
    losses = {}
    for name, (processes, more) in ways.items():
        shutil.copytree(tmp_path / "saved", tmp_path / name / "saved")
        finished = train_well(tmp_path / name, *flags, *more, processes=processes)
        losses[name] = finished.logged("lm loss")
    assert list(losses["one"]) == list(range(3, STEPS + 1))
    for name in ("TP 2", "DP 2"):
        assert losses[name] == pytest.approx(losses["one"], rel=2e-3), name


def test_a_run_that_loses_a_rank_and_is_told_to_stop_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    """Saved now and then; one rank is killed, the run started again is told to stop, and started again it ends."""
    plan = write_corpus(tmp_path)
    lengthen(plan, LONG_RUN)
    flags = [*flags_of(plan, 20), *ZERO, "--dist-ckpt-optim-fully-reshardable", "--deterministic-mode"]
    flags += ["--transformer-impl", "local"]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    run_until(undisturbed, "never printed", 0, *flags)
    assert kill_one_rank(disturbed, f"iteration {30:8d}/", *flags) < ENDS_WITHIN
    killed = saved_step(disturbed)
    assert 20 <= killed < LONG_RUN
    marker = f"iteration {killed + 3:8d}/"
    code, output = interruption.signal_at(disturbed, marker, signal.SIGTERM, *flags, to_ranks=True)
    assert code == 0, output[-3000:]
    assert killed < saved_step(disturbed) < LONG_RUN
    run_until(disturbed, "never printed", 0, *flags)
    assert different_tensors(undisturbed, disturbed, LONG_RUN) == []


def kill_one_rank(folder: Path, marker: str, *flags: str) -> float:
    """Start the run and kill its second rank at a line with `marker`; seconds until all of it has ended, in failure."""
    process = start(folder, *flags)
    lines: list[str] = []
    began = 0.0
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if marker in line and not began:
                began = time.monotonic()
                os.kill(rank_of(process.pid, "1"), signal.SIGKILL)
        code = process.wait(timeout=120)
    finally:
        end(process)
    assert began, "".join(lines)[-3000:]
    assert code != 0, "".join(lines)[-3000:]
    return time.monotonic() - began


def rank_of(launcher: int, rank: str) -> int:
    """The process of a rank under torchrun."""
    children = psutil.Process(launcher).children()
    return next(child.pid for child in children if child.environ().get("RANK") == rank)
