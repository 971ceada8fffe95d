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

from megatron_kaiyuan.documents.order import DocumentOrder

__all__ = ["DocumentRuns", "nearest_count", "trainable_runs"]


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
        return self.at_indices(np.array([first], dtype=np.int64), np.array([last], dtype=np.int64))

    def tokens_before(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of the set before each document index, int64 `[n]`.

        `0 <= index <= num_documents`.
        """
        if not len(self.starts):
            return np.zeros(len(indices), dtype=np.int64)
        run = np.minimum(np.searchsorted(self.index_offsets, indices, side="right") - 1, len(self.starts) - 1)
        positions = self.starts[run] + indices - self.index_offsets[run]
        return self.token_offsets[run] + self.order.token_offsets(positions) - self.order_tokens[run]

    def tokens_below(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of the set at positions of the order below each of `positions`, int64 `[n]`."""
        run = np.maximum(np.searchsorted(self.starts, positions, side="right") - 1, 0)
        if not len(self.starts):
            return np.zeros(len(positions), dtype=np.int64)
        inside = np.clip(positions, self.starts[run], self.stops[run])
        return self.token_offsets[run] + self.order.token_offsets(inside) - self.order_tokens[run]

    def documents_below(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the documents of the set at positions of the order below each of `positions`, int64 `[n]`."""
        if not len(self.starts):
            return np.zeros(len(positions), dtype=np.int64)
        if len(self.starts) == 1:
            one: NDArray[np.int64] = np.clip(positions, self.starts[0], self.stops[0]) - self.starts[0]
            return one
        run = np.maximum(np.searchsorted(self.starts, positions, side="right") - 1, 0)
        inside = np.clip(positions, self.starts[run], self.stops[run])
        below: NDArray[np.int64] = self.index_offsets[run] + inside - self.starts[run]
        return below

    def nearest_index(self, tokens: Fraction | int) -> int:
        """Return the document boundary whose token count is nearest to `tokens`.

        Of two equally near ones it is the earlier.
        """
        target = int(tokens)
        if target >= self.num_tokens:
            return self.num_documents
        run = int(np.searchsorted(self.token_offsets, target, side="right")) - 1
        position = self.order.locate(int(self.order_tokens[run]) + target - int(self.token_offsets[run]))
        index = int(self.index_offsets[run]) + position - int(self.starts[run])
        below, above = self.tokens_before(np.array([index, index + 1])).tolist()
        return index if tokens - below <= above - tokens else index + 1

    def positions_at(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions in the order of these documents of the set, int64 `[n]`.

        `0 <= index < num_documents`.
        """
        run = np.searchsorted(self.index_offsets, indices, side="right") - 1
        positions: NDArray[np.int64] = self.starts[run] + indices - self.index_offsets[run]
        return positions

    def without(self, positions: NDArray[np.int64]) -> "DocumentRuns":
        """Return the set without the documents at these positions.

        Positions are sorted. Those outside the set are ignored.
        """
        return self.minus(DocumentRuns(self.order, positions, positions + 1))

    def minus(self, other: "DocumentRuns") -> "DocumentRuns":
        """The documents that are in this set and not in another one of the same order."""
        cuts, here, there = self._pieces_with(other)
        return DocumentRuns(self.order, *_joined(cuts, here & ~there))

    def joined_with(self, other: "DocumentRuns") -> "DocumentRuns":
        """The documents that are in this set, in another one of the same order, or in both."""
        cuts, here, there = self._pieces_with(other)
        return DocumentRuns(self.order, *_joined(cuts, here | there))

    def common_with(self, other: "DocumentRuns") -> "DocumentRuns":
        """The documents that are in this set and in another one of the same order."""
        if len(self.starts) == 1:  # the usual case: all documents, or a band of them
            first, stop = self.starts[0], self.stops[0]
            some = slice(int(other.stops.searchsorted(first, side="right")), int(other.starts.searchsorted(stop)))
            starts, stops = np.maximum(other.starts[some], first), np.minimum(other.stops[some], stop)
            filled = starts < stops
            return DocumentRuns(self.order, starts[filled], stops[filled])
        cuts, here, there = self._pieces_with(other)
        return DocumentRuns(self.order, *_joined(cuts, here & there))

    def _pieces_with(self, other: "DocumentRuns") -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Positions at which either set begins or ends, and whether each holds what lies between two of them."""
        cuts = np.sort(np.concatenate([self.starts, self.stops, other.starts, other.stops]))
        cuts = cuts[np.append(True, cuts[1:] != cuts[:-1])] if len(cuts) else cuts
        return cuts, self._holds(cuts[:-1]), other._holds(cuts[:-1])

    def _holds(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        if not len(self.starts):
            return np.zeros(len(positions), dtype=bool)
        run = np.searchsorted(self.starts, positions, side="right") - 1
        held: NDArray[np.bool_] = (run >= 0) & (positions < self.stops[np.maximum(run, 0)])
        return held

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

    def at_indices(self, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> "DocumentRuns":
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


def _joined(cuts: NDArray[np.int64], taken: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and stops of the runs made of the pieces between neighbouring cuts that are taken."""
    edges = np.diff(np.concatenate([[False], taken, [False]]).astype(np.int8))
    return cuts[np.flatnonzero(edges == 1)], cuts[np.flatnonzero(edges == -1)]


def trainable_runs(order: DocumentOrder, held_out: NDArray[np.int64]) -> DocumentRuns:
    """All documents of an order but the held-out ones (document numbers, int64 `[n]`)."""
    everything = DocumentRuns(order, np.zeros(1, dtype=np.int64), np.array([order.num_documents], dtype=np.int64))
    return everything.without(np.sort(order.positions_of(held_out))) if len(held_out) else everything
