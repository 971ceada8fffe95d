"""What is changed about Megatron's log line, and what our loss asks of its rerun machine."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
from megatron.training import training

from megatron_kaiyuan.errors import ConfigError, ShardError, TrainingStopped
from megatron_kaiyuan.monitoring.monitor import RunMonitor
from megatron_kaiyuan.training import compat, forward_step, parsing
from megatron_kaiyuan.training.forward_step import ForwardStep, fused_language_model_loss
from megatron_kaiyuan.training.parsing import tell_what_building_refuses


@pytest.mark.parametrize(
    ("interval", "first", "lines"),
    [
        (1, 1, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}),
        (1, 3, {3: 3.0, 4: 4.0}),  # a resumed run
        (2, 1, {1: 1.0, 2: 1.5, 4: 3.5}),  # the first step has a line in any case, which is not due
    ],
)
def test_a_line_of_the_log_is_the_mean_since_the_line_that_was_due_before(
    monkeypatch: pytest.MonkeyPatch, interval: int, first: int, lines: dict[int, float]
) -> None:
    """The stand-in sums and resets as Megatron's does; the loss of each step is its number."""
    told: dict[int, float] = {}

    def training_log(
        losses: Any, totals: dict[str, float], _rate: Any, iteration: int, *_more: Any, is_first_iteration: bool = False
    ) -> None:
        totals["sum"], totals["steps"] = totals["sum"] + losses, totals["steps"] + 1
        if iteration % interval == 0 or is_first_iteration:
            told[iteration] = totals["sum"] / totals["steps"]
            if not is_first_iteration:
                totals.update(sum=0.0, steps=0)

    monkeypatch.setattr(training, "training_log", training_log)
    monkeypatch.setattr(compat, "get_args", lambda: Namespace(log_interval=interval))
    compat.log_each_step_once()
    compat.log_each_step_once()
    totals = {"sum": 0.0, "steps": 0}
    for step in range(first, 5):
        training.training_log(float(step), totals, None, step, None, is_first_iteration=step == first)
    assert told == lines


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> RerunStateMachine:
    monkeypatch.setenv("RANK", "0")
    machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # it is told with the mistake
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)
    return machine


def loss_of(value: float) -> None:
    fused_language_model_loss(torch.ones(4), torch.tensor(value))


@pytest.mark.parametrize("asked", [False, True])
def test_a_loss_far_above_the_earlier_ones_asks_for_the_step_again(
    machine: RerunStateMachine,
    monkeypatch: pytest.MonkeyPatch,
    asked: bool,  # noqa: FBT001
) -> None:
    given = Namespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=asked)
    monkeypatch.setattr(forward_step, "get_args", lambda: given)
    machine.state, machine.first_iteration_complete = RerunState.INITIAL_RUN, True
    for _ in range(100):
        loss_of(2.0)
    loss_of(19.0)
    assert not machine.rerun_requested
    loss_of(21.0)
    assert machine.rerun_requested is asked


def test_a_step_that_is_made_again_is_counted_once(machine: RerunStateMachine) -> None:
    counted: list[Any] = []

    class Monitor(RunMonitor):
        def __init__(self) -> None:
            """Count what it is told."""

        def count(self, *told: Any) -> None:
            counted.append(told)

    step = ForwardStep(Monitor())
    for state in (RerunState.INITIAL_RUN, RerunState.RERUNNING_IN_PLACE):
        machine.state = state
        step._count({}, torch.ones(1), None, is_training=True)
    assert len(counted) == 1


@pytest.mark.parametrize("name", parsing._BUILDING)
def test_what_cannot_be_built_is_one_sentence_and_a_fault_stays_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    raised: list[BaseException] = []

    def build() -> None:
        raise raised[-1]

    for function in parsing._BUILDING:
        monkeypatch.setattr(training, function, build)
    tell_what_building_refuses()
    tell_what_building_refuses()
    raised.append(ValueError("Invalid epsilon value: -1.0"))
    with pytest.raises(ConfigError, match=r"^Invalid epsilon value: -1.0; change the flags that it speaks of"):
        getattr(training, name)()
    for untouched in (ShardError("a shard"), torch.OutOfMemoryError("memory"), SystemExit(0)):
        raised.append(untouched)
        with pytest.raises(type(untouched)):
            getattr(training, name)()


def test_a_result_that_stays_invalid_ends_a_run_without_a_folder_in_a_sentence(
    machine: RerunStateMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "save_checkpoint_and_time", kept := training.save_checkpoint_and_time)
    compat.stop_where_nothing_can_be_saved("folder")
    assert training.save_checkpoint_and_time is kept
    compat.stop_where_nothing_can_be_saved(None)
    machine.failed_validation_call = rerun_state_machine.Call(
        caller=rerun_state_machine.Caller(message="NaN in the gradients", rank=0), sequence=1
    )
    with pytest.raises(TrainingStopped, match=r"^NaN in the gradients in step 4, and again .*: nothing is saved"):
        training.save_checkpoint_and_time(3, None)
