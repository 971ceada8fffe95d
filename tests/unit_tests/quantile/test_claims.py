"""The promise of a report, by simulation: claims are rarely false in any world, and made where something is.

Few studies each, with fixed seeds; `python -m benchmarks.quantile_claims` simulates many.
"""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from benchmarks.quantile_claims import WORLDS, false_claims, layout_of, power, simulated_scores
from megatron_kaiyuan.quantile.inference import OVERALL, PAIRS_SHARE, SHAPES_SHARE, pairs_of, shapes_of
from megatron_kaiyuan.quantile.statistics import Measure

STUDIES = 150


@pytest.mark.parametrize(
    "world", ["equal spreads", "one slice 3 x", "log-normal spreads", "items in groups of five, small run noise"]
)
def test_false_claims_stay_within_what_6_percent_allows(world: str) -> None:
    rate = false_claims(world, layout_of("2x3 spread"), STUDIES, seed=1)
    # binomial with 6 %: above 17 of 150 once in a hundred times
    assert rate.share * STUDIES <= 17


def test_roughness_between_quantiles_is_no_trend_where_the_seeds_lie_side_by_side() -> None:
    assert false_claims("rough along the score", layout_of("2x5 own"), STUDIES, seed=1).share * STUDIES <= 17


def test_a_pair_is_claimed_by_its_own_two_slices_and_not_by_calmer_others() -> None:
    """Two slices that spread by 1, 5 apart, among eight that spread by half as much and lend them no certainty."""
    wide = [np.array([[-1.0], [0.0], [1.0]]), np.array([[4.0], [5.0], [6.0]])]
    calm = [0.5 * (cell - cell.mean()) + 1.5 for cell in (wide[0] for _ in range(8))]
    score = Measure("x", [*wide, *calm], np.ones(1))
    pair = pairs_of({OVERALL: score}, PAIRS_SHARE * 0.05)[0]
    assert pair.adjusted == pytest.approx(ttest_ind(wide[0], wide[1], equal_var=False).pvalue[0])


def test_a_trend_is_found_beside_one_wild_slice() -> None:
    assert power("equal spreads", layout_of("2x5 spread"), 8.0, 60)["trend"].share > 0.9
    assert power("one slice 10 x", layout_of("2x5 spread"), 8.0, 60)["trend"].share > 0.5


def test_one_capability_that_differs_does_not_make_claims_about_the_other() -> None:
    """Slices of two sources differ widely in one thing; nothing may be claimed about the second."""
    layout, found, false = layout_of("2x3 spread"), 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        effects = [lambda source, at: 12.0 * (source == 0) * at, lambda source, at: 0 * at]
        design, scores = simulated_scores(WORLDS["equal spreads"], layout, rng, effects)
        claims = [*shapes_of(design, scores, 0.05 * SHAPES_SHARE), *pairs_of(scores, 0.05 * PAIRS_SHARE)]
        found += any(one.claim != "none" for one in claims if one.score == OVERALL)
        false += any(one.claim != "none" for one in claims if one.score == "capability 1")
    assert found >= 70
    assert false <= 11  # 5 % of 100 and 2.8 standard deviations
