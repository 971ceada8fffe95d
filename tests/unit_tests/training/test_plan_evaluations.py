"""How many batches an evaluation of a plan reads follows from the flags and from what the plan holds out."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.data import HeldOutDataset, Plan
from megatron_kaiyuan.training.plan_evaluations import EVERY_WINDOW, settle_evaluations
from megatron_kaiyuan.training.provider import PlanDatasetsProvider
from tests.functional_tests.training_run import write_corpus


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan.load(write_corpus(tmp_path))


def run(**values: object) -> Namespace:
    off = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask", "create_attention_mask_in_dataloader")
    others = {"eval_global_batch_size": 8, "full_validation": False, "consumed_valid_samples": 0}
    return Namespace(**(dict.fromkeys(off, False) | others | values))


def test_all_windows_are_read_in_as_many_batches_as_they_fill(plan: Plan) -> None:
    args = run(eval_iters=1, full_validation=True)
    windows = sum(len(HeldOutDataset(plan, name)) for name in ("scored", "plain"))
    said = settle_evaluations(args, plan)
    assert (args.eval_iters, args.full_validation, getattr(args, EVERY_WINDOW)) == (-(-windows // 8), False, True)
    assert said is not None
    assert f"{windows} windows in {args.eval_iters} batches" in said


def test_no_evaluation_builds_no_loader_and_is_said(plan: Plan) -> None:
    """A loader of no sample is an assertion of Megatron's."""
    args = run(eval_iters=0)
    assert settle_evaluations(args, plan) == (
        "--eval-iters 0: the held-out documents are left out and not evaluated on"
    )
    assert PlanDatasetsProvider(plan, args, None)._validation(0) is None


def test_a_plan_that_holds_nothing_out_switches_evaluation_off() -> None:
    args = run(eval_iters=100)
    nothing: Any = Namespace(validation={})
    assert "no evaluation" in str(settle_evaluations(args, nothing))
    assert args.eval_iters == 0


def test_an_evaluation_as_asked_for_needs_no_word(plan: Plan) -> None:
    args = run(eval_iters=3)
    assert settle_evaluations(args, plan) is None
    assert args.eval_iters == 3
