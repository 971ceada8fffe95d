"""The version of the plan language that a run goes on under is that of the checkpoint, where the plan names none."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.checkpoints.identity import PLAN_RECORD
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ResumeError
from megatron_kaiyuan.training.plan_record import check_resume, plan_as_begun
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    source = write_source(tmp_path / "s", numbered_documents([4] * 40), list(range(40)))
    return plan_of({"s": source}, phase_of("shuffled", {"s": "random 50%"}))


def saved_by(plan: Plan, consumed: int = 5) -> Namespace:
    return Namespace(**{PLAN_RECORD: plan.order_record(), "consumed_train_samples": consumed, "padded_vocab_size": 64})


def test_a_run_begun_under_version_1_resumes_without_a_change_of_its_plan(spec, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    begun = Plan.from_spec(spec | {"version": 1})
    saved, args = saved_by(begun), Namespace(load="runs/x", plan="plan.yaml", padded_vocab_size=64)
    plan = plan_as_begun(Plan.from_spec(spec), saved)
    assert plan is not None
    assert plan.fingerprint == begun.fingerprint
    check_resume(args, plan, saved)
    told = capsys.readouterr().out
    assert "the run began under version 1 of the plan language and goes on with its order; write version: 1" in told
    assert "a new run would differ: phases.0 (main).sources.s: random 50% is drawn independently" in told


def test_a_written_version_that_differs_is_refused(spec):
    saved = saved_by(Plan.from_spec(spec | {"version": 1}))
    plan = plan_as_begun(Plan.from_spec(spec | {"version": 2}), saved)
    with pytest.raises(ResumeError, match="Write version: 1 to go on with the run"):
        check_resume(Namespace(load="runs/x", plan="plan.yaml", padded_vocab_size=64), plan, saved)


def test_a_new_run_and_one_of_the_newest_version_keep_their_plan(spec, capsys):
    plan = Plan.from_spec(spec)
    assert plan_as_begun(plan, None) is plan
    assert plan_as_begun(plan, saved_by(plan)) is plan
    assert plan_as_begun(None, None) is None
    assert capsys.readouterr().out == ""
