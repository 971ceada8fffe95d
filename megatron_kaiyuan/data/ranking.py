"""Ranking documents by score: ascending, ties broken by a seeded hash of the document's number in its source.

The sort key of a document is one 64-bit word, its score in the upper half and a bijective 32-bit hash of its number
in the lower half: one in-place integer sort ranks everything, ties included, and the hash is inverted to get the
number back. Since the hash sees only the document's number in the source, cutting the same documents into other
shards changes nothing. Scores that a float32 cannot hold exactly, and sources of more than 2**32 documents, are
ranked by a slower stable sort.

Cost measured in docs/benchmarks.md (`benchmarks/rank_index.py`).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.permutation import derive_key, mix64_array

__all__ = ["STRIDE", "rank_by_score", "ranks_of", "token_marks"]

STRIDE = 16
"""Ranked documents between two stored token counts: half a byte a document, at most 16 lengths a look-up."""

_CHUNK = 1 << 19  # documents a thread handles at once: temporaries stay in the cache
_ODD_FIRST, _ODD_SECOND = 0x7FEB352D, 0x846CA68B
_INVERSE_FIRST, _INVERSE_SECOND = pow(_ODD_FIRST, -1, 1 << 32), pow(_ODD_SECOND, -1, 1 << 32)


def rank_by_score(scores: NDArray[np.floating], seed: int = 0) -> NDArray[np.unsignedinteger]:
    """Document numbers in ascending score.

    Args:
        scores: one finite or infinite number per document, `[N]`, no NaN; higher is better.
        seed: of the hash that orders equal scores.

    Returns:
        Permutation of `range(N)`: uint32 `[N]`, uint64 when `N > 2**32`.
    """
    if len(scores) <= 1 << 32 and _fits_float32(scores):
        return _rank_packed(scores, seed)
    ties = _document_hash(np.arange(len(scores)), len(scores), seed)
    order = np.lexsort((ties, scores.astype(np.float64) + 0.0))
    return order.astype(np.uint32 if len(scores) <= 1 << 32 else np.uint64)


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
    hashes = _document_hash(documents, len(order), seed)
    scores = scores_of(documents).astype(np.float64)
    low = np.zeros(len(documents), dtype=np.int64)
    high = np.full(len(documents), len(order), dtype=np.int64)
    while np.any(low < high):
        middle = (low + high) // 2
        probe = order[np.minimum(middle, len(order) - 1)].astype(np.int64)
        probe_scores = scores_of(probe).astype(np.float64)
        probe_hashes = _document_hash(probe, len(order), seed)
        below = (probe_scores < scores) | ((probe_scores == scores) & (probe_hashes < hashes))
        active = low < high
        low = np.where(active & below, middle + 1, low)
        high = np.where(active & ~below, middle, high)
    return low


def token_marks(
    order: NDArray[np.unsignedinteger], lengths_of: Callable[[NDArray[np.int64]], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Tokens before every `STRIDE`-th rank and, last, of all documents: int64 `[ceil(N / STRIDE) + 1]`."""
    marks = np.zeros(-(-len(order) // STRIDE) + 1, dtype=np.int64)

    def fill(start: int) -> None:
        lengths = lengths_of(order[start : start + _CHUNK].astype(np.int64))
        sums = np.add.reduceat(lengths, np.arange(0, len(lengths), STRIDE), dtype=np.int64)
        marks[start // STRIDE + 1 : start // STRIDE + 1 + len(sums)] = sums

    _in_threads(fill, len(order))
    return np.cumsum(marks, out=marks)


def _rank_packed(scores: NDArray[np.floating], seed: int) -> NDArray[np.unsignedinteger]:
    count = len(scores)
    keys = np.empty(count, dtype=np.uint64)

    def pack(start: int) -> None:
        stop = min(start + _CHUNK, count)
        bits = (scores[start:stop].astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0: -0.0 ties with 0.0
        # IEEE floats sort like integers once the sign bit is flipped, and all bits for negative numbers
        bits ^= (-(bits >> np.uint32(31)).astype(np.int32)).view(np.uint32) | np.uint32(0x80000000)
        hashes = _tie_hash(np.arange(start, stop, dtype=np.uint32), seed)
        keys[start:stop] = bits
        keys[start:stop] <<= np.uint64(32)
        keys[start:stop] |= hashes

    def unpack(start: int) -> None:
        stop = min(start + _CHUNK, count)
        order[start:stop] = _tie_hash_inverse(keys[start:stop].astype(np.uint32), seed)

    _in_threads(pack, count)
    _sort_in_threads(keys)
    order = np.empty(count, dtype=np.uint32)
    _in_threads(unpack, count)
    return order


def _fits_float32(scores: NDArray[np.floating]) -> bool:
    if scores.dtype in (np.float32, np.float16):
        return True
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(scores[start : start + _CHUNK].astype(np.float32), scores[start : start + _CHUNK])
            for start in range(0, len(scores), _CHUNK)
        )


def _tie_hash(numbers: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """A seeded bijection of 32-bit numbers: xor-shifts and odd multiplications."""
    values = numbers ^ np.uint32(derive_key("ties", seed) & 0xFFFFFFFF)
    values ^= values >> np.uint32(16)
    values *= np.uint32(_ODD_FIRST)
    values ^= values >> np.uint32(16)
    values *= np.uint32(_ODD_SECOND)
    values ^= values >> np.uint32(16)
    return values


def _tie_hash_inverse(hashes: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    values = hashes ^ (hashes >> np.uint32(16))
    values *= np.uint32(_INVERSE_SECOND)
    values ^= values >> np.uint32(16)
    values *= np.uint32(_INVERSE_FIRST)
    values ^= values >> np.uint32(16)
    return values ^ np.uint32(derive_key("ties", seed) & 0xFFFFFFFF)


def _document_hash(numbers: NDArray[np.int64], total: int, seed: int) -> NDArray[np.uint64]:
    """The hash that orders ties: the 32-bit one wherever numbers fit, so that all paths agree on the order of ties."""
    if total <= 1 << 32:
        return _tie_hash(numbers.astype(np.uint32), seed).astype(np.uint64)
    return mix64_array(numbers.astype(np.uint64) ^ np.uint64(derive_key("ties", seed)))


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)))


def _in_threads(work: Callable[[int], None], count: int) -> None:
    """Run `work(start)` for every chunk; numpy releases the interpreter lock inside."""
    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(work, range(0, count, _CHUNK)))


def _sort_in_threads(keys: NDArray[np.uint64]) -> None:
    """Sort in place: partition at equally spaced ranks, then sort the parts side by side."""
    if len(keys) < _CHUNK or _threads() == 1:
        keys.sort()
        return
    cuts = [len(keys) * part // _threads() for part in range(_threads() + 1)]
    keys.partition(cuts[1:-1])
    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(lambda part: keys[cuts[part] : cuts[part + 1]].sort(), range(_threads())))
