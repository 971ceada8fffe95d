"""When the average of a run may be evaluated at its end."""

import argparse
from typing import Any

import pytest

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.training.average_evaluation import AverageEvaluation, check_average_arguments
from megatron_kaiyuan.training.compat import Evaluation


def arguments(**changes: Any) -> argparse.Namespace:
    defaults = {"kaiyuan_evaluate_average": True, "full_validation": False, "multiple_validation_sets": False}
    return argparse.Namespace(**(defaults | changes))


def test_what_cannot_be_averaged_or_evaluated_is_refused() -> None:
    check_average_arguments(arguments(), planned=True, held_out=True)
    check_average_arguments(arguments(kaiyuan_evaluate_average=False), planned=False, held_out=False)
    with pytest.raises(ConfigError, match="needs a plan with an averaging section"):
        check_average_arguments(arguments(), planned=False, held_out=True)
    with pytest.raises(ConfigError, match="needs a plan with a validation section"):
        check_average_arguments(arguments(), planned=True, held_out=False)
    with pytest.raises(ConfigError, match=r"--multiple-validation-sets, or with tools/evaluate\.py"):
        check_average_arguments(arguments(multiple_validation_sets=True), planned=True, held_out=True)


def test_a_run_without_the_checkpoints_ends_all_the_same_and_says_why(tmp_path: Any) -> None:
    said: list[str] = []
    repeated: list[str] = []
    evaluate = AverageEvaluation(str(tmp_path / "saved"), said.append)
    assert evaluate(Evaluation(48, [], True, repeated.append)) is False
    assert repeated == []
    assert "the average that the plan wants was not evaluated" in said[0]
    assert str(tmp_path / "saved") in said[0]
