"""Launching: every run once, several at a time, again after a failure, never two at one; a script plays Megatron."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.quantile import training
from megatron_kaiyuan.quantile.runs import Run, SlicedStudy, run_folder
from megatron_kaiyuan.quantile.study import Study
from megatron_kaiyuan.quantile.training import finished_run, train_runs
from tests.unit_tests.quantile.tiny_study import sliced_study

_PRETEND = """
import os, pathlib, sys, time
save, steps, plan = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = save.parent.parent.parent / "calls.txt"
with calls.open("a") as stream: print(plan, os.environ.get("CUDA_VISIBLE_DEVICES", ""), file=stream)
if (save.parent / "fail").exists(): print("the reason"); sys.exit(3)
time.sleep(float(os.environ.get("PRETEND_SECONDS", "0")))
for step in (1, steps):
    line = "elapsed time per iteration (ms): 250.0 | learning rate: 1E-3 |"
    print(f" iteration {step:8d}/{steps:8d} | consumed samples: 1 | {line}", flush=True)
for step in (1, steps):
    (save / f"iter_{step:07d}").mkdir(parents=True, exist_ok=True)
(save / "latest_checkpointed_iteration.txt").write_text(str(steps))
"""


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, SlicedStudy]:
    script = tmp_path / "pretend.py"
    script.write_text(_PRETEND)

    def command(study: Study, run: Run) -> list[str]:
        return [sys.executable, str(script), str(run_folder(study, run) / "checkpoints"), str(study.steps), run.name]

    monkeypatch.setattr(training, "training_command", command)
    monkeypatch.setattr(training, "_POLL_SECONDS", 0.02)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return sliced_study(tmp_path)


def calls(study: Study) -> list[str]:
    return [line.split()[0] for line in (study.folder / "calls.txt").read_text().splitlines()]


def test_every_run_is_trained_once_and_counted(pretended: tuple[Study, SlicedStudy]) -> None:
    study, sliced = pretended
    steps: list[int] = []
    outcomes = train_runs(study, sliced.runs[:5], concurrent=2, progress=steps.append)
    assert [outcome.state for outcome in outcomes] == ["trained"] * 5
    assert sorted(calls(study)) == sorted(run.name for run in sliced.runs[:5])
    assert sum(steps) == 5 * study.steps
    record = finished_run(study, sliced.runs[0])
    assert record is not None
    assert (record.steps, record.tokens) == (study.steps, study.budget)
    assert record.tokens_per_second == pytest.approx(8 * 32 / 0.25)
    kept = sorted(path.name for path in (run_folder(study, sliced.runs[0]) / "checkpoints").glob("iter_*"))
    assert kept == [f"iter_{study.steps:07d}"]


def test_a_finished_run_is_never_repeated(pretended: tuple[Study, SlicedStudy]) -> None:
    study, sliced = pretended
    train_runs(study, sliced.runs[:2])
    outcomes = train_runs(study, sliced.runs[:3])
    assert [outcome.state for outcome in outcomes] == ["already finished", "already finished", "trained"]
    assert len(calls(study)) == 3


def test_a_failure_is_told_with_its_log_and_does_not_stop_the_others(pretended: tuple[Study, SlicedStudy]) -> None:
    study, sliced = pretended
    folder = run_folder(study, sliced.runs[1])
    folder.mkdir(parents=True)
    (folder / "fail").touch()
    outcomes = train_runs(study, sliced.runs[:3])
    assert [outcome.state for outcome in outcomes] == ["trained", "failed", "trained"]
    assert "exit code 3, checkpoint at step 0 of 4" in outcomes[1].detail
    assert "the reason" in outcomes[1].detail
    (folder / "fail").unlink()
    assert [outcome.state for outcome in train_runs(study, sliced.runs[:3])][1] == "trained"
    assert len(calls(study)) == 4


def test_a_run_that_another_process_trains_is_left_to_it(pretended: tuple[Study, SlicedStudy]) -> None:
    study, sliced = pretended
    folder = run_folder(study, sliced.runs[0])
    folder.mkdir(parents=True)
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [outcome.state for outcome in train_runs(study, sliced.runs[:2])] == ["busy", "trained"]
    assert calls(study) == [sliced.runs[1].name]


def test_a_run_that_another_process_finished_meanwhile_is_not_started_again(
    pretended: tuple[Study, SlicedStudy],
) -> None:
    study, sliced = pretended
    train_runs(study, sliced.runs[:1])
    started = training._start(study, sliced.runs[0], 0, 1)
    assert isinstance(started, training.RunOutcome)
    assert started.state == "already finished"
    assert len(calls(study)) == 1


def test_the_lock_is_held_until_the_run_is_recorded(
    pretended: tuple[Study, SlicedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, sliced = pretended
    held = []

    def write_while_locked(path: Path, text: str) -> None:
        with (path.parent / "lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path.name)
        write_text_atomically(path, text)

    monkeypatch.setattr(training, "write_text_atomically", write_while_locked)
    train_runs(study, sliced.runs[:1])
    assert held == ["digest.txt", "run.json"]


def test_a_folder_of_another_training_is_refused(pretended: tuple[Study, SlicedStudy]) -> None:
    study, sliced = pretended
    train_runs(study, sliced.runs[:1])
    path = run_folder(study, sliced.runs[0]) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "other"}))
    with pytest.raises(StudyError, match="another plan, model or training \\(other"):
        train_runs(study, sliced.runs[:1])
    path.unlink()
    (path.parent / "digest.txt").write_text("older")
    with pytest.raises(StudyError, match="unfinished run with another plan, model or training \\(older"):
        train_runs(study, sliced.runs[:1])


@pytest.mark.parametrize(
    ("visible", "there", "processes", "given"),
    [
        ("4,7", 8, 1, ["4", "7", "4"]),
        (None, 2, 1, ["0", "1", "0"]),
        (None, 8, 1, ["0", "1", "2"]),
        (None, 8, 2, ["0,1", "2,3", "4,5"]),
        (None, 5, 2, ["0,1", "2,3", "0,1"]),
        ("GPU-a,GPU-b,GPU-c,GPU-d", 8, 2, ["GPU-a,GPU-b", "GPU-c,GPU-d", "GPU-a,GPU-b"]),
        ("3,-1,4", 8, 1, ["3", "3", "3"]),
        ("", 8, 1, ["", "", ""]),
        (None, 0, 1, [None, None, None]),
        (None, 1, 2, [None, None, None]),
    ],
)
def test_concurrent_runs_get_gpus_of_their_own_in_turn(
    pretended: tuple[Study, SlicedStudy],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    there: int,
    processes: int,
    given: list[str | None],
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(training, "_device_count", lambda: there)
    spec = pretended[0].training.model_copy(update={"processes": processes})
    study = pretended[0].model_copy(update={"training": spec})
    found = [training._environment(study, slot, 3).get("CUDA_VISIBLE_DEVICES") for slot in range(3)]
    assert found == given
    assert training._environment(study, 0, 1).get("CUDA_VISIBLE_DEVICES") == visible, "alone it may use all"


def test_two_runs_at_a_time_are_started_on_two_gpus(
    pretended: tuple[Study, SlicedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_device_count", lambda: 2)
    monkeypatch.setenv("PRETEND_SECONDS", "0.3")
    study, sliced = pretended
    train_runs(study, sliced.runs[:2], concurrent=2)
    lines = (study.folder / "calls.txt").read_text().splitlines()
    assert sorted(line.split()[1] for line in lines) == ["0", "1"]


def test_counting_gpus_makes_no_context() -> None:
    code = (
        "import torch; from megatron_kaiyuan.quantile import training; training._device_count(); "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_process_is_left_when_training_is_interrupted(
    pretended: tuple[Study, SlicedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, sliced = pretended
    monkeypatch.setenv("PRETEND_SECONDS", "60")
    started = []
    start = training._start

    def remember(study: Study, run: Run, slot: int, concurrent: int) -> object:
        started.append(start(study, run, slot, concurrent))
        return started[-1]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_start", remember)
    monkeypatch.setattr(training, "time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        train_runs(study, sliced.runs[:2], concurrent=2)
    assert [one.process.poll() for one in started if isinstance(one, training._Active)] == [-signal.SIGTERM] * 2
    assert finished_run(study, sliced.runs[0]) is None


def test_fewer_than_one_run_at_a_time_is_refused(pretended: tuple[Study, SlicedStudy]) -> None:
    with pytest.raises(StudyError, match="--concurrent 0"):
        train_runs(pretended[0], [], concurrent=0)
