"""An ascending stream that is thinned shows the same windows at any size, against Python's integers."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_kaiyuan.data.unseen import thinned

SAFE = 3_037_000_499  # the largest whole number whose square is below 2**63
MOST = 2**61


@st.composite
def sizes(draw):
    """Samples used and windows available, both often next to a power of two or to what 64 bits can square."""
    middle = draw(st.sampled_from([1, 1000, 2**31, SAFE, 2**32, 2**41, 2**45, 2**52, MOST]) | st.integers(1, MOST))
    used = min(max(middle + draw(st.integers(-3, 3)), 1), MOST - 1)
    return used, draw(st.integers(used, min(2 * used + 3, MOST)) | st.integers(used, MOST))


@given(sizes(), st.lists(st.floats(0, 1), max_size=8))
@example((SAFE + 1, 2 * SAFE + 1), [0.0, 1.0])
@example((MOST - 1, MOST), [1.0])
def test_a_thinned_stream_shows_the_windows_that_whole_numbers_say(drawn, places):
    used, available = drawn
    samples = sorted({0, used // 2, used - 1, *(min(int(place * used), used - 1) for place in places)})
    expected = [(sample + 1) * available // used - 1 for sample in samples]
    found = thinned(np.array(samples), used, available)
    assert found.dtype == np.int64
    assert found.tolist() == expected
    assert expected[-1] == available - 1


@given(st.lists(sizes(), max_size=6), st.floats(0, 1))
def test_streams_of_all_sizes_are_thinned_side_by_side(drawn, place):
    samples = [min(int(place * used), used - 1) for used, _ in drawn]
    used, available = (np.array([pair[number] for pair in drawn], dtype=np.int64) for number in (0, 1))
    expected = [(sample + 1) * most // few - 1 for sample, (few, most) in zip(samples, drawn, strict=True)]
    assert thinned(np.array(samples, dtype=np.int64), used, available).tolist() == expected


@pytest.mark.parametrize("used", [SAFE, SAFE + 1, 4 * 10**9, 2**45])
def test_the_last_sample_of_a_large_stream_shows_its_last_window(used):
    assert thinned(np.array([used - 1]), used, 2 * used - 1).tolist() == [2 * used - 2]
