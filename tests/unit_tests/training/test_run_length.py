"""A run ends with the last whole batch of its samples, whatever batches it had before."""

from argparse import Namespace
from collections.abc import Iterator

import pytest
from megatron.core import num_microbatches_calculator

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.training.run_length import (
    check_batch_arguments,
    check_skipped_steps,
    final_iteration,
    is_complete,
)


def arguments(**values: object) -> Namespace:
    defaults = {"train_samples": 47, "train_iters": None, "global_batch_size": 8, "skip_train": False, "load": "run"}
    return Namespace(**{**defaults, "step_batch_size_schedule": None, "ckpt_convert_format": None, **values})


def after(iteration: int, consumed: int) -> Namespace:
    return Namespace(iteration=iteration, consumed_train_samples=consumed)


@pytest.fixture
def schedule() -> Iterator[str]:
    """Batches of 4 up to sample 8, then of 6: 4 4 6 6 ..."""
    text = "0:4 8:6"
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        rank=1, global_batch_size=4, micro_batch_size=2, data_parallel_size=1, step_batch_size_schedule=text
    )
    yield text
    num_microbatches_calculator.unset_num_microbatches_calculator()


@pytest.mark.parametrize(("batch", "final"), [(8, 5), (12, 4), (4, 8), (24, 3)])
def test_a_resumed_run_adds_the_batches_that_are_left(batch: int, final: int) -> None:
    assert final_iteration(arguments(global_batch_size=batch), after(3, 24)) == final


def test_a_new_run_makes_all_whole_batches_and_one_counted_in_steps_those() -> None:
    assert final_iteration(arguments(), None) == 5
    assert final_iteration(arguments(train_samples=None, train_iters=7), after(3, 24)) == 7


@pytest.mark.parametrize(("samples", "final"), [(19, 3), (20, 4), (25, 4), (26, 5)])
def test_a_scheduled_batch_that_is_not_full_is_no_step(schedule: str, samples: int, final: int) -> None:
    args = arguments(train_samples=samples, step_batch_size_schedule=schedule)
    assert final_iteration(args, None) == final
    assert final_iteration(args, after(2, 8)) == final
    assert num_microbatches_calculator.get_current_global_batch_size() == 4, "the first step's"


@pytest.mark.parametrize(
    ("iteration", "consumed", "complete"), [(0, 0, False), (4, 32, False), (5, 40, True), (7, 44, True), (9, 39, False)]
)
def test_a_run_is_complete_when_no_whole_batch_is_left(iteration: int, consumed: int, complete: bool) -> None:  # noqa: FBT001
    saved = after(iteration, consumed)
    assert is_complete(arguments(), saved) is complete
    assert not is_complete(arguments(skip_train=True), saved)
    assert not is_complete(arguments(ckpt_convert_format="torch"), saved), "its checkpoint can still be converted"
    assert not is_complete(arguments(), None)


def test_a_run_counted_in_steps_is_complete_after_them() -> None:
    steps = arguments(train_samples=None, train_iters=5)
    assert [is_complete(steps, after(number, 8 * number)) for number in (4, 5)] == [False, True]


def test_a_plan_in_batches_of_several_sizes_is_not_counted_in_steps() -> None:
    steps = arguments(train_samples=None, train_iters=5)
    check_batch_arguments(steps, after(3, 24), planned=True)
    check_batch_arguments(steps, after(3, 12), planned=False)
    check_batch_arguments(arguments(), after(3, 12), planned=True)
    with pytest.raises(ConfigError, match=r"--load run made its 3 steps with 12 samples.*leave --train-iters out"):
        check_batch_arguments(steps, after(3, 12), planned=True)
    steps.step_batch_size_schedule = "0:4 8:6"
    with pytest.raises(ConfigError, match="'0:4 8:6' changes the batch: leave --train-iters out"):
        check_batch_arguments(steps, None, planned=True)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([7, 6], "^--iterations-to-skip 6: --save-interval 3 would be left out with that step"),
        ([8], "^--iterations-to-skip 8: --exit-interval 4 would be left out"),
        ([5], "^--iterations-to-skip 5: --eval-interval 5 and averaging in the plan would be left out"),
    ],
)
def test_a_step_at_which_something_is_to_be_done_is_not_skipped(steps: list[int], told: str) -> None:
    others = {"save": "s", "save_interval": 3, "exit_interval": 4, "eval_iters": 1, "eval_interval": 5}
    rejected = {"result_rejected_tracker_filename": None, "iterations_to_skip": steps}
    with pytest.raises(ConfigError, match=told):
        check_skipped_steps(arguments(**others, **rejected), [5])
    check_skipped_steps(arguments(**others, **rejected | {"iterations_to_skip": [7, 11]}), [5])
    check_skipped_steps(arguments(**others, **rejected | {"result_rejected_tracker_filename": "f"}), [5])
