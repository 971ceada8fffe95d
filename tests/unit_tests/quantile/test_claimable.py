"""What a study can claim is what its tests claim: the sizes are tried out on studies with exactly such differences."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quantile_claims import LEVEL, RUNS, layout_of
from megatron_kaiyuan.quantile.claimable import planned_design, smallest_claimable
from megatron_kaiyuan.quantile.inference import OVERALL, PAIRS_SHARE, SHAPES_SHARE, pairs_of, shapes_of
from megatron_kaiyuan.quantile.statistics import Measure
from tests.unit_tests.quantile.tiny_study import study_content, tiny_study

UNIT = np.array([-1.0, 0.0, 1.0])
"""Three seeds with a standard deviation of 1 and a mean of 0."""


@pytest.mark.parametrize(("factor", "claim"), [(0.98, "none"), (1.02, "first")])
def test_the_smallest_claimed_difference_is_where_a_pair_begins_to_be_claimed(factor: float, claim: str) -> None:
    layout = layout_of("2x5 spread")
    design = layout.design([np.ones(RUNS, dtype=bool)] * 10)
    size = smallest_claimable(design, LEVEL).pair * factor
    cells = [(UNIT + size * (number == 0))[:, None] for number in range(10)]
    pairs = pairs_of({OVERALL: Measure("x", cells, np.ones(1))}, PAIRS_SHARE * LEVEL)
    assert {pair.claim for pair in pairs if pair.first == 0} == {claim}


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_smallest_claimed_rise_is_where_the_t_test_of_a_trend_rejects(factor: float) -> None:
    """Fifteen runs whose variance around their line is exactly 1, with 13 degrees of freedom."""
    design = replace(layout_of("2x5 own").design([np.ones(RUNS, dtype=bool)] * 10), spread=True)
    size = smallest_claimable(design, LEVEL).trend * factor
    places = [float(place[0]) for place in design.places]
    noise = UNIT * (13 / 10) ** 0.5
    cells = [(noise + size * places[number] / 0.8 * (number < 5))[:, None] for number in range(10)]
    found = shapes_of(design, {OVERALL: Measure("x", cells, np.ones(1))}, SHAPES_SHARE * LEVEL)
    trend = next(shape for shape in found if shape.kind == "trend")
    assert trend.estimate.value == pytest.approx(size)
    # of the shapes' level, three quarters are for the trends of two sources
    assert (trend.estimate.p_value < SHAPES_SHARE * LEVEL * 0.75 / 2) == (factor > 1)


def test_too_few_seeds_can_claim_no_pair(tmp_path: Path) -> None:
    training = study_content(tmp_path)["training"]
    one, two = (tiny_study(tmp_path, training=training | {"seeds": seeds}) for seeds in (1, 2))
    assert math.isinf(smallest_claimable(planned_design(one), 0.05).trend)
    sizes = smallest_claimable(planned_design(two), 0.05)
    assert math.isinf(sizes.pair)
    assert math.isfinite(sizes.trend)
    told = sizes.lines([0.0, 0.4, 0.8], 0.01)
    assert "no size (fewer than 3 seeds)" in told[0]
    assert "bits per byte" in told[0]
    assert "0.4 of a source" in told[1]


def test_the_planned_runs_lie_where_they_are_cut(tmp_path: Path) -> None:
    spread = tiny_study(tmp_path, slices=study_content(tmp_path)["slices"] | {"documents": "spread"})
    places = planned_design(spread).places[0]  # top 0 %: its stratum reaches half way to 40 %
    assert sorted(places) == pytest.approx([1 - 1 / 6, 0.9, 1 - 1 / 30])
