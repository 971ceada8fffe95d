"""Sets of documents, against python lists."""

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.data.order import StorageOrder
from megatron_kaiyuan.data.runs import DocumentRuns, nearest_count, trainable_runs
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import numbered_documents, write_source

SETTINGS = settings(deadline=None, max_examples=50)


@st.composite
def sets(draw):
    """Lengths of a source's documents, which are left out, and the number of documents in a block."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=60).filter(any))
    out = draw(st.sets(st.integers(0, len(lengths) - 1), max_size=len(lengths) - 1))
    return lengths, out, draw(st.sampled_from([1, 1, 16]))


class Case:
    """A set of runs beside the plain list of its positions."""

    def __init__(self, folder, drawn):
        lengths, out, block = drawn
        self.lengths = lengths
        write_source(folder, numbered_documents(lengths), cuts=[len(lengths) // 2])
        self.order = StorageOrder(open_source("source", str(folder)))
        self.order.block = block
        self.runs = trainable_runs(self.order, np.array(sorted(out), dtype=np.int64))
        self.positions = [position for position in range(len(lengths)) if position not in out]
        self.block = block

    def tokens(self, positions):
        """Tokens of these documents."""
        return sum(self.lengths[position] for position in positions)


def on_sets(**strategies):
    """Run a test on generated sets."""

    def decorate(test):
        @SETTINGS
        @given(drawn=sets(), **strategies)
        def wrapped(drawn, **rest):
            with tempfile.TemporaryDirectory() as folder:
                test(Case(Path(folder) / "source", drawn), **rest)

        wrapped.__name__ = test.__name__
        return wrapped

    return decorate


def members(runs):
    """Positions of a set; checks that its runs are ascending, disjoint, joined and not empty."""
    starts, stops = runs.starts.tolist(), runs.stops.tolist()
    assert all(start < stop for start, stop in zip(starts, stops, strict=True))
    assert all(stop <= start for stop, start in zip(stops, starts[1:], strict=False))
    return [position for start, stop in zip(starts, stops, strict=True) for position in range(start, stop)]


fractions = st.fractions(0, 1, max_denominator=40)


@on_sets()
def test_counts_and_offsets_are_those_of_the_list(case):
    assert members(case.runs) == case.positions
    assert case.runs.num_documents == len(case.positions)
    assert case.runs.num_tokens == case.tokens(case.positions)
    indices = np.arange(len(case.positions) + 1)
    expected = [case.tokens(case.positions[:index]) for index in indices]
    assert case.runs.tokens_before(indices).tolist() == expected
    below = [case.tokens([p for p in case.positions if p < edge]) for edge in range(len(case.lengths) + 1)]
    assert case.runs.tokens_below(np.arange(len(case.lengths) + 1)).tolist() == below


@on_sets(ends=st.tuples(fractions, fractions))
def test_between_is_a_slice(case, ends):
    first, last = sorted(nearest_count(end, len(case.positions)) for end in ends)
    assert members(case.runs.between(first, last)) == case.positions[first:last]


@on_sets(out=st.sets(st.integers(0, 59)))
def test_without_is_set_difference(case, out):
    positions = np.array(sorted(n for n in out if n < len(case.lengths)), dtype=np.int64)
    assert members(case.runs.without(positions)) == [p for p in case.positions if p not in out]


@on_sets(fraction=fractions)
def test_nearest_index_is_the_nearest_boundary(case, fraction):
    target = fraction * case.runs.num_tokens
    index = case.runs.nearest_index(target)
    documents = [[0] * case.lengths[position] for position in case.positions]
    expected = oracle.nearest_boundary(documents, target)
    assert case.tokens(case.positions[:index]) == case.tokens(case.positions[:expected])


@on_sets(start=fractions, size=fractions)
def test_pieces_are_the_tokens_of_the_set(case, start, size):
    flat = [t for p in case.positions for t in range(sum(case.lengths[:p]), sum(case.lengths[: p + 1]))]
    first = int(start * len(flat))
    count = int(size * (len(flat) - first))
    pieces = case.runs.pieces(first, count)
    assert [token + k for token, number in pieces for k in range(number)] == flat[first : first + count]
    assert all(number > 0 for _, number in pieces)


@on_sets(fraction=fractions, key=st.integers(0, 2**64 - 1))
def test_a_sample_of_documents_has_the_exact_count(case, fraction, key):
    drawn = members(case.runs.sample(fraction, "documents", key))
    assert len(drawn) == nearest_count(fraction, len(case.positions))
    assert set(drawn) <= set(case.positions)


@on_sets(fraction=fractions, key=st.integers(0, 2**64 - 1))
def test_a_sample_of_tokens_misses_by_at_most_half_a_document(case, fraction, key):
    drawn = members(case.runs.sample(fraction, "tokens", key))
    assert set(drawn) <= set(case.positions)
    wanted = nearest_count(fraction, case.runs.num_tokens)
    assert abs(case.tokens(drawn) - wanted) <= max(case.lengths) / 2


@on_sets(pair=st.tuples(fractions, fractions), by=st.sampled_from(["documents", "tokens"]), key=st.integers(0, 99))
def test_a_larger_sample_contains_the_smaller_one(case, pair, by, key):
    small, large = (set(members(case.runs.sample(fraction, by, key))) for fraction in sorted(pair))
    assert small <= large


@on_sets(by=st.sampled_from(["documents", "tokens"]), key=st.integers(0, 99))
def test_a_sample_of_everything_is_everything_that_has_tokens(case, by, key):
    drawn = members(case.runs.sample(Fraction(1), by, key))
    expected = case.positions if by == "documents" else [p for p in case.positions if case.lengths[p]]
    assert [p for p in drawn if by == "documents" or case.lengths[p]] == expected


def long_source(folder, documents, block=None):
    write_source(folder, numbered_documents([1] * documents))
    order = StorageOrder(open_source("long", str(folder)))
    order.block = block or order.block
    return DocumentRuns(order, np.zeros(1, np.int64), np.array([documents]))


@pytest.mark.parametrize("fraction", [Fraction(1, 10), Fraction(1, 2), Fraction(2, 3), Fraction(97, 100)])
def test_a_sample_is_spread_evenly_with_at_most_three_gap_lengths(tmp_path, fraction):
    """Steinhaus: the gaps of a golden-ratio sequence take at most three lengths; so every range gets its share."""
    runs = long_source(tmp_path / "s", 5000)
    drawn = np.array(members(runs.sample(fraction, "documents", 5)))
    assert len(np.unique(np.diff(drawn))) <= 3
    hits = np.zeros(5001)
    hits[drawn + 1] = 1
    off = np.cumsum(hits) - np.arange(5001) * float(fraction)
    assert off.max() - off.min() < 2 + np.log2(5000)  # the discrepancy of the sequence grows with the logarithm


def test_different_keys_draw_different_samples_and_every_document_can_be_drawn(tmp_path):
    runs = long_source(tmp_path / "s", 400)
    draws = [frozenset(members(runs.sample(Fraction(1, 4), "documents", key))) for key in range(60)]
    assert len(set(draws)) > 50
    counts = np.bincount([p for draw in draws for p in draw], minlength=400)
    assert counts.min() > 0
    assert abs(counts.mean() - 15) < 1e-9


def test_a_large_source_is_sampled_in_blocks_of_neighbours(tmp_path):
    """Past 2**14 documents: whole blocks but for one, the exact count still, the same blocks by documents or tokens."""
    documents = 2**14 + 100
    runs = long_source(tmp_path / "s", documents)
    assert runs.order.block == 16
    drawn = runs.sample(Fraction(1, 3), "documents", 11)
    numbers = np.array(members(drawn))
    assert len(numbers) == nearest_count(Fraction(1, 3), documents)
    sizes = np.bincount(numbers // 16, minlength=-(-documents // 16))
    assert np.count_nonzero((sizes != 0) & (sizes != 16)) <= 2  # the partly taken block, and the short last one
    assert members(runs.sample(Fraction(1, 3), "tokens", 11)) == numbers.tolist()  # one token a document


def test_halves_round_up():
    assert [nearest_count(Fraction(1, 2), total) for total in range(6)] == [0, 1, 1, 2, 2, 3]
