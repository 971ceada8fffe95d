"""Draws: one random choice of documents, exact in its count, independent of every other.

The documents of a set are cut into blocks of neighbours, and a keyed permutation puts the blocks in a random order. A
draw takes documents along that order until it has enough, so a larger draw of the same key contains the smaller one,
and draws of different keys overlap as chance has it. A block is one document up to 2**17 documents in storage order
(2**18 by rank), and never more than 256: so many of each block's documents need no memory of their own. Only the blocks
taken, or those left out where they are fewer, are ever listed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.order import DocumentOrder, block_size
from megatron_kaiyuan.documents.permutation import KeyedPermutation
from megatron_kaiyuan.documents.runs import DocumentRuns

__all__ = ["LARGEST_BLOCK", "Draw", "draw_block"]

LARGEST_BLOCK = 256
"""Neighbours that a draw takes or leaves together, at most."""

_SINGLE = {True: 1 << 18, False: 1 << 17}  # documents up to which they are drawn one by one, by rank and as stored
_BLOCKS = {True: 1 << 18, False: 1 << 14}  # wanted beyond, while a block stays small enough


def draw_block(order: DocumentOrder) -> int:
    """How many neighbours of this order a draw takes or leaves together: 1, 16, 32, 64, 128 or 256."""
    if order.num_documents <= _SINGLE[order.ranked]:
        return 1
    return min(LARGEST_BLOCK, block_size(order.num_documents, _BLOCKS[order.ranked]))


@dataclass(frozen=True)
class Draw:
    """A random order of the documents of a set, of which a draw takes a prefix."""

    runs: DocumentRuns
    key: int

    def documents(self, count: int) -> DocumentRuns:
        """Exactly `count` documents, `0 <= count <= runs.num_documents`."""
        left_out = self.runs.num_documents - count
        if count <= left_out:
            return self.runs.common_with(self._from_the_front(count, by_tokens=False))
        return self.runs.minus(self._from_the_back(left_out, by_tokens=False))

    def tokens(self, count: int) -> DocumentRuns:
        """Return documents with `count` tokens together, to the nearest document.

        `0 <= count <= runs.num_tokens`.
        """
        left_out = self.runs.num_tokens - count
        if count <= left_out or self._number <= _SINGLE[False]:  # from one end alone, empty documents are no question
            return self.runs.common_with(self._from_the_front(count, by_tokens=True))
        return self.runs.minus(self._from_the_back(left_out, by_tokens=True))

    @cached_property
    def _block(self) -> int:
        return draw_block(self.runs.order)

    @cached_property
    def _first(self) -> int:
        """Number of the block of the order in which the set begins."""
        return int(self.runs.starts[0]) // self._block if len(self.runs.starts) else 0

    @cached_property
    def _number(self) -> int:
        """Blocks of the order that the set spans."""
        return -(-int(self.runs.stops[-1]) // self._block) - self._first if len(self.runs.starts) else 0

    def _sizes(self, blocks: NDArray[np.int64], *, by_tokens: bool) -> NDArray[np.int64]:
        """Documents or tokens that each block has of the set."""
        firsts = blocks * self._block
        lasts = np.minimum(firsts + self._block, self.runs.order.num_documents)
        edges = np.concatenate([firsts, lasts])
        below = self.runs.tokens_below(edges) if by_tokens else self.runs.documents_below(edges)
        return below[len(blocks) :] - below[: len(blocks)]

    def _in_random_order(self, wanted: int, total: int, *, backwards: bool) -> Iterator[NDArray[np.int64]]:
        """All blocks in random order, from either end, first as many as hold `wanted` of `total` on the average."""
        order = KeyedPermutation(self._number, self.key)
        start, step = 0, 2 + wanted * self._number // max(total, 1) + self._number // 256
        while start < self._number:
            places = np.arange(start, min(start + step, self._number))
            yield self._first + order.many(self._number - 1 - places if backwards else places)
            start, step = start + step, max(step // 8, 1024)

    def _taken(self, wanted: int, *, backwards: bool, by_tokens: bool) -> tuple[NDArray[np.int64], int, int]:
        """Whole blocks from one end of the random order, the block that is cut (-1: none), and what it gives."""
        total = self.runs.num_tokens if by_tokens else self.runs.num_documents
        blocks, sizes, got = np.empty(0, np.int64), np.empty(0, np.int64), 0
        for more in self._in_random_order(wanted, total, backwards=backwards):
            blocks, sizes = np.append(blocks, more), np.append(sizes, self._sizes(more, by_tokens=by_tokens))
            got = int(sizes.sum())
            if got >= wanted:
                break
        totals = np.cumsum(sizes)
        whole = int(np.searchsorted(totals, wanted, side="right"))
        missing = wanted - (int(totals[whole - 1]) if whole else 0)
        if not missing:
            return blocks[:whole], -1, 0
        return blocks[:whole], int(blocks[whole]), int(sizes[whole]) - missing if backwards else missing

    def _from_the_front(self, wanted: int, *, by_tokens: bool) -> DocumentRuns:
        """Positions that hold the first `wanted` documents or tokens of the random order, and none other of the set."""
        blocks, cut_block, part = self._taken(wanted, backwards=False, by_tokens=by_tokens)
        stops = [] if cut_block < 0 else [(cut_block * self._block, self._cut(cut_block, part, by_tokens=by_tokens))]
        return self._positions(blocks, stops)

    def _from_the_back(self, wanted: int, *, by_tokens: bool) -> DocumentRuns:
        """Return the same amount from the back of the order.

        A block that is cut gives its last documents.
        """
        blocks, cut_block, part = self._taken(wanted, backwards=True, by_tokens=by_tokens)
        if cut_block < 0:
            return self._positions(blocks, [])
        end = min((cut_block + 1) * self._block, self.runs.order.num_documents)
        return self._positions(blocks, [(self._cut(cut_block, part, by_tokens=by_tokens), end)])

    def _cut(self, block: int, within: int, *, by_tokens: bool) -> int:
        """The position up to which a block has been shown `within` documents or tokens."""
        first = np.array([block * self._block])
        if by_tokens:
            index = self.runs.nearest_index(int(self.runs.tokens_below(first)[0]) + within)
        else:
            index = int(self.runs.documents_below(first)[0]) + within
        if index == 0:
            return int(first[0])
        return max(int(first[0]), int(self.runs.positions_at(np.array([index - 1]))[0]) + 1)

    def _positions(self, blocks: NDArray[np.int64], parts: list[tuple[int, int]]) -> DocumentRuns:
        """Whole blocks and pieces of others, as runs of positions."""
        blocks = np.sort(blocks)
        fresh = np.append(True, blocks[1:] != blocks[:-1] + 1) if len(blocks) else np.zeros(0, dtype=bool)
        starts = blocks[fresh] * self._block
        stops = (blocks[np.append(fresh[1:], True)] + 1) * self._block if len(blocks) else starts
        for start, stop in parts:
            place = int(starts.searchsorted(start))
            starts, stops = np.insert(starts, place, start), np.insert(stops, place, stop)
        return DocumentRuns(self.runs.order, starts, np.minimum(stops, self.runs.order.num_documents))
