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
from megatron_kaiyuan.training.stopping import explain_invalid_results


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


@pytest.fixture
def explained(machine: RerunStateMachine, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Arguments of a run, whose step is a stand-in that asks for the exit of `code`."""
    args = Namespace(curr_iteration=3, fp16=False, loss_scale=None, save=None, rank=0, code=16)
    outcome = lambda: ({}, True, True, bool(args.code), args.code, None, None, 0)  # noqa: E731
    monkeypatch.setattr(training, "train_step", outcome)
    monkeypatch.setattr(RerunStateMachine, "validate_result", RerunStateMachine.validate_result)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    other = "Inf in the gradients"  # of rank 2, whatever rank 0 knows

    def gather(found: list[str | None], own: str | None) -> None:
        found[:] = [own, None, other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    explain_invalid_results(args)
    machine.failed_validation_call = rerun_state_machine.Call(
        caller=rerun_state_machine.Caller(message=GRADIENTS, rank=0), sequence=1
    )
    return args


GRADIENTS = "found Inf in local grad norm for bucket #0 in backward pass before data-parallel communication collective"


@pytest.mark.parametrize(
    ("code", "saved", "said"),
    [
        (16, None, r"ranks 0, 2, in step 4, and again .*: nothing is saved, for there is no --save; start again from"),
        (17, None, r"ranks 0, 2, in step 4, but not when the step was repeated: that machine may compute wrongly"),
        (17, "saved", r"ranks 0, 2, in step 4, but not when"),
    ],
)
def test_a_step_that_is_not_finite_when_repeated_ends_the_run_in_a_sentence(
    explained: Namespace, code: int, saved: str | None, said: str
) -> None:
    explained.code, explained.save = code, saved
    with pytest.raises(TrainingStopped, match=f"^Inf in the gradients of {said}"):
        training.train_step()


def test_the_weights_before_a_step_that_is_not_finite_are_saved_and_the_user_told(
    explained: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    explained.save = "saved"
    assert training.train_step()[2:5] == (True, True, 16)
    assert "ranks 0, 2, in step 4, and again when the step was repeated: the weights before" in capsys.readouterr().err
    explained.code = 0
    training.train_step()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", [RerunMode.DISABLED, RerunMode.VALIDATE_RESULTS])
def test_what_cannot_be_repeated_ends_the_run_at_once(
    explained: Namespace, machine: RerunStateMachine, mode: RerunMode
) -> None:
    """With `--rerun-mode disabled`, in an evaluation, and in the first step of a start, which Megatron lets pass."""
    machine.mode, explained.fp16, explained.loss_scale = mode, True, 2.0**16
    loss = torch.tensor(float("nan"))
    machine.state = RerunState.INITIAL_RUN
    machine.validate_result(loss, torch.isinf, "Inf in the loss of this rank")
    machine.validate_result(loss, torch.isnan, "spiky", fatal=False)
    with pytest.raises(TrainingStopped, match=r"NaN in the loss of rank 0, in step 4; .* without --loss-scale 65536,"):
        machine.validate_result(loss, torch.isnan, "NaN in the loss of this rank")
