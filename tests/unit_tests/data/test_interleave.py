"""Laws of merging streams, against a brute-force sort."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data.interleave import merged_block, merged_sample, prefix_bound, prefix_counts
from tests.unit_tests.data import oracle

SETTINGS = settings(deadline=None, max_examples=120)
natural_rates = st.lists(st.integers(1, 60), min_size=1, max_size=8)
weights = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7, 1 / 3, 1.5, 2.0, 1e-3, 37.5]), min_size=1, max_size=8)
any_rates = st.one_of(natural_rates, weights)


@SETTINGS
@given(rates=any_rates, start=st.integers(0, 150), length=st.integers(0, 60))
@example(rates=[1], start=0, length=1)
@example(rates=[0.1, 0.3, 0.3, 0.1], start=0, length=60)
def test_any_block_is_that_part_of_the_sorted_positions(rates, start, length):
    streams, samples = merged_block(np.array(rates, dtype=np.float64), start, start + length)
    everything = oracle.merged([float(rate) for rate in rates], start + length)
    assert list(zip(streams.tolist(), samples.tolist(), strict=True)) == everything[start:]


@pytest.mark.parametrize("rates", [[1.0] * 60 + [60.0], [60.0] + [1.0] * 60, [2.0**k for k in range(10)], [1.0] * 90])
def test_blocks_of_many_unequal_streams_are_found_from_anywhere(rates):
    """Here prefixes are as far from their shares as they can be, so a search too narrow would miss samples."""
    everything = oracle.merged(rates, 260)
    for start in range(0, 250):
        streams, samples = merged_block(np.array(rates), start, start + 3)
        assert list(zip(streams.tolist(), samples.tolist(), strict=True)) == everything[start : start + 3]


@SETTINGS
@given(rates=any_rates, sample=st.one_of(st.integers(0, 300), st.integers(0, 2**40)))
@example(rates=[1.0] * 90, sample=44)
@example(rates=[2.0**k for k in range(10)], sample=0)
@example(rates=[60.0] + [1.0] * 60, sample=61)
def test_one_sample_in_plain_numbers_is_that_of_the_block(rates, sample):
    array = np.array(rates, dtype=np.float64)
    (stream,), (own,) = merged_block(array, sample, sample + 1)
    assert merged_sample(array.tolist(), float(array.sum()), sample) == (stream, own)


@SETTINGS
@given(rates=any_rates, samples=st.integers(0, 200))
def test_prefix_counts_count_each_stream_of_the_sorted_positions(rates, samples):
    counts = prefix_counts(np.array(rates, dtype=np.float64), samples)
    everything = oracle.merged([float(rate) for rate in rates], samples)
    assert counts.tolist() == [sum(1 for i, _ in everything if i == stream) for stream in range(len(rates))]


@SETTINGS
@given(rates=natural_rates)
def test_natural_rates_use_up_every_stream_together(rates):
    assert prefix_counts(np.array(rates, dtype=np.float64), sum(rates)).tolist() == rates


def deviations(rates, samples):
    """Count less exact share for each prefix length and stream, `[samples + 1, streams]`."""
    streams, _ = merged_block(np.array(rates, dtype=np.float64), 0, samples)
    counts = np.zeros((samples + 1, len(rates)))
    np.cumsum(np.eye(len(rates))[streams], axis=0, out=counts[1:])
    shares = np.array(rates, dtype=np.float64) / math.fsum(rates)
    return counts - np.arange(samples + 1)[:, None] * shares


def assert_mix_is_kept(rates, samples):
    """In each prefix up to the bound, hence in each window up to twice the bound (largest less smallest prefix)."""
    off = deviations(rates, samples)
    bounds = np.array([prefix_bound(rates, stream) for stream in range(len(rates))])
    assert np.all(np.abs(off) <= bounds + 1e-9), (np.abs(off).max(axis=0), bounds)
    assert np.all(off.max(axis=0) - off.min(axis=0) <= 2 * bounds + 1e-9)


@SETTINGS
@given(rates=any_rates)
@example(rates=[1.0] * 200)
@example(rates=[1.0] * 199 + [199.0])
@example(rates=[199.0] + [1.0] * 199)
@example(rates=[2.0**k for k in range(12)])
@example(rates=[1.0, 1e6])
def test_the_mix_of_every_prefix_and_window_is_within_the_bound(rates):
    assert_mix_is_kept(rates, 700)


def test_the_bound_is_reached_so_a_smaller_one_would_be_false():
    """Equal streams are drawn in turn: after half of them the drawn ones are ahead by 1/2 and the others behind."""
    off = deviations([1.0] * 10, 10)
    assert np.abs(off).max() == pytest.approx(0.9)
    assert prefix_bound([1.0] * 10, 0) == pytest.approx(0.9)


def test_a_single_stream_has_no_deviation():
    assert prefix_bound([5.0], 0) == 0


@pytest.mark.parametrize("start", [10**9, 3 * 10**12])
def test_blocks_far_out_agree_with_their_prefix_counts_and_neighbours(start):
    rates = np.array([536_870_912.0, 17.0, 99_999_989.0, 1e-2])
    streams, samples = merged_block(rates, start, start + 500)
    before = prefix_counts(rates, start)
    assert int(before.sum()) == start
    seen = before.copy()
    for stream, sample in zip(streams.tolist(), samples.tolist(), strict=True):
        assert sample == seen[stream]
        seen[stream] += 1
    assert np.array_equal(seen, prefix_counts(rates, start + 500))
    later = merged_block(rates, start + 123, start + 321)
    assert np.array_equal(later[0], streams[123:321])
    assert np.array_equal(later[1], samples[123:321])


def test_the_mix_of_a_billion_samples_is_within_the_bound():
    rates = [536_870_912.0, 17.0, 99_999_989.0]
    for samples in (999_999_999, 2**31 + 1, 2**40 + 3):
        counts = prefix_counts(np.array(rates), samples)
        shares = [samples * rate / math.fsum(rates) for rate in rates]
        for stream, (count, share) in enumerate(zip(counts.tolist(), shares, strict=True)):
            assert abs(count - share) <= prefix_bound(rates, stream) + 1e-3
