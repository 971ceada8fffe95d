"""Draws: exact counts, one inside the other, and independent: overlaps as chance has them, against its own formula."""

import tempfile
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import Plan, open_source
from megatron_kaiyuan.documents import draws
from megatron_kaiyuan.documents.draws import Draw
from megatron_kaiyuan.documents.even_sample import even_sample
from megatron_kaiyuan.documents.order import StorageOrder
from megatron_kaiyuan.documents.permutation import derive_key
from megatron_kaiyuan.documents.runs import DocumentRuns, nearest_count, trainable_runs
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source
from tests.unit_tests.documents.test_runs import fractions, members

KEYS = st.integers(0, 2**64 - 1)


class Case:
    """A set of a generated source, with the plain list of its positions."""

    def __init__(self, folder, drawn):
        self.lengths, out, self.block = drawn
        write_source(folder, numbered_documents(self.lengths))
        order = StorageOrder(open_source("source", str(folder)))
        order.block = self.block
        self.runs = trainable_runs(order, np.array(sorted(out), dtype=np.int64))
        self.positions = [position for position in range(len(self.lengths)) if position not in out]

    def drawn(self, how, fraction, by, key):
        """Positions of a part, by either way of drawing."""
        if how == "even":
            return members(even_sample(self.runs, fraction, by, key))
        total = self.runs.num_documents if by == "documents" else self.runs.num_tokens
        count = nearest_count(fraction, total)
        draw = Draw(self.runs, key)
        return members(draw.documents(count) if by == "documents" else draw.tokens(count))

    def tokens(self, positions):
        """Tokens of these documents."""
        return sum(self.lengths[position] for position in positions)


@st.composite
def sets(draw):
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=90).filter(any))
    out = draw(st.sets(st.integers(0, len(lengths) - 1), max_size=len(lengths) - 1))
    return lengths, out, draw(st.sampled_from([1, 16]))


def on_sets(**strategies):
    """Run a test on generated sets, with blocks of one document and of several."""

    def decorate(test):
        @settings(deadline=None, max_examples=60)
        @given(drawn=sets(), how=st.sampled_from(["draw", "even"]), **strategies)
        def wrapped(drawn, **rest):
            with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
                case = Case(Path(folder) / "source", drawn)
                patch.setattr(draws, "draw_block", lambda _: case.block)
                patch.setattr(draws, "_SINGLE", {True: 0, False: 0})  # tokens, too, from whichever end is nearer
                test(case, **rest)

        wrapped.__name__ = test.__name__
        return wrapped

    return decorate


@on_sets(fraction=fractions, key=KEYS)
def test_a_part_of_documents_has_the_exact_count(case, how, fraction, key):
    drawn = case.drawn(how, fraction, "documents", key)
    assert len(drawn) == nearest_count(fraction, len(case.positions))
    assert set(drawn) <= set(case.positions)


@on_sets(fraction=fractions, key=KEYS)
def test_a_part_of_tokens_misses_by_at_most_half_a_document(case, how, fraction, key):
    drawn = case.drawn(how, fraction, "tokens", key)
    assert set(drawn) <= set(case.positions)
    wanted = nearest_count(fraction, case.runs.num_tokens)
    assert abs(case.tokens(drawn) - wanted) <= max(case.lengths) / 2


@on_sets(pair=st.tuples(fractions, fractions), by=st.sampled_from(["documents", "tokens"]), key=st.integers(0, 99))
def test_a_larger_part_contains_the_smaller_one(case, how, pair, by, key):
    small, large = (set(case.drawn(how, fraction, by, key)) for fraction in sorted(pair))
    if by == "tokens":  # empty documents have no place among tokens
        small, large = ({p for p in some if case.lengths[p]} for some in (small, large))
    assert small <= large


@on_sets(by=st.sampled_from(["documents", "tokens"]), key=st.integers(0, 99))
def test_a_part_of_everything_is_everything_that_has_tokens(case, how, by, key):
    drawn = case.drawn(how, Fraction(1), by, key)
    expected = case.positions if by == "documents" else [p for p in case.positions if case.lengths[p]]
    assert [p for p in drawn if by == "documents" or case.lengths[p]] == expected


class Counted:
    """An order of very many documents of one token each, of which none exists."""

    ranked = False

    def __init__(self, documents):
        self.num_documents = documents
        self.block = 1

    def token_offsets(self, positions):
        """Tokens before each position."""
        return positions


def whole(documents):
    return DocumentRuns(Counted(documents), np.zeros(1, np.int64), np.array([documents]))


def overlap(first, second):
    return first.common_with(second).num_documents


def hypergeometric(total, one, other):
    """Mean and standard deviation of the overlap of two independent draws of so many of `total`."""
    mean = one * other / total
    return mean, np.sqrt(mean * (1 - one / total) * (1 - other / total) * total / (total - 1))


@pytest.mark.parametrize(
    ("documents", "sizes"), [(1000, (300, 300)), (20_000, (6000, 10_000)), (131_072, (13_107,) * 2)]
)
def test_overlaps_of_draws_are_hypergeometric(documents, sizes):
    """100 pairs of keys as phases, sources and seeds make them: none beyond 5 sigma, and they vary as they should."""
    runs = whole(documents)
    mean, sigma = hypergeometric(documents, *sizes)
    keys = [derive_key(seed, "phase", seed % 7) for seed in range(101)]
    drawn = [[Draw(runs, key).documents(size) for key in keys] for size in sizes]
    off = np.array([(overlap(drawn[0][n], drawn[1][n + 1]) - mean) / sigma for n in range(100)])
    assert np.abs(off).max() < 5
    assert abs(off.mean()) < 5 / np.sqrt(100)
    assert 0.5 < off.var() < 1.8  # chi squared of 100: beyond either with a chance below 1e-5


def test_even_samples_are_not_independent():
    """What version 1 draws: their overlap is anything from none to all, and the test above would see it."""
    runs = whole(1000)
    mean, sigma = hypergeometric(1000, 300, 300)
    parts = [even_sample(runs, Fraction(3, 10), "documents", derive_key(seed)) for seed in range(101)]
    off = [(overlap(one, other) - mean) / sigma for one, other in pairwise(parts)]
    assert np.abs(off).max() > 10


def test_every_document_is_drawn_as_often_as_any_other():
    counts = np.zeros(400)
    for key in range(300):
        counts[members(Draw(whole(400), derive_key(key)).documents(100))] += 1
    assert counts.sum() == 300 * 100
    assert np.abs(counts - 75).max() < 5 * np.sqrt(300 * 0.25 * 0.75)


@pytest.mark.parametrize("documents", [2**17, 2**17 + 1, 10**6, 3 * 10**6, 10**8])
@pytest.mark.parametrize("fraction", [0.02, 0.98])
def test_no_more_than_256_neighbours_are_taken_or_left_together(documents, fraction):
    drawn = Draw(whole(documents), 5).documents(round(documents * fraction))
    assert drawn.num_documents == round(documents * fraction)
    block = draws.draw_block(drawn.order)
    assert block <= (1 if documents <= 2**17 else 256)
    edges = np.concatenate([drawn.starts, drawn.stops])
    assert np.count_nonzero((edges % block != 0) & (edges != documents)) <= 1, "one block may be cut"
    rare = (drawn.stops - drawn.starts) if fraction < 0.5 else (drawn.starts[1:] - drawn.stops[:-1])
    assert len(rare) > 0.9 * min(fraction, 1 - fraction) * documents / block, "hardly a block has its neighbour"


@pytest.mark.parametrize(("fraction", "listed"), [(0.01, 24_000), (0.99, 24_000), (0.3, 610_000)])
def test_a_draw_of_half_a_billion_documents_lists_its_blocks_alone(fraction, listed):
    drawn = Draw(whole(542_451_381), 1).documents(round(542_451_381 * fraction))
    assert drawn.num_documents == round(542_451_381 * fraction)
    assert len(drawn.starts) < listed


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return {
        "web": write_source(folder / "web", numbered_documents([1] * 2000), np.random.default_rng(1).permutation(2000)),
        "code": write_source(folder / "code", numbered_documents([1] * 2000)),
    }


def selections(sources, *phases, **more):
    """The set that each part of each phase selects, by phase and source."""
    plan = Plan.from_spec(plan_of(sources, *phases, seq_length=1, version=2, **more))
    return [dict(phase.streams) for phase in plan.phases]


def test_phases_sources_and_seeds_draw_independently(sources):
    mean, sigma = hypergeometric(2000, 600, 600)
    off = []
    for seed in range(100):
        two = selections(
            sources, *(phase_of("shuffled", dict.fromkeys(sources, "random 30%"), name) for name in "ab"), seed=seed
        )
        sets = [set(members(phase[name].selected)) for phase in two for name in ("web", "code")]
        off += [(len(sets[one] & sets[other]) - mean) / sigma for one, other in ((0, 1), (0, 2), (1, 3))]
    assert np.abs(off).max() < 5
    assert abs(np.mean(off)) < 5 / np.sqrt(300)


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_the_halves_of_one_and_a_half_passes_are_drawn_independently(sources, order):
    mean, sigma = hypergeometric(2000, 1000, 1000)
    part = {"web": {"keep": "all", "repeat": 1.5}}
    off = []
    for seed in range(100):
        one, other = selections(sources, *(phase_of(order, part, name) for name in "ab"), seed=seed)
        off.append((overlap(one["web"].extra, other["web"].extra) - mean) / sigma)
    assert np.abs(off).max() < 5
    assert abs(np.mean(off)) < 5 / np.sqrt(100)


def test_held_out_documents_are_independent_of_what_is_drawn_and_of_other_seeds(sources):
    mean, sigma = hypergeometric(2000, 200, 200)
    held = [
        Plan.from_spec(
            plan_of(sources, phase_of("shuffled", {"web": "all"}), validation={"web": {"documents": 200}}, seed=seed)
        )
        .opened["web"]
        .held_out
        for seed in range(101)
    ]
    off = np.array([(len(np.intersect1d(*pair)) - mean) / sigma for pair in pairwise(held)])
    assert np.abs(off).max() < 5
    assert abs(off.mean()) < 5 / np.sqrt(100)


def test_a_named_draw_is_the_same_documents_and_its_rest_the_others(sources):
    part, rest = {"keep": "random 30%", "draw": "dev"}, {"draw": "rest of dev"}
    phases = [
        phase_of("shuffled", {"web": part, "code": part}, "a"),
        phase_of("curriculum", {"web": part, "code": part}, "b"),
        phase_of("shuffled", {"web": rest, "code": rest}, "c"),
    ]
    one, again, others = selections(sources, *phases)
    for name in sources:
        assert members(one[name].selected) == members(again[name].selected)
        assert len(members(one[name].selected)) == 600
        together = members(one[name].selected) + members(others[name].selected)
        assert sorted(together) == list(range(2000))
    assert members(one["web"].selected) != members(one["code"].selected), "each source has its own documents"


def test_a_smaller_part_of_a_named_draw_lies_within_the_larger(sources):
    phases = [
        phase_of("shuffled", {"web": {"keep": f"random {size}%", "draw": "dev"}}, f"p{size}") for size in (10, 60)
    ]
    small, large = selections(sources, *phases)
    assert set(members(small["web"].selected)) < set(members(large["web"].selected))
