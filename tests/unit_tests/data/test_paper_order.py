"""Our curriculum beside the paper's own ordering, on the same documents: what agrees, and what differs and why."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.data.interleave import prefix_bound
from tests.unit_tests.data.paper_order import keep_strictly_above, paper_order, tokens_in_slices
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

SETTINGS = settings(deadline=None, max_examples=40)
LENGTH = 3
FAR = 100_000
"""Tokens of source `n` start at `n * FAR`, so that a token tells its source."""


def ours(folder, lengths, scores, seq_length, **part):
    """The curriculum over several sources of documents with these lengths and scores."""
    sources = {
        f"s{n}": write_source(Path(folder) / f"s{n}", numbered_documents(some, n * FAR), scores[n])
        for n, some in enumerate(lengths)
    }
    phase = phase_of("curriculum", dict.fromkeys(sources, part or None))
    return CurriculumDataset(Plan.from_spec(plan_of(sources, phase, seq_length=seq_length)))


def one_document_windows(sizes, seed, rank_shift):
    """(source, document) of each sample: ours, and the paper's over the documents that our windows predict.

    With documents of `seq_length` tokens each window predicts exactly one document, all but the worst, whose last token
    is the first input.
    """
    rng = np.random.default_rng(seed)
    scores = [rng.permutation(size + 1).astype(float) for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        order = ours(folder, [[LENGTH] * (size + 1) for size in sizes], scores, LENGTH)
        samples = [order[sample]["tokens"] for sample in range(len(order))]
    for tokens in samples:
        assert len(set((tokens[1:] % FAR // LENGTH).tolist())) == 1
    mine = [(int(tokens[1]) // FAR, int(tokens[1]) % FAR // LENGTH) for tokens in samples]
    kept = [np.flatnonzero(some > 0) for some in scores]
    datasets, documents = paper_order([some[k] for some, k in zip(scores, kept, strict=True)], rng, rank_shift)
    theirs = [(d, int(kept[d][number])) for d, number in zip(datasets.tolist(), documents.tolist(), strict=True)]
    return mine, theirs


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@SETTINGS
@given(sizes=sizes, seed=st.integers(0, 99))
@example(sizes=[40, 1], seed=0)
def test_with_one_document_a_window_our_order_is_the_papers_with_ranks_taken_at_their_middle(sizes, seed):
    """Where no two sources tie; at a tie the paper draws lots and we take the plan's order."""
    mine, theirs = one_document_windows(sizes, seed, rank_shift=0.5)
    places = [(rank + 0.5) / size for size in sizes for rank in range(size)]
    ties = Counter(places)
    by_place = sorted(((rank + 0.5) / size, number) for number, size in enumerate(sizes) for rank in range(size))
    assert [number for number, _ in mine] == [number for _, number in by_place]
    assert sorted(mine) == sorted(theirs)
    for (place, _), mine_now, theirs_now in zip(by_place, mine, theirs, strict=True):
        assert ties[place] > 1 or mine_now == theirs_now


@SETTINGS
@given(sizes=sizes, seed=st.integers(0, 99))
@example(sizes=[40, 1], seed=0)
def test_with_the_papers_own_ranks_each_source_comes_in_the_same_order_and_half_a_gap_later(sizes, seed):
    """R = r N / N_i sits at the end of a document's share of the line, ours in its middle: 1 / (2 N_i) of it earlier.

    So every prefix of both keeps the mix, and a source's counts differ by the two deviations: ours is at most
    `prefix_bound`; the paper's is one-sided, since counts are rounded down: between -(1 - p) and p (k - 1).
    """
    mine, theirs = one_document_windows(sizes, seed, rank_shift=0.0)
    for number in range(len(sizes)):
        assert [d for s, d in mine if s == number] == [d for s, d in theirs if s == number]
    for number, size in enumerate(sizes):
        share = size / sum(sizes)
        bound = prefix_bound([float(size) for size in sizes], number)
        for length in range(len(mine) + 1):
            our_count = sum(s == number for s, _ in mine[:length]) - share * length
            their_count = sum(s == number for s, _ in theirs[:length]) - share * length
            assert abs(our_count) <= bound + 1e-9
            assert -(1 - share) - 1e-9 <= their_count <= share * (len(sizes) - 1) + 1e-9


def test_equal_sources_come_in_turn_in_both():
    mine, theirs = one_document_windows([20, 20, 20], 1, rank_shift=0.0)
    assert [s for s, _ in mine] == [0, 1, 2] * 20
    for turn in range(20):
        assert sorted(s for s, _ in theirs[3 * turn : 3 * turn + 3]) == [0, 1, 2]


def test_the_papers_ties_are_drawn_by_lot_and_ours_are_not():
    first, second = (one_document_windows([20, 20], 3, 0.0) for _ in range(2))
    assert first[0] == second[0]
    scores = [np.arange(20.0)] * 2
    drawn = {tuple(paper_order(scores, np.random.default_rng(seed))[0].tolist()) for seed in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize(("fraction", "theirs"), [(0.5, 30), (0.25, 10), (0.05, 0), (0.95, 90)])
def test_ties_at_a_threshold_are_lost_by_the_paper_and_kept_exactly_by_us(tmp_path, fraction, theirs):
    """100 documents with five different scores: 10 of score 0, 20 of 1, 40 of 2, 20 of 3 and 10 of 4."""
    scores = np.repeat([0.0, 1.0, 2.0, 3.0, 4.0], [10, 20, 40, 20, 10])
    assert len(keep_strictly_above(scores, fraction)) == theirs
    order = ours(tmp_path, [[LENGTH] * 100], [scores], LENGTH, keep=f"top {fraction:.0%}")
    kept = order.plan.describe()["phases"][0]["sources"]["s0"]["documents"]
    assert kept == round(100 * fraction)


def token_shares(folder, trend):
    """Share of source 0 in each tenth of a phase: ours and the paper's; 300 documents each, 60 tokens long on average.

    In source 0 length rises over the ranks by `trend` of the mean to both sides; source 1 has no trend.
    """
    ranks = np.arange(300)
    rising = np.round(60 * (1 + trend * (2 * (ranks + 0.5) / 300 - 1))).astype(int)
    lengths = [rising, np.full(300, 60)]
    scores = [ranks.astype(float), ranks.astype(float)]
    order = ours(folder, lengths, scores, seq_length=10)
    count = len(order) // 10 * 10
    shown = np.array([order[sample]["tokens"][1:] // FAR == 0 for sample in range(count)])
    datasets, documents = paper_order(scores, np.random.default_rng(0))
    in_order = np.array([lengths[s][d] for s, d in zip(datasets, documents, strict=True)])
    paper = tokens_in_slices(datasets, in_order, np.linspace(0, in_order.sum(), 11))
    return shown.reshape(10, -1).mean(axis=1), paper[:, 0] / paper.sum(axis=1), order.plan.phases[0]


def expected_shares(trend):
    """Source 0's share of each tenth by calculus: both sources are at the same quantile q, and at q there are `q + q +
    trend (q^2 - q)` tokens of both, of which the second term and the third are of source 0."""
    quantiles = np.linspace(0, 1, 10_001)
    own = quantiles + trend * (quantiles**2 - quantiles)
    return np.diff(np.interp(np.linspace(0, 2, 11), own + quantiles, own)) / 0.2


@pytest.mark.parametrize("trend", [0.0, 0.5, -0.8])
def test_the_papers_token_mix_drifts_with_length_and_ours_stays_within_its_bound(tmp_path, trend):
    mine, theirs, phase = token_shares(tmp_path, trend)
    nominal = phase.rates[0] / phase.rates.sum()
    assert nominal == pytest.approx(0.5, abs=1e-3)
    in_a_tenth = phase.num_samples // 10
    assert np.abs(mine - nominal).max() <= 2 * prefix_bound(phase.rates.tolist(), 0) / in_a_tenth + 1e-9
    # an edge may fall anywhere in a document of up to 1.8 * 60 tokens; a tenth has 3 600
    assert theirs == pytest.approx(expected_shares(trend), abs=1.8 * 60 / 3600)


def test_tokens_in_slices_splits_documents_at_the_edges():
    datasets, lengths = np.array([0, 1, 0, 2]), np.array([4, 2, 6, 8])
    found = tokens_in_slices(datasets, lengths, np.array([0, 5, 10, 12, 20]))
    assert found.tolist() == [[4, 1, 0], [4, 1, 0], [2, 0, 0], [0, 0, 8]]
