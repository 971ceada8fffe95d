"""When the average of a run may be evaluated, and what the model holds meanwhile and afterwards."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.training import average_evaluation
from megatron_kaiyuan.training.average_evaluation import (
    AverageEvaluation,
    averaged_weights,
    check_average_arguments,
)
from megatron_kaiyuan.training.loop_observers import Evaluation


def arguments(when: str | None = "end", **changes: Any) -> argparse.Namespace:
    names = ("full_validation", "multiple_validation_sets", "async_save", "use_megatron_fsdp", "use_torch_fsdp2")
    return argparse.Namespace(**(dict.fromkeys(names, False) | {"kaiyuan_evaluate_average": when} | changes))


def test_what_cannot_be_averaged_or_evaluated_is_refused() -> None:
    check_average_arguments(arguments(), planned=True, held_out=True)
    check_average_arguments(arguments("always"), planned=True, held_out=True)
    check_average_arguments(arguments(None), planned=False, held_out=False)
    with pytest.raises(ConfigError, match="needs a plan with an averaging section"):
        check_average_arguments(arguments(), planned=False, held_out=True)
    with pytest.raises(ConfigError, match="needs a plan with a validation section"):
        check_average_arguments(arguments(), planned=True, held_out=False)


@pytest.mark.parametrize(("name", "said"), [("async_save", "--async-save"), ("use_torch_fsdp2", "FSDP")])
def test_what_rules_out_reading_a_checkpoint_into_the_model_is_refused(name: str, said: str) -> None:
    check_average_arguments(arguments("end", **{name: True}), planned=True, held_out=True)
    with pytest.raises(ConfigError, match=f"{said} rules out: take --kaiyuan-evaluate-average end"):
        check_average_arguments(arguments("always", **{name: True}), planned=True, held_out=True)


def evaluation_of(folder: Path, said: list[str]) -> tuple[AverageEvaluation, list[Any]]:
    """An evaluation whose model is evaluated by noting that it was; and the notes."""
    noted: list[Any] = []
    average = AverageEvaluation(
        str(folder / "saved"), [10, 20, 30], "mean", list, noted.append, lambda: noted.append("forgotten"), said.append
    )
    return average, noted


def test_a_run_without_the_checkpoints_ends_all_the_same_and_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    average, noted = evaluation_of(tmp_path, said)
    evaluator: Any = pytest.fail
    average.at_end(Evaluation(48, True, evaluator))
    assert noted == []
    assert "the average that the plan wants was not evaluated" in said[0]
    assert str(tmp_path / "saved") in said[0]


def test_a_run_whose_members_are_missing_goes_on_and_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    average, noted = evaluation_of(tmp_path, said)
    loop: Any = object()
    average.start(loop, 5, told=False)
    for alone_or_last in (10, 30):
        average.when_saved(alone_or_last)
    assert said == []
    average.when_saved(20)
    assert noted == []
    assert "the average so far was not evaluated at step 20" in said[0]
    assert "of which 10, 20 are not there, the run being at 20" in said[0]


def test_the_model_holds_the_average_and_then_its_own_weights_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is taken in FP32 and rounded once: added to 1/4 one by one, both of the small numbers would be lost."""
    stored: list[dict[str, Any]] = [
        {"weight": torch.full((2, 2), value).half(), "steps": torch.tensor(number)}
        for number, value in enumerate((1.0, 2.0**-12, 3 * 2.0**-14))
    ]
    model = torch.nn.Linear(2, 2, bias=False).half()
    model.register_buffer("steps", torch.tensor(7))
    own, place = model.weight.detach().clone(), model.weight.data_ptr()

    def read_in_place(chunk: Any, checkpoint: Any) -> dict[str, Any]:
        chunk.load_state_dict(stored[checkpoint])
        return dict(chunk.state_dict())

    monkeypatch.setattr(average_evaluation, "read_weights", read_in_place)
    members: Any = [0, 1, 2]
    with averaged_weights([model], members, "ema:0.5"):
        assert model.weight.unique().tolist() == [0.25 + 2.0**-12]
        assert model.steps.item() == 2, "no average of whole numbers: the last one's"
    assert torch.equal(model.weight, own)
    assert model.weight.data_ptr() == place
    assert model.steps.item() == 7
    with pytest.raises(RuntimeError, match="in the midst"), averaged_weights([model], members, "mean"):
        raise RuntimeError("in the midst")
    assert torch.equal(model.weight, own)
