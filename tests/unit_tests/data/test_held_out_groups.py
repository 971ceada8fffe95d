"""Whole groups of documents held out of a plan, by the numbers in a score sidecar."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.resume import check_resume, order_record
from megatron_kaiyuan.errors import PlanError, ResumeError
from tests.unit_tests.data.tiny import write_shard

GROUPS = np.random.default_rng(4).integers(0, 40, 300)


def content(folder: Path, **held_out: Any) -> dict[str, Any]:
    """A plan of one source of 300 documents of 12 tokens."""
    return {
        "seq_length": 8,
        "sources": {"web": {"shards": str(folder / "web")}},
        "phases": [{"name": "all", "order": "shuffled", "sources": {"web": "all"}}],
        "validation": {"web": {"documents": 50} | held_out},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shard(tmp_path / "web", [[number % 90] * 12 for number in range(300)], list(map(float, range(300))))
    np.save(f"{tmp_path / 'web'}.scores.host.npy", GROUPS.astype(np.float32))
    return tmp_path


def test_whole_groups_are_held_out_and_as_few_as_it_takes(folder: Path) -> None:
    plan = Plan.from_spec(content(folder, groups="host"))
    held_out = plan.opened["web"].held_out
    assert set(GROUPS[held_out]).isdisjoint(np.delete(GROUPS, held_out))
    sizes = np.bincount(GROUPS)
    assert 50 <= len(held_out) < 50 + sizes.max()
    other = Plan.from_spec(content(folder, groups="host") | {"seed": 5}).opened["web"].held_out
    assert set(GROUPS[other]) != set(GROUPS[held_out])


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        ({"groups": "package"}, r"validation\.web\.groups: .*package"),
        ({"groups": "score"}, r"validation\.web\.documents: 300 to be held out of 300"),
        ({"groups": "half"}, r"validation\.web\.groups: .*'half' holds numbers that are not whole"),
        ({"groups": "one"}, r"validation\.web\.groups: whole groups of 'one' .* are all 300 of the source"),
    ],
)
def test_groups_that_cannot_be_held_out_are_refused_by_name(folder: Path, held_out: Any, words: str) -> None:
    np.save(f"{folder / 'web'}.scores.half.npy", np.arange(300, dtype=np.float32) / 2)
    np.save(f"{folder / 'web'}.scores.one.npy", np.ones(300, dtype=np.float32))
    some = {"documents": 300} if held_out["groups"] == "score" else {}
    with pytest.raises(PlanError, match=words):
        Plan.from_spec(content(folder, **held_out, **some))


def test_a_simulated_plan_has_no_groups(folder: Path) -> None:
    spec = content(folder, groups="host")
    spec["sources"]["web"]["expected"] = {"documents": 300, "tokens": 3600}
    with pytest.raises(PlanError, match=r"validation\.web\.groups: --simulate has no sidecar"):
        Plan.from_spec(spec, simulate=True)


def test_a_run_does_not_go_on_with_other_groups_held_out(folder: Path) -> None:
    before, after = (Plan.from_spec(content(folder, groups="host")) for _ in range(2))
    np.save(f"{folder / 'web'}.scores.host.npy", np.roll(GROUPS, 7).astype(np.float32))
    after = Plan.from_spec(content(folder, groups="host"))
    records = [order_record(plan.spec, plan.opened, plan.phases) for plan in (before, after)]
    check_resume(records[0], records[0], 8)
    with pytest.raises(ResumeError, match="held_out_groups"):
        check_resume(records[0], records[1], 8)
