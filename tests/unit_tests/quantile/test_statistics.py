"""Student's t against published tables, Holm against its definition, and contrasts against simulation."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from megatron_kaiyuan.quantile.statistics import (
    Composite,
    Measure,
    contrast,
    holm,
    mean_estimate,
    student_t_cdf,
    student_t_quantile,
    variance_ratio,
    variance_ratio_bound,
)


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2
    [
        (0.95, 1, 6.314),
        (0.975, 2, 4.303),
        (0.975, 12, 2.179),
        (0.999, 5, 5.893),
        (0.90, 30, 1.310),
        (0.975, 100, 1.984),
    ],
)
def test_quantiles_of_student_s_t_are_those_of_the_table(probability: float, freedom: float, quantile: float) -> None:
    assert student_t_quantile(probability, freedom) == pytest.approx(quantile, abs=6e-4)
    assert student_t_cdf(quantile, freedom) == pytest.approx(probability, abs=2e-4)


@given(value=st.floats(-20, 20), freedom=st.floats(1, 1e5))
def test_student_s_t_is_symmetric(value: float, freedom: float) -> None:
    assert student_t_cdf(value, freedom) + student_t_cdf(-value, freedom) == pytest.approx(1.0, abs=1e-9)


@given(value=st.floats(-8, 8))
def test_one_degree_of_freedom_is_cauchy_s_distribution(value: float) -> None:
    # scipy computes with 1 / (1 + t^2), which is 1 in float64 for |t| below 1e-8: there it is off by up to 1e-8 / pi
    assert student_t_cdf(value, 1) == pytest.approx(0.5 + math.atan(value) / math.pi, abs=4e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_closed_test_of_bonferroni_rejects(p_values: list[float], level: float) -> None:
    rejected = [value <= level for value in holm(p_values)]
    by_closure = [
        all(
            min(p_values[number] for number in group) * len(group) <= level
            for mask in range(1, 2 ** len(p_values))
            if (group := [number for number in range(len(p_values)) if mask >> number & 1]) and hypothesis in group
        )
        for hypothesis in range(len(p_values))
    ]
    near = any(abs(value - level) < 1e-12 for value in holm(p_values))
    assert rejected == by_closure or near


def test_holm_does_not_depend_on_the_order() -> None:
    adjusted = dict(zip([0.01, 0.04, 0.03], holm([0.01, 0.04, 0.03]), strict=True))
    assert adjusted == {0.01: 0.03, 0.03: 0.06, 0.04: 0.06}
    for order in permutations([0.01, 0.04, 0.03]):
        assert holm(order) == [adjusted[value] for value in order]


def measure(rng: np.random.Generator, cells: int, runs: int, items: int, **spread: float) -> Measure:
    """`x[c, r, i]` with independent normal parts of the given standard deviations."""
    values = [
        rng.normal(0, spread["run"], (runs, 1))
        + rng.normal(0, spread["item"], (1, items))
        + rng.normal(0, spread["rest"], (runs, items))
        for _ in range(cells)
    ]
    return Measure("x", values, np.ones(items))


@pytest.mark.parametrize(("run", "item"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_standard_error_of_a_pair_is_the_spread_of_its_estimate(run: float, item: float) -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        estimate = contrast(measure(rng, 4, 3, 25, run=run, item=item, rest=0.3), np.array([1.0, -1.0, 0.0, 0.0]))
        found.append((estimate.value, estimate.error**2))
    values, variances = np.array(found).T
    # 400 estimates tell a standard deviation to about 5 %; the stated one may be too large by the noise counted twice
    assert 0.85 * values.std() < math.sqrt(variances.mean()) < 1.25 * values.std()


def test_runs_and_items_are_two_samples_of_welch_s_test() -> None:
    rng = np.random.default_rng(3)
    runs, items = rng.normal(0.5, 1.0, 4), rng.normal(0.0, 2.0, 9)
    estimate = contrast(Measure("x", [runs[:, None] + items], np.ones(9)), np.array([1.0]))
    welch = ttest_ind(runs, -items, equal_var=False)
    assert estimate.freedom == pytest.approx(welch.df)
    assert estimate.value / estimate.error == pytest.approx(welch.statistic)
    assert estimate.p_value == pytest.approx(welch.pvalue)


def test_few_items_of_unequal_weight_are_not_taken_as_known_exactly() -> None:
    """Two capabilities of 20 documents each, nothing but document noise between the slices."""
    rng = np.random.default_rng(11)
    pair = np.array([1.0, -1.0, 0.0])
    false = 0
    for _ in range(2000):
        parts = [
            Measure(
                name,
                measure(rng, 3, 3, 20, run=0.05, item=1.0, rest=0.01).values,
                np.exp(rng.normal(0, 0.8, 20)),
            )
            for name in ("a", "b")
        ]
        false += contrast(Composite("both", parts), pair).p_value < 0.05
    # binomial: 5 % of 2000 are 100 with a standard deviation of 10; with the items' variance taken as known it is 143
    assert false <= 125


def test_weights_make_the_mean_a_ratio() -> None:
    one = Measure("x", [np.array([[1.0, 4.0], [3.0, 4.0]]), np.array([[0.0, 0.0], [0.0, 2.0]])], np.array([3.0, 1.0]))
    assert one.run_means[0].tolist() == [1.75, 3.25]
    assert contrast(one, np.array([1.0, -1.0])).value == pytest.approx(2.5 - 0.25)


def test_an_item_without_weight_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    small = measure(rng, 3, 3, 10, run=1, item=1, rest=1)
    larger = Measure(
        "x", [np.hstack([cell, np.full((3, 10), 99.0)]) for cell in small.values], np.repeat([1.0, 0.0], 10)
    )
    before, after = (contrast(one, np.array([1.0, -1.0, 0.0])) for one in (small, larger))
    assert after.value == pytest.approx(before.value)
    assert after.error == pytest.approx(before.error)
    assert after.freedom == pytest.approx(before.freedom)


def test_one_run_a_cell_gives_no_probability() -> None:
    estimate = contrast(measure(np.random.default_rng(0), 2, 1, 50, run=0, item=0, rest=0), np.array([1.0, -1.0]))
    assert estimate.freedom == 0
    assert estimate.p_value == 1.0
    assert math.isnan(estimate.probability_positive)


def test_a_composite_of_equal_parts_is_the_part_in_seed_spreads() -> None:
    one = measure(np.random.default_rng(5), 3, 4, 10, run=1, item=1, rest=1)
    both = Composite("both", [one, one])
    pooled = math.sqrt(np.mean([cell.var(ddof=1) for cell in one.run_means]))
    for cell in range(3):
        assert mean_estimate(both, cell).value == pytest.approx(mean_estimate(one, cell).value / pooled)


def test_the_variance_ratio_compares_the_calmest_cell_with_the_wildest() -> None:
    one = Measure("x", [np.array([[0.0], [2.0]]), np.array([[0.0], [6.0]])], np.ones(1))
    assert variance_ratio(one) == pytest.approx(9.0)


@pytest.mark.parametrize(("runs", "cells", "bound"), [(3, 2, 39.0), (3, 6, 266.0), (5, 2, 9.6), (5, 6, 29.5)])
def test_the_bound_of_the_variance_ratio_is_that_of_hartleys_table(runs: int, cells: int, bound: float) -> None:
    # upper 5 % points of F_max for 2 and 4 degrees of freedom, as tabulated for Hartley's test (Biometrika 37, 1950)
    assert variance_ratio_bound([runs] * cells) == pytest.approx(bound, rel=0.07)
    assert math.isnan(variance_ratio_bound([1, 1, 3]))


@settings(max_examples=30)
@given(shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_the_p_value_does_not_depend_on_the_unit(shift: float, scale: float) -> None:
    one = measure(np.random.default_rng(7), 3, 3, 12, run=1, item=1, rest=1)
    other = Measure("x", [cell * scale + shift for cell in one.values], one.weights)
    coefficients = np.array([1.0, 0.0, -1.0])
    assert contrast(other, coefficients).p_value == pytest.approx(contrast(one, coefficients).p_value, rel=1e-6)
