"""Histograms and quantiles by chunks, against numpy on all numbers at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.inspection.distribution import Distribution

FRACTIONS = (0.0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0)
WITHIN = 2.0**-11
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def distribution_of(values, weights=None, exact_values=1 << 22, pieces=3):
    found = Distribution(exact_values)
    weights = np.ones(len(values)) if weights is None else weights
    for part, heavy in zip(np.array_split(values, pieces), np.array_split(weights, pieces), strict=True):
        found.add(part, heavy)
    return found


def by_definition(values, fraction):
    """The smallest value that at least this fraction does not exceed."""
    return next(v for v in np.sort(values) if (values <= v).sum() >= fraction * len(values))


@settings(deadline=None, max_examples=50)  # a million bins are cleared for each example
@given(st.lists(floats, min_size=1, max_size=60), st.sampled_from(FRACTIONS))
def test_quantiles_are_exact_while_all_numbers_are_kept(values, fraction):
    values = np.array(values)
    found = distribution_of(values)
    assert found.exact
    assert found.quantile(fraction) == by_definition(values, fraction)
    assert (found.minimum, found.maximum, found.count) == (values.min(), values.max(), len(values))
    assert found.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-30)


@settings(deadline=None, max_examples=50)  # a million bins are cleared for each example
@given(st.lists(floats, min_size=5, max_size=60), st.sampled_from(FRACTIONS))
def test_quantiles_from_bins_are_within_the_stated_error_whatever_the_range(values, fraction):
    values = np.array(values)
    found = distribution_of(values, exact_values=1)
    assert not found.exact
    assert found.quantile(fraction) == pytest.approx(by_definition(values, fraction), rel=WITHIN, abs=1e-37)
    assert (found.minimum, found.maximum, found.count) == (values.min(), values.max(), len(values))


@settings(deadline=None, max_examples=50)  # a million bins are cleared for each example
@given(st.lists(st.integers(-4095, 4095), min_size=5, max_size=60), st.sampled_from(FRACTIONS))
def test_whole_numbers_below_4096_stay_exact_in_bins(values, fraction):
    values = np.array(values)
    found = distribution_of(values, exact_values=1)
    assert found.quantile(fraction) == by_definition(values, fraction)
    grades = found.distinct(60)
    assert grades is not None
    assert grades.tolist() == sorted(set(values.tolist()))


@settings(deadline=None, max_examples=50)  # a million bins are cleared for each example
@given(st.lists(st.integers(0, 4095), min_size=1, max_size=80), st.booleans())
def test_histograms_count_every_number_and_its_weight_once(values, binned):
    values = np.array(values)
    edges = np.array([0, 1, 7, 100, 4000, 4096], dtype=float)
    found = distribution_of(values, values * 2, exact_values=1 if binned else 1000).histogram(edges)
    assert found.counts.tolist() == np.histogram(values, edges)[0].tolist()
    assert found.weights.tolist() == np.histogram(values, edges, weights=values * 2)[0].tolist()


def test_weight_by_band_is_that_of_equally_many_numbers_in_ascending_order():
    rng = np.random.default_rng(1)
    values, weights = rng.permutation(1000) / 7, rng.integers(0, 50, 1000)
    expected = weights[np.argsort(values)].reshape(10, 100).sum(axis=1)
    assert distribution_of(values, weights).weight_by_band(10) == pytest.approx(expected)
    assert distribution_of(values, weights, 10).weight_by_band(10) == pytest.approx(expected, rel=0.05, abs=3)


def test_equal_numbers_share_their_weight_between_the_bands_they_cross():
    assert distribution_of(np.zeros(7), np.full(7, 10)).weight_by_band(2).tolist() == [35, 35]


def test_nan_is_counted_and_left_out_and_infinities_are_numbers():
    found = distribution_of(np.array([np.nan, -np.inf, 3, np.inf, np.nan, 1.0]))
    assert (found.nan, found.count, found.minimum, found.maximum) == (2, 4, -np.inf, np.inf)
    assert [found.quantile(f) for f in (0.5, 0.75, 1)] == [1, 3, np.inf]
    binned = distribution_of(np.array([np.nan, -np.inf, 3, np.inf, np.nan, 1.0]), exact_values=1)
    assert [binned.quantile(f) for f in (0, 0.5, 0.75, 1)] == [-np.inf, 1, 3, np.inf]


def test_fraction_below_counts_strictly_smaller_numbers():
    found = distribution_of(np.array([1, 2, 2, 3]))
    assert [found.fraction_below(v) for v in (0, 1, 2, 2.5, 9)] == [0, 0, 0.25, 0.75, 1]


def test_no_numbers_have_no_quantile():
    found = Distribution()
    found.add(np.array([np.nan]), np.array([1]))
    assert (found.count, found.nan) == (0, 1)
    assert np.isnan(found.mean)
    with pytest.raises(ValueError, match="no numbers"):
        found.quantile(0.5)


def test_memory_does_not_grow_with_the_numbers_once_they_are_counted_in_bins():
    found = Distribution(exact_values=1000)
    for _ in range(20):
        found.add(np.arange(900), np.ones(900))
    assert sum(len(part) for part, _ in found._kept) <= 1000
    assert found.count == 18000
    assert found.quantile(0.5) == 449
