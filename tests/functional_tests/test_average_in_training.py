"""The average so far, evaluated while a run goes on: right, and without a trace in the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kaiyuan.checkpoints.averaging import average_checkpoints, choose_checkpoints
from megatron_kaiyuan.checkpoints.reading import iteration_folder, open_checkpoint, saved_iterations
from megatron_kaiyuan.monitoring.metrics_file import average_path, read_metrics
from tests.functional_tests.training_run import BATCH, REPOSITORY, Finished, saved_tensors, train_well, write_corpus
from tests.functional_tests.warm_start import run_warm

AVERAGE, EVALUATE = (str(REPOSITORY / "tools" / name) for name in ("average_checkpoints.py", "evaluate.py"))
MEMBERS = [3, 4, 5, 6]
HALF = ("--fp16", "--initial-loss-scale", "4096")
OVERLAPPED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
OVERLAPPED += ("--dist-ckpt-optim-fully-reshardable",)  # the default format stores padding, which holds anything
ALWAYS = ("--kaiyuan-evaluate-average", "always")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps; the average of those after steps 3 to 6."""
    plan = write_corpus(tmp_path_factory.mktemp("corpus"))
    plan.write_text(plan.read_text() + "averaging: {last: 4, every: 1, weights: ema:0.4}\n")
    return plan


def run(folder: Path, plan: Path, *flags: str, processes: int = 1) -> Finished:
    """Saved after every second step, and where the average needs it; evaluated after every second step."""
    folder.mkdir(exist_ok=True)
    saving = ("--save", "saved", "--load", "saved", "--save-interval", "2", "--eval-interval", "2", "--eval-iters", "2")
    return train_well(folder, "--plan", str(plan), *HALF, *saving, *flags, processes=processes)


@pytest.fixture(scope="module")
def watched(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    folder = tmp_path_factory.mktemp("watched")
    return folder, run(folder, plan, *ALWAYS)


def averages(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(average_path(folder / "saved" / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("flags", "processes"), [((), 1), (OVERLAPPED, 2)], ids=["one rank", "two ranks with overlapped gathers"]
)
def test_the_run_is_bit_for_bit_the_one_that_is_not_watched(
    plan: Path, tmp_path: Path, flags: tuple[str, ...], processes: int
) -> None:
    """Losses, weights, optimizer, loss scale and random states, at and after each evaluation."""
    seen, unseen = (
        run(tmp_path / name, plan, *flags, *more, processes=processes)
        for name, more in (("seen", ALWAYS), ("unseen", ()))
    )
    for name in ("lm loss", "lm loss validation", "grad-norm", "loss-scale"):
        assert seen.logged(name) == unseen.logged(name), name
    for step in MEMBERS:
        mine, theirs = (
            saved_tensors(iteration_folder(tmp_path / name / "saved", step), random_states=True)
            for name in ("seen", "unseen")
        )
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
        samples = {
            open_checkpoint(iteration_folder(tmp_path / name / "saved", step)).arguments.consumed_valid_samples
            for name in ("seen", "unseen")
        }
        assert samples == {step // 2 * 2 * BATCH}
    assert [entry["averaged"] for entry in averages(tmp_path / "seen")] == [[3, 4], [3, 4, 5], MEMBERS]
    assert averages(tmp_path / "unseen") == []


def test_the_losses_told_are_those_of_the_average_made_by_the_tool(
    plan: Path, watched: tuple[Path, Finished], tmp_path: Path
) -> None:
    folder, finished = watched
    assert "validation loss at the average of the checkpoints of iterations 3, 4 |" in finished.output
    assert "held-out loss of the average at step 5 by source" in finished.output
    chosen = choose_checkpoints(folder / "saved", None, [3, 4, 5])
    average_checkpoints(chosen, "ema:0.4", tmp_path / "average")
    alone = evaluated(tmp_path, plan, windows=BATCH)
    told = next(entry for entry in averages(folder) if entry["iteration"] == 5)
    logged = finished.logged("held-out loss of the average/scored")
    assert told["consumed_samples"] == 5 * BATCH
    assert logged[5] == pytest.approx(told["sources"]["scored"]["loss"])
    assert set(logged) == {4, 5, 6}
    # The run's windows alternate between the sources; the tool takes the first of each.
    for name in ("scored", "plain"):
        assert told["sources"][name]["loss"] == pytest.approx(alone[name]["loss"], abs=0.02)


def evaluated(folder: Path, plan: Path, windows: int) -> dict[str, Any]:
    arguments = [str(folder / "average"), "--plan", str(plan), "--windows", str(windows)]
    code, output = run_warm(EVALUATE, [*arguments, "--json", str(folder / "evaluated.json")], folder)
    assert code == 0, output
    result: dict[str, Any] = json.loads((folder / "evaluated.json").read_text())["results"][0]["sources"]
    return result


def test_a_run_that_stops_after_such_a_checkpoint_evaluates_when_it_is_resumed(
    plan: Path, watched: tuple[Path, Finished], tmp_path: Path
) -> None:
    run(tmp_path, plan, *ALWAYS, "--exit-interval", "4")
    assert averages(tmp_path) == []
    finished = run(tmp_path, plan, *ALWAYS)
    assert averages(tmp_path) == averages(watched[0])
    assert finished.logged("lm loss")[5] == watched[1].logged("lm loss")[5]


def test_members_of_an_attempt_that_was_given_up_are_not_averaged(
    plan: Path, watched: tuple[Path, Finished], tmp_path: Path
) -> None:
    """Resumed after step 2, to another rate: at step 4 it has written 3 and 4 anew, while 5 and 6 are the old ones."""
    shutil.copytree(watched[0] / "saved", tmp_path / "saved")
    other = tmp_path / "other.yaml"
    other.write_text(plan.read_text().replace("end: 1.0e-3, shape: sqrt", "end: 5.0e-3, shape: sqrt"))
    finished = run(tmp_path, other, *ALWAYS, "--ckpt-step", "2", "--exit-interval", "4")
    assert finished.logged("lm loss").keys() >= {3, 4}
    assert saved_iterations(tmp_path / "saved") == [2, *MEMBERS]

    def refused(*choice: str) -> str:
        code, output = run_warm(AVERAGE, ["saved", "--output", "average", *choice], tmp_path)
        assert code == 1, output
        return output

    assert "of which 5, 6 are not there, the run being at 4" in refused("--planned")
    assert "of which those after 4 are of an attempt given up; ask for 1 to 3" in refused("--last", "5")
    assert "iter_0000005 was not trained on from saved/iter_0000004" in refused("--iterations", "4", "5")
    run(tmp_path, other, *ALWAYS)
    assert [entry["averaged"] for entry in averages(tmp_path)] == [[3, 4], [3, 4, 5], MEMBERS]
    assert averages(tmp_path)[1]["sources"] != averages(watched[0])[1]["sources"], "the rates differ from step 5 on"
