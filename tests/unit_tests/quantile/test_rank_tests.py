"""Exact tests against scipy's, against brute force, and against their own definition."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import page_trend_test, rankdata, studentized_range

from megatron_kaiyuan.quantile import rank_tests
from megatron_kaiyuan.quantile.rank_tests import range_p_value, rank_permutation_p_value


@pytest.mark.parametrize(
    ("cells", "freedom", "statistic"), [(6, 4.0, 5.0), (10, 8.1, 3.5), (10, 20.0, 3.54), (30, 120.0, 2.0)]
)
def test_the_range_is_tukeys(cells: int, freedom: float, statistic: float) -> None:
    expected = float(studentized_range.sf(statistic * 2**0.5, cells, freedom))
    assert range_p_value(statistic, freedom, cells) == pytest.approx(expected, rel=0.02, abs=2e-4)


def test_two_cells_have_student_s_t() -> None:
    assert range_p_value(4.303, 2.0, 2) == pytest.approx(0.05, rel=0.02)
    assert range_p_value(3.0, 0.0, 5) == 1.0


def brute(values: list[float], coefficients: list[float]) -> float:
    ranks = rankdata(values) - (len(values) + 1) / 2
    observed = abs(float(np.dot(coefficients, ranks)))
    found = [abs(float(np.dot(coefficients, order))) >= observed - 1e-9 for order in permutations(ranks)]
    return float(np.mean(found))


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 9.0, 7.0, 8.0], [1.0, 1.0, 2.0, 2.0, 2.0, 5.0]])
def test_few_runs_are_all_listed(values: list[float]) -> None:
    coefficients = [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]
    found = rank_permutation_p_value(np.array(values), np.array(coefficients))
    assert found == pytest.approx(brute(values, coefficients))


def test_blocks_are_those_of_pages_test() -> None:
    """Three trunks with three slices each: Page's L over the slices, one-sided in scipy and of both sides here."""
    table = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])
    blocks = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    found = rank_permutation_p_value(table.ravel(), np.tile([-1.0, 0.0, 1.0], 3), blocks)
    assert found == pytest.approx(2 * page_trend_test(table, method="exact").pvalue)


def test_many_runs_are_drawn_and_the_level_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    coefficients = np.linspace(-1, 1, 12)
    assert rank_permutation_p_value(np.arange(12.0), coefficients) <= 3 / (rank_tests._DRAWS + 1)
    found = [rank_permutation_p_value(rng.normal(size=12), coefficients) for _ in range(2000)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.012)  # 2.5 standard deviations
