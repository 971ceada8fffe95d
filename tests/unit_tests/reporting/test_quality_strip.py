"""The quality strips of the plan page agree with the samples that the plan really gives."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.reporting.plan_page import write_plan_page
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

RISING = {"start": 1e-3, "end": 1e-3}
FALLING = {"start": 1e-3, "end": 1e-4, "shape": "sqrt"}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """One source of 400 documents of one window each, shown in random order, then ascending two and a half times."""
    rng = np.random.default_rng(3)
    source = write_source(tmp_path / "s", numbered_documents([4] * 400), rng.permutation(400).tolist())
    other = write_source(tmp_path / "t", numbered_documents([4] * 50), list(range(50)))
    return Plan.from_spec(
        plan_of(
            {"s": source, "t": other},
            phase_of("shuffled", {"s": "all"}, "a", lr=RISING),
            phase_of("curriculum", {"s": {"keep": "top 50%", "repeat": 2.5}}, "b", lr=FALLING),
            seq_length=4,
        )
    )


@pytest.mark.parametrize("repeat_order", ["ranked", "passes"])
def test_the_strip_is_the_quality_of_the_samples_at_each_place(plan: Plan, repeat_order: str) -> None:
    phases = plan.spec.phases
    again = phases[1].model_copy(
        update={"sources": {"s": phases[1].sources["s"].model_copy(update={"repeat_order": repeat_order})}}
    )
    plan = Plan.from_spec(plan.spec.model_copy(update={"phases": [phases[0], again]}))
    strip = plan.describe()["sources"]["s"]["quality"]
    order = CurriculumDataset(plan)
    shown = [order.provenance(sample).quantile for sample in range(len(order))]
    first = plan.phases[1].first_sample
    for column, value in enumerate(strip):
        sample = len(order) * (2 * column + 1) // (2 * len(strip))
        if sample < first:
            assert value == pytest.approx(0.5, abs=0.01)  # all of it, in random order
        else:  # that of the document in the middle of the window
            lowest, highest = shown[sample] or (0.0, 0.0)
            assert value is not None
            assert lowest <= value < highest, (column, value, shown[sample])
    rises = np.diff([value for value in strip[-40:] if value is not None])
    assert (np.count_nonzero(rises < -0.1) == 0) == (repeat_order == "ranked"), "one ascent, or one a pass"


def test_a_source_that_is_not_shown_leaves_a_gap(plan: Plan) -> None:
    assert set(plan.describe(5)["sources"]["t"]["quality"]) == {None}


def test_the_page_shows_rate_strips_and_warning(plan: Plan, tmp_path: Path) -> None:
    write_plan_page(plan.describe(), tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert "learning rate" in page
    assert "darker = better" in page
    assert '<p class="note">' in page
    assert "its best data, the last fifth of the curriculum" in page
