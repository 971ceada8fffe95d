"""Checkpoints of an attempt that was given up are told from those of the run."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_kaiyuan.checkpoints.averaging import choose_checkpoints, choose_planned, choose_so_far
from megatron_kaiyuan.checkpoints.lineage import CODE, STARTS, comes_from, store_start
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.version import code_version
from tests.unit_tests.checkpoints.test_averaging import save

FIRST, SECOND, THIRD = [0, "first"], [20, "second"], [30, "third"]


def checkpoint(*starts: list[object]) -> Namespace:
    return Namespace(**{STARTS: list(starts)})


def test_each_start_is_added_to_those_of_the_run_that_it_continues() -> None:
    fresh, resumed = Namespace(), Namespace()
    store_start(fresh, None, "first")
    assert getattr(fresh, STARTS) == [FIRST]
    saved = Namespace(iteration=20, **{STARTS: [FIRST]})
    store_start(resumed, saved, "second")
    assert getattr(resumed, STARTS) == [FIRST, SECOND]
    assert getattr(saved, STARTS) == [FIRST]
    assert getattr(resumed, CODE) == code_version()
    store_start(resumed, saved, None)
    assert getattr(resumed, STARTS) is None


@pytest.mark.parametrize(
    ("iteration", "starts", "expected"),
    [
        (10, [FIRST], True),
        (20, [FIRST], True),
        (25, [FIRST], False),
        (25, [FIRST, SECOND], True),
        (30, [FIRST, SECOND], True),
        (25, [FIRST, [20, "another"]], False),
        (35, [FIRST, SECOND, THIRD], True),
        (35, [FIRST, SECOND], False),
        (10, [["another"]], False),
    ],
)
def test_a_checkpoint_comes_from_those_before_each_of_its_starts(
    iteration: int,
    starts: list[list[object]],
    expected: bool,  # noqa: FBT001
) -> None:
    """Started at 0, resumed at 20 and at 30; the earlier checkpoint at `iteration` came about by `starts`."""
    assert comes_from(checkpoint(FIRST, SECOND, THIRD), checkpoint(*starts), iteration) is expected


def test_checkpoints_of_earlier_versions_are_taken_as_they_are() -> None:
    unknown, resumed = Namespace(), checkpoint(SECOND)
    assert comes_from(unknown, checkpoint(FIRST), 10)
    assert comes_from(resumed, unknown, 10), "before the first start that is known"
    assert not comes_from(resumed, unknown, 25), "this one would know its start"


def folder_of_two_attempts(folder: Path) -> Path:
    """Saved every ten steps up to 50, resumed at 20, and saved again at 30 and 40; the averaging names 20 to 50."""
    planned = {"iterations": [20, 30, 40, 50], "weights": "mean"}
    for iteration in (10, 20, 50):
        save(folder, iteration, kaiyuan_averaging=planned, **{STARTS: [FIRST]})
    for iteration in (30, 40):
        save(folder, iteration, kaiyuan_averaging=planned, **{STARTS: [FIRST, SECOND]})
    (folder / "latest_checkpointed_iteration.txt").write_text("40")
    return folder


def test_only_checkpoints_of_the_present_attempt_are_chosen(tmp_path: Path) -> None:
    folder = folder_of_two_attempts(tmp_path / "saved")
    assert [found.iteration for found in choose_so_far(folder, [20, 30, 40, 50], 40)] == [20, 30, 40]
    assert [found.iteration for found in choose_checkpoints(folder, 3, None)] == [20, 30, 40]
    assert [found.iteration for found in choose_checkpoints(folder, None, None)] == [10, 20, 30, 40]
    with pytest.raises(ConfigError, match="of which those after 40 are of an attempt given up; ask for 1 to 4"):
        choose_checkpoints(folder, 5, None)
    with pytest.raises(ConfigError, match="of which 50 are not there, the run being at 40: finish it"):
        choose_planned(folder)


def test_an_old_member_before_the_point_of_the_resume_is_not_averaged(tmp_path: Path) -> None:
    """Resumed at 20, a plan that averaged other steps passed step 30 without a save; the old plan is back."""
    folder = tmp_path / "saved"
    for iteration, starts in ((20, [FIRST]), (30, [FIRST]), (35, [FIRST, SECOND]), (40, [FIRST, SECOND, [35, "x"]])):
        save(folder, iteration, **{STARTS: starts})
    with pytest.raises(ConfigError, match=r"iter_0000040 was not trained on from .*iter_0000030: one of them is left"):
        choose_so_far(folder, [20, 30, 40], 40)
