import argparse
import os
import tempfile
import threading
from pathlib import Path
from traceback import StackSummary

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kaiyuan.checkpoints.averaging import (
    average_checkpoints,
    choose_checkpoints,
    choose_planned,
    complete_average,
)
from megatron_kaiyuan.checkpoints.identity import AVERAGING
from megatron_kaiyuan.checkpoints.reading import iteration_folder, saved_iterations
from megatron_kaiyuan.errors import ConfigError, SaveError
from megatron_kaiyuan.monitoring.metrics_file import append_metrics, average_path
from megatron_kaiyuan.training import checkpoint_keeping
from megatron_kaiyuan.training.checkpoint_keeping import (
    CheckpointKeeper,
    average_folder,
    averaged_iterations,
    say_how_to_average,
    say_what_cannot_be_averaged,
)
from tests.unit_tests.checkpoints.test_averaging import save


@given(st.integers(1, 20), st.integers(1, 500), st.integers(1, 20_000))
def test_averaged_iterations_end_with_the_run_and_are_evenly_spaced(last: int, every: int, final: int) -> None:
    expected = [final - number * every for number in range(last)][::-1]
    if min(expected) < 1:
        with pytest.raises(ConfigError, match="lower one of them"):
            averaged_iterations(last, every, final)
    else:
        assert list(averaged_iterations(last, every, final)) == expected


def pretend_saved(directory: Path, iteration: int) -> None:
    folder = iteration_folder(directory, iteration)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text("{}")
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def deleted() -> None:
    for thread in threading.enumerate():
        if thread.name == "delete checkpoints":
            thread.join(timeout=10)


@settings(deadline=None, max_examples=40)  # file systems take their time
@given(
    st.integers(1, 4),
    st.sets(st.integers(1, 30), max_size=4),
    st.lists(st.integers(1, 30), min_size=1, max_size=12, unique=True).map(sorted),
)
def test_the_newest_and_the_averaged_stay_and_nothing_else(keep: int, averaged: set[int], saves: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        keeper = CheckpointKeeper(directory, tuple(sorted(averaged)), keep, writes=True)
        for iteration in saves:
            pretend_saved(directory, iteration)
            keeper.after_save(iteration)
        deleted()
        assert set(saved_iterations(directory)) == set(saves[-keep:]) | (averaged & set(saves))


def test_a_torn_checkpoint_is_not_counted_and_later_attempts_are_left_alone(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40, 90):
        pretend_saved(tmp_path, iteration)
    (iteration_folder(tmp_path, 30) / "metadata.json").unlink()
    CheckpointKeeper(tmp_path, (), 2, writes=True).after_save(40)
    deleted()
    assert saved_iterations(tmp_path) == [20, 30, 40, 90]


def test_only_the_writing_rank_deletes(tmp_path: Path) -> None:
    for iteration in (10, 20):
        pretend_saved(tmp_path, iteration)
    CheckpointKeeper(tmp_path, (), 1, writes=False).after_save(20)
    assert saved_iterations(tmp_path) == [10, 20]


def test_a_folder_that_is_written_over_is_torn_from_the_start(tmp_path: Path) -> None:
    save(tmp_path, 10)
    CheckpointKeeper(tmp_path, (), None, writes=True).before_save(10)
    assert list(iteration_folder(tmp_path, 10).iterdir()) == []


def test_a_checkpoint_is_lacking_until_it_is_saved_and_the_last_is_left_to_megatron(tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path, (10, 20), None, writes=True)
    assert keeper.lacks(10)
    assert not keeper.lacks(11)
    assert not keeper.lacks(20)
    keeper.after_save(10)
    assert not keeper.lacks(10)
    assert keeper.protects(20)


def test_planned_checkpoints_are_those_that_the_run_recorded(tmp_path: Path) -> None:
    wanted = {"iterations": [10, 20], "weights": "wma"}
    for iteration in (10, 15, 20):
        save(tmp_path, iteration, kaiyuan_averaging=wanted)
    (iteration_folder(tmp_path, 15) / ".metadata").unlink()  # none of the average's business
    chosen, weights = choose_planned(tmp_path)
    assert [checkpoint.iteration for checkpoint in chosen] == [10, 20]
    assert weights == "wma"


@pytest.mark.parametrize(
    ("saved", "complaint"),
    [
        ([6, 9], "of which 3, 12 are not there, the run being at 9: 3 will not be .*--iterations 6 9, or lower last"),
        ([3, 6, 9], "of which 12 are not there, the run being at 9: finish it, or give --last N$"),
        (
            [6, 9, 12],
            "of which 3 are not there, the run being at 12: 3 will not be saved .*--iterations 6 9 12$",
        ),
        ([12], "of which 3, 6, 9 are not there, the run being at 12: 3, 6, 9 will not be .*--last N$"),
    ],
)
def test_a_planned_checkpoint_that_is_missing_has_a_remedy_that_works(
    tmp_path: Path, saved: list[int], complaint: str
) -> None:
    for iteration in saved:
        save(tmp_path, iteration, kaiyuan_averaging={"iterations": [3, 6, 9, 12], "weights": "mean"})
    with pytest.raises(ConfigError, match=complaint):
        choose_planned(tmp_path)


def run_arguments(save: Path, wanted: dict[str, object] | None, rank: int = 0) -> argparse.Namespace:
    return argparse.Namespace(save=str(save), plan="plan.yaml", rank=rank, kaiyuan_metrics=None, **{AVERAGING: wanted})


def test_an_impossible_average_is_told_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved every second step up to 8, where `averaging: {last: 4, every: 3}` was added; the run ends at 12."""
    for iteration in (4, 6, 8):
        pretend_saved(tmp_path, iteration)
    wanted = {"iterations": [3, 6, 9, 12], "weights": "mean"}
    say_what_cannot_be_averaged(run_arguments(tmp_path, wanted), 8)
    told = capsys.readouterr().err
    assert "averages iterations 3, 6, 9, 12, but the run starts at 8 and 3 are not in --save" in told
    for silent in (run_arguments(tmp_path, wanted, rank=1), run_arguments(tmp_path, None)):
        say_what_cannot_be_averaged(silent, 8)
    say_what_cannot_be_averaged(run_arguments(tmp_path, wanted), 0)
    say_what_cannot_be_averaged(run_arguments(tmp_path, {"iterations": [6, 9, 12], "weights": "mean"}), 8)
    assert capsys.readouterr().err == ""


def test_the_commands_at_the_end_are_those_that_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, wanted = tmp_path / "saved", {"iterations": [3, 6, 9, 12], "weights": "wma"}
    for iteration in (6, 9, 12):
        save(run, iteration, kaiyuan_averaging=wanted)
    say_how_to_average(run_arguments(run, wanted))
    told = capsys.readouterr().out.splitlines()
    assert "of which 3 are not there; without them" in told[0]
    assert f"{run} --iterations 6 9 12 --weights wma --output {run}-averaged" in told[1]
    average_checkpoints(choose_checkpoints(run, None, [6, 9, 12]), "wma", average_folder(str(run)))
    say_how_to_average(run_arguments(run, wanted))
    assert ["tools/evaluate.py" in line for line in capsys.readouterr().out.splitlines()] == [False, True]
    for iteration in (6, 9):
        iteration_folder(run, iteration).rename(tmp_path / str(iteration))
    say_how_to_average(run_arguments(run, wanted))
    assert capsys.readouterr().out.endswith("of which 3, 6, 9 are not there: nothing is left to average\n")


def test_a_run_without_averaging_has_none_planned(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(ConfigError, match="no averaging section"):
        choose_planned(tmp_path)


def test_what_is_left_of_averaging_and_evaluating_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "saved"
    wanted = {"iterations": [10, 20], "weights": "wma"}
    for iteration in (10, 20):
        save(run, iteration, kaiyuan_averaging=wanted)
    args = run_arguments(run, wanted)

    def told() -> list[str]:
        say_how_to_average(args)
        return [line.partition("tools/")[2].partition(".py")[0] for line in capsys.readouterr().out.splitlines()[1:]]

    output = average_folder(args.save)
    (output / ".iter_0000020.unfinished").mkdir(parents=True)  # of a run that was killed while it averaged
    assert told() == ["average_checkpoints", "evaluate"]
    complete_average(*choose_planned(run), output)
    assert told() == ["evaluate"]
    append_metrics(average_path(run / "metrics.jsonl"), {"iteration": 20})
    assert told() == []


def test_a_newest_checkpoint_that_is_torn_is_named(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save(tmp_path, iteration, kaiyuan_averaging={"iterations": [10], "weights": "wma"})
    metadata = iteration_folder(tmp_path, 20) / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"iter_0000020 has 40 instead of .* bytes in \.metadata"):
        choose_planned(tmp_path)


def test_an_average_that_is_there_is_used_again_and_another_is_left_alone(tmp_path: Path) -> None:
    run, output = tmp_path / "saved", tmp_path / "saved-averaged"
    for iteration in (10, 20):
        save(run, iteration, kaiyuan_averaging={"iterations": [10, 20], "weights": "wma"})
    checkpoints, weights = choose_planned(run)
    complete_average(checkpoints, weights, output)
    (output / "latest_checkpointed_iteration.txt").unlink()  # killed before it was written
    before = {path: path.stat().st_mtime_ns for path in iteration_folder(output, 20).iterdir()}
    complete_average(checkpoints, weights, output)
    assert {path: path.stat().st_mtime_ns for path in iteration_folder(output, 20).iterdir()} == before
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "20"
    for others in ((checkpoints, "mean"), (checkpoints[1:], "wma")):
        with pytest.raises(ConfigError, match="iter_0000020 exists; remove it"):
            complete_average(*others, output)
    later = iteration_folder(output, 20).joinpath("metadata.json").stat().st_mtime + 5
    os.utime(iteration_folder(run, 20) / "metadata.json", (later, later))  # the run was made again
    with pytest.raises(ConfigError, match="iter_0000020 exists; remove it"):
        complete_average(checkpoints, weights, output)


def test_a_failed_save_leaves_no_folder_and_says_where_the_run_goes_on(tmp_path: Path) -> None:
    pretend_saved(tmp_path, 4)
    iteration_folder(tmp_path, 6).mkdir()
    (iteration_folder(tmp_path, 6) / "__0_0.distcp").write_bytes(b"half")
    keeper = CheckpointKeeper(tmp_path, (), None, writes=True)
    failure = RuntimeError("Worker failure: no room")

    told = keeper.not_saved(6, CheckpointException("write", {3: (failure, StackSummary())}))

    assert str(told) == (
        "the checkpoint of iteration 6 was not written: rank 3: no room. Make room or mend the disk, and start again "
        f"with --load {tmp_path}: the run then goes on from 4"
    )
    assert saved_iterations(tmp_path) == [4]
    assert not told.of_one_rank
    assert keeper.not_saved(6, OSError("of this rank alone")).of_one_rank


@pytest.mark.parametrize(
    ("seconds", "environment", "warned"),
    [
        (21.0, {"TORCHELASTIC_RUN_ID": "1"}, 1),
        (19.0, {"TORCHELASTIC_RUN_ID": "1"}, 0),
        (21.0, {"TORCHELASTIC_RUN_ID": "1", "KAIYUAN_LAUNCHER_WAITS": "1"}, 0),
        (21.0, {}, 0),
    ],
    ids=["torchrun", "quick", "the launcher that waits", "no launcher"],
)
def test_a_save_that_torchrun_would_kill_is_warned_of_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    environment: dict[str, str],
    warned: int,
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "KAIYUAN_LAUNCHER_WAITS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    clock = iter(range(100))
    monkeypatch.setattr(checkpoint_keeping.time, "monotonic", lambda: next(clock) * seconds)
    keeper = CheckpointKeeper(tmp_path, (), None, writes=True)
    for iteration in (1, 2):
        keeper.before_save(iteration)
        keeper.after_save(iteration)

    assert capsys.readouterr().err.count("torchrun kills its ranks 30 s after") == warned


def test_a_run_whose_folder_was_taken_over_ends_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_saved(tmp_path, 6)
    monkeypatch.setattr(checkpoint_keeping, "taken_by", lambda _: "process 7 on host n1")
    keeper = CheckpointKeeper(tmp_path, (), None, writes=True)

    with pytest.raises(SaveError, match="was taken over by process 7 on host n1: this run ends at iteration 6"):
        keeper.before_save(6)

    assert (iteration_folder(tmp_path, 6) / "metadata.json").exists()
