"""Runs of two processes that are killed, signalled and restarted end as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_kaiyuan.checkpoints.reading import saved_iterations
from megatron_kaiyuan.data import HeldOutDataset
from megatron_kaiyuan.monitoring.metrics_file import average_path, held_out_path, read_metrics
from megatron_kaiyuan.training.provider import spread_evenly
from tests.functional_tests.kill_and_resume import (
    different_tensors,
    end,
    flags_of,
    kill_often,
    lengthen,
    saved_step,
    start,
)
from tests.functional_tests.training_run import BATCH, REPOSITORY, train_well, write_corpus
from tests.functional_tests.warm_start import run_warm

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
    return folder, to_the_end(folder, *flags_of(plan, 15), "--kaiyuan-keep-checkpoints", "1")


def to_the_end(folder: Path, *flags: str) -> str:
    """Run both ranks to the end, undisturbed; what they printed."""
    finished = train_well(folder, *flags, processes=2)
    return finished.output


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
    """The signals come after earlier saves and with loader workers, as in every run that is stopped on a cluster."""
    kills = kill_often(tmp_path, plan, STEPS, kills=2, interval=3, seed=4)
    assert [kill.how.startswith("while saving") for kill in kills] == [False, True]
    often, killed = [*flags_of(plan, 2), "--num-workers", "2"], saved_step(tmp_path)
    code, output = signal_at(tmp_path, f"iteration {killed + 5:8d}/", signal.SIGUSR1, *often, to_ranks=True)
    assert code == 0, output[-3000:]
    assert "exiting program after receiving SIGUSR1" in output, output[-3000:]
    second = saved_step(tmp_path)
    assert killed < second == reached_step(output) < STEPS
    code, output = signal_at(tmp_path, f"iteration {second + 5:8d}/", signal.SIGTERM, *often, to_ranks=False)
    assert code == 1, "torchrun ends with an error when it is signalled, though its ranks have saved and succeeded"
    assert "exiting program after receiving SIGTERM" in output, output[-3000:]
    assert second < saved_step(tmp_path) == reached_step(output) < STEPS
    rarely = [*flags_of(plan, 100), "--num-workers", "2"]
    output = to_the_end(tmp_path, *rarely, "--kaiyuan-evaluate-average", "always")
    assert different_tensors(undisturbed[0], tmp_path, STEPS) == []
    assert "validation loss at the average of the checkpoints that the plan names, in saved-averaged/" in output
    assert "held-out loss of the average at step 48 by source (by quantile band): scored " in output
    assert_average_was_evaluated(tmp_path, plan)


def reached_step(output: str) -> int:
    """The last step that a run has logged."""
    return int(re.findall(r"\] iteration +(\d+)/", output)[-1])


def assert_average_was_evaluated(folder: Path, plan: Path) -> None:
    """The losses that the run told of the average are those of the average on disk, evaluated by itself."""
    manifest = json.loads((folder / "saved-averaged" / "iter_0000048" / "average.json").read_text())
    assert [part["iteration"] for part in manifest["checkpoints"]] == [44, 46, 48]
    *_, told = read_metrics(average_path(folder / "saved" / "metrics.jsonl"))
    *_, last = read_metrics(held_out_path(folder / "saved" / "metrics.jsonl"))
    windows = spread_evenly([len(HeldOutDataset(plan, name)) for name in told["sources"]])[:BATCH, 0].tolist()
    for name, found in told["sources"].items():
        assert found["loss"] != last["sources"][name]["loss"]
    name = next(iter(told["sources"]))  # one of them: each evaluation is a process of its own
    alone = evaluated(folder, plan, windows.count(0))["sources"][name]["loss"]
    assert told["sources"][name]["loss"] == pytest.approx(alone, abs=1e-3)


def evaluated(folder: Path, plan: Path, windows: int) -> dict[str, Any]:
    """What `tools/evaluate.py` finds of the average on the first windows of each source."""
    arguments = [str(folder / "saved-averaged"), "--plan", str(plan), "--windows", str(windows)]
    arguments += ["--json", str(folder / "evaluated.json")]
    code, output = run_warm(str(REPOSITORY / "tools" / "evaluate.py"), arguments, folder)
    assert code == 0, output
    result: dict[str, Any] = json.loads((folder / "evaluated.json").read_text())["results"][0]
    return result


def test_a_run_that_is_complete_says_so_and_succeeds(undisturbed: tuple[Path, str], plan: Path) -> None:
    assert "the run is complete" in to_the_end(undisturbed[0], *flags_of(plan, 15))


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
    told, root_cause = output.split("Root Cause (first observed failure):")
    message = "ResumeError: --save saved already holds a run (its last checkpoint: 48): --load saved continues"
    assert told.split("Traceback")[0].count("ResumeError") == told.split("Traceback")[0].count(message) == 1
    assert message in root_cause
    assert "To enable traceback" not in output
