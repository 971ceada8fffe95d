"""Ranking documents by score: ascending, ties broken by a seeded hash of the document's number in its source.

The sort key of a document is one 64-bit word, its score in the upper half and a bijective 32-bit hash of its number
in the lower half: one in-place integer sort ranks everything, ties included, and the hash is inverted to get the
number back. Since the hash sees only the document's number in the source, cutting the same documents into other
shards changes nothing. Scores that a float32 cannot hold exactly, and sources of more than 2**32 documents, are
ranked by a slower stable sort.

The keys are the only array of the size of the source. Ranked documents are handed on in pieces that fit the cache,
from several threads, as soon as their part of the keys is sorted. Cost measured in docs/benchmarks.md
(`benchmarks/data_engine.py`).
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.permutation import derive_key, mix64_array
from megatron_kaiyuan.host.maps import look_up

__all__ = ["STRIDE", "Ranking", "prepare_ranking", "rank_by_score", "ranks_of", "stride_sums", "tie_hash"]

STRIDE = 16
"""Ranked documents between two stored token counts: half a byte a document, at most 16 lengths a look-up."""

_PIECE = 1 << 17  # documents a thread handles at once: all its temporaries stay in the second-level cache
_LOW = 0 if sys.byteorder == "little" else 1  # where the lower half of a key lies among its two halves
_ODD_FIRST, _ODD_SECOND = 0x7FEB352D, 0x846CA68B
_INVERSE_FIRST, _INVERSE_SECOND = pow(_ODD_FIRST, -1, 1 << 32), pow(_ODD_SECOND, -1, 1 << 32)

type Take = Callable[[int, NDArray[np.unsignedinteger]], None]
"""Gets the rank of the first and the numbers of some consecutively ranked documents, in an array that is reused."""


class Ranking(Protocol):
    """Documents on their way into ascending score, without the scores themselves."""

    count: int
    """Documents."""
    dtype: type[np.unsignedinteger]
    """Of their numbers: uint32, or uint64 past 2**32 documents."""

    def hand_out(self, take: Take, advance: Callable[[int], None] = ...) -> None:
        """Call `take` once for every rank, from several threads, in pieces of no particular order.

        It can be called only once. A piece begins at a multiple of `STRIDE`, and has a multiple of it but for the last
        one. `advance` hears of every document twice: when it is sorted, and when it has been taken.
        """


def prepare_ranking(scores: NDArray[np.floating], seed: int = 0) -> Ranking:
    """Take what is needed of the scores.

    Args:
        scores: one finite or infinite number per document, `[N]`, no NaN; higher is better.
        seed: of the hash that orders equal scores.
    """
    if len(scores) <= 1 << 32 and _fits_float32(scores):
        return _PackedRanking(scores, seed)
    return _StableRanking(scores, seed)


def rank_by_score(scores: NDArray[np.floating], seed: int = 0) -> NDArray[np.unsignedinteger]:
    """Document numbers in ascending score: a permutation of `range(N)`, uint32 `[N]`, uint64 when `N > 2**32`.

    Args:
        scores: as for `prepare_ranking`.
        seed: as for `prepare_ranking`.
    """
    ranking = prepare_ranking(scores, seed)
    order = np.empty(ranking.count, dtype=ranking.dtype)

    def take(first: int, documents: NDArray[np.unsignedinteger]) -> None:
        order[first : first + len(documents)] = documents

    ranking.hand_out(take)
    return order


def ranks_of(
    documents: NDArray[np.int64],
    order: NDArray[np.unsignedinteger],
    scores_of: Callable[[NDArray[np.int64]], NDArray[np.floating]],
    seed: int = 0,
) -> NDArray[np.int64]:
    """Ranks of these documents in `order`, by binary search: the inverse permutation is never stored.

    Args:
        documents: document numbers, int64 `[n]`.
        order: what `rank_by_score` returned, `[N]`.
        scores_of: gives the scores of an array of documents.
        seed: the seed of the ranking.

    Returns:
        int64 `[n]`, with `order[rank] == document`.
    """
    hashes = tie_hash(documents, len(order), seed)
    scores = scores_of(documents).astype(np.float64)
    low = np.zeros(len(documents), dtype=np.int64)
    high = np.full(len(documents), len(order), dtype=np.int64)
    while np.any(low < high):
        middle = (low + high) // 2
        probe = look_up(order, np.minimum(middle, len(order) - 1)).astype(np.int64)
        probe_scores = scores_of(probe).astype(np.float64)
        probe_hashes = tie_hash(probe, len(order), seed)
        below = (probe_scores < scores) | ((probe_scores == scores) & (probe_hashes < hashes))
        active = low < high
        low = np.where(active & below, middle + 1, low)
        high = np.where(active & ~below, middle, high)
    return low


def stride_sums(lengths: NDArray[np.int32], documents: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """Tokens of each `STRIDE` of these documents, the last of them perhaps fewer: int64 `[ceil(n / STRIDE)]`.

    Args:
        lengths: tokens of every document of the source, int32 `[N]`.
        documents: numbers of some of them, each below N, `[n]`.
    """
    own = lengths.take(documents.astype(np.intp), mode="clip")  # nothing to clip: this mode alone copies nothing more
    whole = len(own) // STRIDE * STRIDE
    sums = np.einsum("ij->i", own[:whole].reshape(-1, STRIDE), dtype=np.int64, casting="safe")
    return sums if whole == len(own) else np.append(sums, own[whole:].sum(dtype=np.int64))


class _StableRanking:
    """Any scores, any number of documents: sorted on arrival, in memory, by one thread."""

    def __init__(self, scores: NDArray[np.floating], seed: int) -> None:
        self.count = len(scores)
        self.dtype: type[np.unsignedinteger] = np.uint32 if self.count <= 1 << 32 else np.uint64
        ties = tie_hash(np.arange(self.count), self.count, seed)
        order = np.lexsort((ties, scores.astype(np.float64) + 0.0))
        self._order: NDArray[np.unsignedinteger] = order.astype(self.dtype)

    def hand_out(self, take: Take, advance: Callable[[int], None] = lambda _: None) -> None:
        """Slices of the sorted order."""
        advance(self.count)
        for first in range(0, self.count, _PIECE):
            documents = self._order[first : first + _PIECE]
            take(first, documents)
            advance(len(documents))


class _PackedRanking:
    """Scores that fit a float32, of at most 2**32 documents: one 64-bit key each, packed on arrival."""

    def __init__(self, scores: NDArray[np.floating], seed: int) -> None:
        self.count = len(scores)
        self.dtype: type[np.unsignedinteger] = np.uint32
        self._seed = np.uint32(derive_key("ties", seed) & 0xFFFFFFFF)
        self._keys = np.empty(self.count, dtype=np.uint64)
        self._buffers = _Buffers()
        self._numbers = np.arange(min(self.count, _PIECE), dtype=np.uint32)
        self._threads = min(16, len(os.sched_getaffinity(0))) if self.count > _PIECE else 1
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda first: self._pack(scores, first), range(0, self.count, _PIECE)))

    def hand_out(self, take: Take, advance: Callable[[int], None] = lambda _: None) -> None:
        """Sort parts of the keys side by side, and unpack a part while others are still being sorted."""

        def unpack(first: int, stop: int) -> None:
            take(first, self._unpack(first, stop))
            advance(stop - first)

        with ThreadPoolExecutor(self._threads) as pool:
            parts = self._split(pool)
            sorting = {pool.submit(self._keys[first:stop].sort): (first, stop) for first, stop in parts}
            unpacking: list[Future[None]] = []
            for done in as_completed(sorting):
                done.result()
                start, end = sorting[done]
                advance(end - start)
                unpacking += [
                    pool.submit(unpack, first, min(first + _PIECE, end)) for first in range(start, end, _PIECE)
                ]
            for work in as_completed(unpacking):
                work.result()

    def _split(self, pool: ThreadPoolExecutor) -> list[tuple[int, int]]:
        """Cut the keys into as many parts as threads, each above the one before: halves, halves of halves, ..."""
        parts = [(0, self.count)]
        while len(parts) < self._threads:
            cuts = [(first, (first + stop) // 2 // STRIDE * STRIDE, stop) for first, stop in parts]
            list(pool.map(lambda cut: self._keys[cut[0] : cut[2]].partition(cut[1] - cut[0]), cuts))
            parts = [part for first, middle, stop in cuts for part in ((first, middle), (middle, stop))]
        return parts

    def _pack(self, scores: NDArray[np.floating], first: int) -> None:
        stop = min(first + _PIECE, self.count)
        bits, hashes, spare = self._buffers.of(stop - first)
        np.add(scores[first:stop], np.float32(0), out=bits.view(np.float32), casting="same_kind")  # -0.0 ties with 0.0
        # IEEE floats sort like integers once the sign bit is flipped, and all bits for negative numbers
        np.right_shift(bits.view(np.int32), 31, out=spare.view(np.int32))
        spare |= np.uint32(0x80000000)
        bits ^= spare
        np.add(self._numbers[: stop - first], np.uint32(first), out=hashes)
        _hash_ties(hashes, self._seed, spare)
        halves = self._keys[first:stop].view(np.uint32).reshape(-1, 2)
        halves[:, _LOW], halves[:, 1 - _LOW] = hashes, bits

    def _unpack(self, first: int, stop: int) -> NDArray[np.uint32]:
        documents: NDArray[np.uint32]
        documents, _, spare = self._buffers.of(stop - first)
        documents[:] = self._keys[first:stop].view(np.uint32)[_LOW::2]
        _unhash_ties(documents, self._seed, spare)
        return documents


class _Buffers(threading.local):
    """Three arrays of each thread, used again for every piece: new ones would be new pages each time."""

    def __init__(self) -> None:
        self._arrays: NDArray[np.uint32] = np.empty((3, 0), dtype=np.uint32)

    def of(self, size: int) -> NDArray[np.uint32]:
        """Return uint32 `[3, size]` in the same memory every time."""
        if self._arrays.shape[1] < size:
            self._arrays = np.empty((3, size), dtype=np.uint32)
        arrays: NDArray[np.uint32] = self._arrays[:, :size]
        return arrays


def _fits_float32(scores: NDArray[np.floating]) -> bool:
    if scores.dtype in (np.float32, np.float16):
        return True
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(scores[start : start + _PIECE].astype(np.float32), scores[start : start + _PIECE])
            for start in range(0, len(scores), _PIECE)
        )


def _hash_ties(values: NDArray[np.uint32], key: np.uint32, spare: NDArray[np.uint32]) -> None:
    """A seeded bijection of 32-bit numbers, in place: xor-shifts and odd multiplications."""
    values ^= key
    _xor_shift(values, spare)
    values *= np.uint32(_ODD_FIRST)
    _xor_shift(values, spare)
    values *= np.uint32(_ODD_SECOND)
    _xor_shift(values, spare)


def _unhash_ties(values: NDArray[np.uint32], key: np.uint32, spare: NDArray[np.uint32]) -> None:
    """The inverse of `_hash_ties`, in place."""
    _xor_shift(values, spare)
    values *= np.uint32(_INVERSE_SECOND)
    _xor_shift(values, spare)
    values *= np.uint32(_INVERSE_FIRST)
    _xor_shift(values, spare)
    values ^= key


def _xor_shift(values: NDArray[np.uint32], spare: NDArray[np.uint32]) -> None:
    """`values ^= values >> 16`, its own inverse."""
    np.right_shift(values, np.uint32(16), out=spare)
    values ^= spare


def tie_hash(numbers: NDArray[np.int64], total: int, seed: int) -> NDArray[np.uint64]:
    """The hash that orders ties: the 32-bit one wherever numbers fit, so that all paths agree on the order of ties."""
    key = derive_key("ties", seed)
    if total > 1 << 32:
        return mix64_array(numbers.astype(np.uint64) ^ np.uint64(key))
    values = numbers.astype(np.uint32)
    _hash_ties(values, np.uint32(key & 0xFFFFFFFF), np.empty_like(values))
    return values.astype(np.uint64)
