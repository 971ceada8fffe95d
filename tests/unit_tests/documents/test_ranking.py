"""Laws of ranking documents by score."""

import os
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_kaiyuan.documents.ranking import STRIDE, prepare_ranking, rank_by_score, ranks_of, stride_sums

SETTINGS = settings(deadline=None, max_examples=80)
floats32 = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False))
coarse = hnp.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5, np.inf, -np.inf]))
floats64 = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(allow_nan=False))
any_scores = st.one_of(floats32, coarse, floats64)


@SETTINGS
@given(scores=any_scores, seed=st.integers(0, 3))
def test_every_document_is_ranked_once_in_ascending_score(scores, seed):
    order = rank_by_score(scores, seed)
    assert order.dtype == np.uint32
    assert sorted(order.tolist()) == list(range(len(scores)))
    ranked = scores[order]
    assert all(low <= high for low, high in pairwise(ranked))


@SETTINGS
@given(scores=any_scores, seed=st.integers(0, 3))
def test_a_float64_copy_of_the_same_scores_ranks_alike(scores, seed):
    """The packed and the stable sort must agree, ties included; one score out of reach of float32 picks the latter."""
    wide = np.append(scores.astype(np.float64), 1e300)
    narrow = np.append(scores.astype(np.float64), np.inf)
    slow, fast = rank_by_score(wide, seed), rank_by_score(narrow, seed)
    if np.all(scores.astype(np.float64) < 1e300):
        assert slow.tolist() == fast.tolist()


def test_scores_that_differ_only_beyond_float32_are_still_told_apart():
    scores = 1.0 + np.arange(40)[::-1] * 2.0**-50
    assert rank_by_score(scores).tolist() == list(range(39, -1, -1))


def test_large_integers_are_told_apart():
    assert rank_by_score(np.array([2**30 + 1, 2**30, 2**30 + 2])).tolist() == [1, 0, 2]


def test_minus_zero_ties_with_zero_and_infinities_are_the_ends():
    zeros = np.array([0.0, -0.0] * 20, dtype=np.float32)
    assert rank_by_score(zeros).tolist() == rank_by_score(np.zeros(40, np.float32)).tolist()
    wide = np.array([0.0, -0.0] * 20 + [1e300])
    assert rank_by_score(wide).tolist() == rank_by_score(np.array([0.0] * 40 + [1e300])).tolist()
    assert rank_by_score(np.array([np.inf, 3.0, -np.inf, 3e38], dtype=np.float32)).tolist() == [2, 1, 3, 0]


def test_ties_do_not_depend_on_other_scores():
    """Documents of equal score keep their mutual order whatever else there is: the hash sees their numbers alone."""
    tied = rank_by_score(np.zeros(64, np.float32)).tolist()
    scores = np.zeros(64, np.float32)
    scores[::3] = 1.0
    order = rank_by_score(scores).tolist()
    assert order == [n for n in tied if n % 3] + [n for n in tied if n % 3 == 0]


def test_ties_are_in_another_order_under_another_seed_and_not_in_storage_order():
    orders = {tuple(rank_by_score(np.zeros(50, np.float32), seed).tolist()) for seed in range(10)}
    assert len(orders) == 10
    assert tuple(range(50)) not in orders


def test_ties_are_spread_evenly():
    """Of 20 000 equal documents any third of the ranks holds about a third of the first thousand; 5 sigma."""
    order = rank_by_score(np.zeros(20_000, np.float32), 3)
    for third in np.array_split(order, 3):
        assert abs(np.count_nonzero(third < 1000) - 1000 / 3) < 5 * np.sqrt(1000 * 2 / 9)


@SETTINGS
@given(scores=any_scores, seed=st.integers(0, 3))
def test_ranks_of_inverts_the_order(scores, seed):
    order = rank_by_score(scores, seed)
    documents = np.arange(len(scores))[::-1].copy()
    ranks = ranks_of(documents, order, lambda some: scores[some].astype(np.float64), seed)
    assert order[ranks].tolist() == documents.tolist()
    assert ranks_of(documents[:0], order, lambda some: scores[some], seed).tolist() == []


@SETTINGS
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=70), data=st.data())
def test_stride_sums_are_the_tokens_of_every_sixteen_documents(lengths, data):
    documents = data.draw(st.permutations(range(len(lengths))))
    sums = stride_sums(np.array(lengths, np.int32), np.array(documents, np.uint32))
    own = [lengths[document] for document in documents]
    assert sums.dtype == np.int64
    assert sums.tolist() == [sum(own[first : first + STRIDE]) for first in range(0, len(own), STRIDE)]


def test_stride_sums_do_not_overflow_the_lengths_own_type():
    lengths = np.full(40, 2**31 - 1, np.int32)
    assert stride_sums(lengths, np.arange(40, dtype=np.uint32)).tolist() == [16 * (2**31 - 1)] * 2 + [8 * (2**31 - 1)]


@pytest.mark.parametrize("documents", [1, 15, 16, (1 << 17) - 1, (1 << 17) + 1, (1 << 19) + 5])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_ranking_in_threads_and_pieces_is_a_plain_sort(documents, threads, monkeypatch):
    """Every rank is handed out once, pieces begin at multiples of the stride, and progress adds up."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(threads)))
    scores = np.random.default_rng(0).permutation(documents).astype(np.float32)
    order, firsts, heard, lock = np.full(documents, -1), [], [], threading.Lock()

    def take(first, numbers):
        with lock:
            assert np.all(order[first : first + len(numbers)] == -1)
            order[first : first + len(numbers)] = numbers
            firsts.append((first, len(numbers)))

    prepare_ranking(scores).hand_out(take, heard.append)
    assert np.array_equal(scores[order], np.arange(documents))
    assert all(first % STRIDE == 0 and (size % STRIDE == 0 or first + size == documents) for first, size in firsts)
    assert sum(heard) == 2 * documents


@pytest.mark.parametrize("wide", [False, True], ids=["packed", "stable"])
def test_an_error_of_whoever_takes_the_documents_is_raised(wide):
    def refuse(first, numbers):
        raise OSError(28, "No space left on device")

    scores = np.append(np.zeros(1 << 18), 1e300 if wide else 1.0)
    with pytest.raises(OSError, match="No space"):
        prepare_ranking(scores).hand_out(refuse)


def test_the_order_of_ties_never_changes_between_versions():
    """Golden values: rank indices outlive the version that wrote them."""
    assert rank_by_score(np.zeros(12, np.float32)).tolist() == GOLDEN
    assert rank_by_score(np.array([0.0] * 12 + [1e300])).tolist() == [*GOLDEN, 12]
    assert rank_by_score(np.zeros(12, np.float32), 1234).tolist() == GOLDEN_SEEDED


GOLDEN = [11, 6, 4, 5, 0, 9, 1, 3, 2, 8, 7, 10]
GOLDEN_SEEDED = [0, 3, 2, 7, 1, 4, 11, 5, 8, 9, 6, 10]
