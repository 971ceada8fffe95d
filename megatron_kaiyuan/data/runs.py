"""Sets of documents of an order, as runs of consecutive positions.

A contiguous quality band is one run; a band without its held-out documents, or a random sample, is many. All
operations are vectorized over runs and exact to one document. Documents of a set are numbered by *index*, `0 <= index
< num_documents`, along the order; tokens likewise.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.order import DocumentOrder
from megatron_kaiyuan.data.permutation import mix64

__all__ = ["DocumentRuns", "nearest_count", "trainable_runs"]

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


def nearest_count(fraction: Fraction, total: int) -> int:
    """`fraction * total`, rounded half up to a whole number."""
    return int(fraction * total + Fraction(1, 2))


@dataclass(frozen=True)
class DocumentRuns:
    """A set of documents of one order: positions `starts[i] <= p < stops[i]`, ascending and disjoint."""

    order: DocumentOrder
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @cached_property
    def index_offsets(self) -> NDArray[np.int64]:
        """Documents of the set before each run, int64 `[runs + 1]`."""
        return np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    @cached_property
    def order_tokens(self) -> NDArray[np.int64]:
        """Tokens of the whole order before each run's start, int64 `[runs]`."""
        return self.order.token_offsets(self.starts)

    @cached_property
    def token_offsets(self) -> NDArray[np.int64]:
        """Tokens of the set before each run, int64 `[runs + 1]`."""
        ends = self.order.token_offsets(self.stops)
        return np.concatenate([[0], np.cumsum(ends - self.order_tokens)])

    @property
    def num_documents(self) -> int:
        """Documents of the set."""
        return int(self.index_offsets[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of the set."""
        return int(self.token_offsets[-1])

    def between(self, first: int, last: int) -> "DocumentRuns":
        """The documents with index `first <= index < last`."""
        return self._at_indices(np.array([first], dtype=np.int64), np.array([last], dtype=np.int64))

    def tokens_before(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the set before each document index, `0 <= index <= num_documents`; int64 `[n]`."""
        if not len(self.starts):
            return np.zeros(len(indices), dtype=np.int64)
        run = np.minimum(np.searchsorted(self.index_offsets, indices, side="right") - 1, len(self.starts) - 1)
        positions = self.starts[run] + indices - self.index_offsets[run]
        return self.token_offsets[run] + self.order.token_offsets(positions) - self.order_tokens[run]

    def tokens_below(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the set at positions of the order below each of `positions`; int64 `[n]`."""
        run = np.maximum(np.searchsorted(self.starts, positions, side="right") - 1, 0)
        if not len(self.starts):
            return np.zeros(len(positions), dtype=np.int64)
        inside = np.clip(positions, self.starts[run], self.stops[run])
        return self.token_offsets[run] + self.order.token_offsets(inside) - self.order_tokens[run]

    def nearest_index(self, tokens: Fraction) -> int:
        """The document boundary whose token count is nearest to `tokens`; the earlier of two equally near ones."""
        target = int(tokens)
        if target >= self.num_tokens:
            return self.num_documents
        run = int(np.searchsorted(self.token_offsets, target, side="right")) - 1
        position = self.order.locate(int(self.order_tokens[run]) + target - int(self.token_offsets[run]))
        index = int(self.index_offsets[run]) + position - int(self.starts[run])
        below, above = self.tokens_before(np.array([index, index + 1])).tolist()
        return index if tokens - below <= above - tokens else index + 1

    def sample(self, fraction: Fraction, by: str, key: int) -> "DocumentRuns":
        """A random part: an exact number of documents (or of tokens, to the nearest document), even over all ranks.

        Blocks of `order.block` neighbours are taken in the order of `block * golden_ratio + random offset` modulo 1, a
        sequence in which every prefix is spread evenly (gaps take at most three lengths, Steinhaus), hence any range
        of ranks gets its share. A larger fraction with the same key contains the smaller one.
        """
        blocks = self._blocks(key)
        if by == "documents":
            wanted = nearest_count(fraction, self.num_documents)
            sizes = blocks.sizes
        else:
            wanted = nearest_count(fraction, self.num_tokens)
            bounds = self.tokens_before(np.append(blocks.firsts, blocks.lasts))
            sizes = bounds[len(blocks.firsts) :] - bounds[: len(blocks.firsts)]
        totals = np.cumsum(sizes[blocks.priority])
        whole = int(np.searchsorted(totals, wanted, side="right"))
        chosen = blocks.priority[:whole]
        firsts, lasts = blocks.firsts[chosen], blocks.lasts[chosen]
        missing = wanted - (int(totals[whole - 1]) if whole else 0)
        if missing and whole < len(totals):
            last_block = blocks.priority[whole]
            first = int(blocks.firsts[last_block])
            stop = self._partial_stop(first, missing, by)
            firsts, lasts = np.append(firsts, first), np.append(lasts, stop)
        ascending = np.argsort(firsts)
        return self._at_indices(firsts[ascending], lasts[ascending])

    def without(self, positions: NDArray[np.int64]) -> "DocumentRuns":
        """The set less the documents at these positions (sorted; those outside the set are ignored)."""
        run = np.searchsorted(self.starts, positions, side="right") - 1
        inside = (
            positions[(run >= 0) & (positions < self.stops[np.maximum(run, 0)])] if len(self.starts) else positions[:0]
        )
        starts = np.sort(np.concatenate([self.starts, inside + 1]))
        stops = np.sort(np.concatenate([self.stops, inside]))
        some = starts < stops
        return DocumentRuns(self.order, starts[some], stops[some])

    def pieces(self, token: int, count: int) -> list[tuple[int, int]]:
        """`count` tokens of the set from number `token` on, as (token of the order, how many)."""
        found = []
        run = int(self.token_offsets.searchsorted(token, side="right")) - 1
        while count:
            within = token - int(self.token_offsets[run])
            size = min(count, int(self.token_offsets[run + 1]) - token)
            if size:
                found.append((int(self.order_tokens[run]) + within, size))
            token, count, run = token + size, count - size, run + 1
        return found

    def _partial_stop(self, first: int, missing: int, by: str) -> int:
        if by == "documents":
            return first + missing
        before = int(self.tokens_before(np.array([first]))[0])
        return self.nearest_index(Fraction(before + missing))

    def _blocks(self, key: int) -> "_Blocks":
        firsts = np.arange(0, self.num_documents, self.order.block, dtype=np.int64)
        lasts = np.minimum(firsts + self.order.block, self.num_documents)
        places = np.arange(len(firsts), dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix64(key))
        return _Blocks(firsts, lasts, np.argsort(places, kind="stable"))

    def _at_indices(self, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> "DocumentRuns":
        """The documents of ascending disjoint index intervals, neighbouring runs joined."""
        some = firsts < lasts
        firsts, lasts = firsts[some], lasts[some]
        cuts = np.sort(np.concatenate([firsts, lasts, self.index_offsets]))  # np.unique hashes first: twice the time
        cuts = cuts[np.append(True, cuts[1:] != cuts[:-1])]
        lower, upper = cuts[:-1], cuts[1:]
        interval = np.searchsorted(firsts, lower, side="right") - 1
        taken = (
            (interval >= 0) & (lower < lasts[np.maximum(interval, 0)]) if len(firsts) else np.zeros(len(lower), bool)
        )
        lower, upper = lower[taken], upper[taken]
        run = np.searchsorted(self.index_offsets, lower, side="right") - 1
        starts = self.starts[run] + lower - self.index_offsets[run]
        stops = starts + upper - lower
        fresh = np.append(True, starts[1:] != stops[:-1]) if len(starts) else np.zeros(0, dtype=bool)
        joined_stops = stops[np.append(fresh[1:], True)] if len(starts) else stops
        return DocumentRuns(self.order, starts[fresh], joined_stops)


@dataclass(frozen=True)
class _Blocks:
    firsts: NDArray[np.int64]
    lasts: NDArray[np.int64]
    priority: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        return self.lasts - self.firsts


def trainable_runs(order: DocumentOrder, held_out: NDArray[np.int64]) -> DocumentRuns:
    """All documents of an order but the held-out ones (document numbers, int64 `[n]`)."""
    everything = DocumentRuns(order, np.zeros(1, dtype=np.int64), np.array([order.num_documents], dtype=np.int64))
    return everything.without(np.sort(order.positions_of(held_out))) if len(held_out) else everything
