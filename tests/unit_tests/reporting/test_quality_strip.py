"""The quality strips of the plan page agree with the samples that the plan really gives."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.reporting.plan_page import write_plan_page
from megatron_kaiyuan.reporting.quality_strip import quality_over_run
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


def test_the_strip_is_the_quality_of_the_samples_at_each_place(plan: Plan) -> None:
    told = plan.describe(10)
    columns = 70
    strip = quality_over_run(told, "s", columns)
    order = CurriculumDataset(plan)
    shown = np.array([np.mean(order.provenance(sample).quantile) for sample in range(len(order))])
    first = told["phases"][1]["first_sample"]
    for column, value in enumerate(strip):
        sample = int(len(order) * (column + 0.5) / columns)
        if sample < first:
            assert value == pytest.approx(0.5, abs=0.01)  # all of it, in random order
        else:  # a band is a tenth wide; windows cross its edge by one document
            assert value is not None
            assert abs(value - shown[sample]) < 0.05 + 0.02, (column, value, shown[sample])


def test_a_source_that_is_not_shown_leaves_a_gap(plan: Plan) -> None:
    assert quality_over_run(plan.describe(5), "t", 7) == [None] * 7


def test_the_page_shows_rate_strips_and_warning(plan: Plan, tmp_path: Path) -> None:
    write_plan_page(plan.describe(), tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert "learning rate" in page
    assert "darker = better" in page
    assert '<p class="note">' in page
    assert "its best data, the last fifth of the curriculum" in page
