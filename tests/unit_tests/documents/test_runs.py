"""Sets of documents, against python lists."""

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.documents.order import StorageOrder
from megatron_kaiyuan.documents.runs import DocumentRuns, nearest_count, trainable_runs
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import numbered_documents, write_source

SETTINGS = settings(deadline=None, max_examples=50)


@st.composite
def sets(draw):
    """Lengths of a source's documents, and which are left out."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=60).filter(any))
    return lengths, draw(st.sets(st.integers(0, len(lengths) - 1), max_size=len(lengths) - 1))


class Case:
    """A set of runs beside the plain list of its positions."""

    def __init__(self, folder, drawn):
        lengths, out = drawn
        self.lengths = lengths
        write_source(folder, numbered_documents(lengths), cuts=[len(lengths) // 2])
        self.order = StorageOrder(open_source("source", str(folder)))
        self.runs = trainable_runs(self.order, np.array(sorted(out), dtype=np.int64))
        self.positions = [position for position in range(len(lengths)) if position not in out]

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


@on_sets(other=st.sets(st.integers(0, 59)))
def test_sets_are_added_and_cut_as_sets_of_python_are(case, other):
    positions = np.array(sorted(n for n in other if n < len(case.lengths)), dtype=np.int64)
    second = DocumentRuns(case.order, positions, positions + 1)
    here, there = set(case.positions), set(positions.tolist())
    assert members(case.runs.minus(second)) == sorted(here - there)
    assert members(case.runs.joined_with(second)) == sorted(here | there)
    assert members(case.runs.common_with(second)) == sorted(here & there)
    assert members(second.common_with(case.runs)) == sorted(here & there)
    below = [len([p for p in case.positions if p < edge]) for edge in range(len(case.lengths) + 1)]
    assert case.runs.documents_below(np.arange(len(case.lengths) + 1)).tolist() == below
    assert case.runs.positions_at(np.arange(len(case.positions))).tolist() == case.positions


def test_halves_round_up():
    assert [nearest_count(Fraction(1, 2), total) for total in range(6)] == [0, 1, 1, 2, 2, 3]
