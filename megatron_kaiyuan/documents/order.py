"""Two orders of a source's documents, storage order and rank order, behind one interface.

An order numbers documents by position `0 <= p < num_documents` and their tokens consecutively. Streams, selections and
provenance speak of positions and tokens of an order and never ask which one it is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.rank_index import RankIndex, damaged_index
from megatron_kaiyuan.documents.ranking import STRIDE, ranks_of
from megatron_kaiyuan.host.maps import look_up
from megatron_kaiyuan.shards.source import Segment, Source

__all__ = [
    "DocumentOrder",
    "GatheredOrder",
    "Pieces",
    "RankedOrder",
    "StorageOrder",
    "block_size",
    "cut_pieces",
    "gather",
]

_NEXT = 48


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces of documents, one after another: tokens `starts <= t < stops` of each.

    int64 `[n]` each, none empty.
    """

    documents: NDArray[np.int64]
    """Numbers in the source."""
    positions: NDArray[np.int64]
    """Positions in the order."""
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return self.stops - self.starts


class DocumentOrder(Protocol):
    """Documents of one source in some order, along which positions and token numbers count."""

    source: Source
    ranked: bool
    """Whether positions are ranks of quality."""
    block: int
    """Documents that a random sample takes or leaves together (1 = documents are drawn one by one)."""

    @property
    def num_documents(self) -> int:
        """Documents of the order."""

    def token_offsets(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens before each position, int64 `[n]`.

        `0 <= position <= num_documents`.
        """

    def locate(self, token: int) -> int:
        """Position of the document that holds this token."""

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the documents at these positions as numbers in the source, int64 `[n]`."""

    def lengths_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the token counts of the documents at these positions, int64 `[n]`."""

    def positions_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of these documents, int64 `[n]`."""

    def read(self, token: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with consecutive tokens of the order."""

    def pieces(self, token: int, count: int) -> Pieces:
        """The pieces of documents that `count` consecutive tokens from `token` on are made of."""

    def segments(self, token: int, count: int) -> list[Segment]:
        """The same in terms of shards."""


def block_size(documents: int, most_blocks: int) -> int:
    """Return a power of two that gives at most `most_blocks` blocks.

    Never 2 to 8, at which no index stores tokens.
    """
    if documents <= most_blocks:
        return 1
    return max(STRIDE, 1 << (-(-documents // most_blocks) - 1).bit_length())


class StorageOrder:
    """Documents as they are stored: the shards' own index gives every answer."""

    ranked = False

    def __init__(self, source: Source) -> None:
        self.source = source
        # few blocks: drawing one touches a page of the .idx, and storage order carries no quality to spread evenly
        self.block = block_size(source.num_documents, 1 << 14)

    @property
    def num_documents(self) -> int:
        """Documents of the source."""
        return self.source.num_documents

    def token_offsets(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens stored before each position."""
        return self.source.token_starts(positions)

    def locate(self, token: int) -> int:
        """The document that holds this stored token."""
        return self.source.document_of_token(token)

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Documents are their own positions."""
        return positions

    def lengths_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these documents."""
        return self.source.lengths(positions)

    def positions_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Documents are their own positions."""
        return documents

    def read(self, token: int, out: NDArray[np.int64]) -> None:
        """Consecutive tokens are consecutive on disk."""
        self.source.read_tokens(token, out)

    def pieces(self, token: int, count: int) -> Pieces:
        """Pieces of documents, in storage order."""
        first = self.locate(token)
        bounds = self.source.token_starts(np.arange(first, min(first + _NEXT, self.num_documents) + 1))
        if bounds[-1] < token + count:  # more documents than a window usually has: look for the last one
            bounds = self.source.token_starts(np.arange(first, self.locate(token + count - 1) + 2))
        documents = np.arange(first, first + len(bounds) - 1)
        return cut_pieces(documents, documents, bounds[:-1], bounds[1:], token, count)

    def segments(self, token: int, count: int) -> list[Segment]:
        """The same in terms of shards."""
        return _segments(self.source, self.pieces(token, count))


@dataclass(frozen=True)
class _Window:
    """Consecutive ranked documents: their numbers, and where their tokens begin and end in the ranked order."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    first_position: int


class GatheredOrder(ABC):
    """An order whose neighbours lie apart in storage, so that its tokens are gathered from pieces of documents."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._last: tuple[int, int, Pieces] | None = None

    @abstractmethod
    def find_pieces(self, token: int, count: int) -> Pieces:
        """Return what `pieces` does."""

    def pieces(self, token: int, count: int) -> Pieces:
        """Pieces of documents, in this order."""
        last = self._last  # one attribute, read once and set once: threads may share the order
        if last is not None and last[0] == token and last[1] == count:  # first the tokens are read, then the bands
            return last[2]
        found = self.find_pieces(token, count)
        self._last = token, count, found
        return found

    def read(self, token: int, out: NDArray[np.int64]) -> None:
        """Gather the documents one after another."""
        gather(self.source, self.pieces(token, len(out)), out)

    def segments(self, token: int, count: int) -> list[Segment]:
        """The same in terms of shards."""
        return _segments(self.source, self.pieces(token, count))


class RankedOrder(GatheredOrder):
    """Documents in ascending score, through a rank index."""

    ranked = True

    def __init__(self, source: Source, index: RankIndex, score: str) -> None:
        super().__init__(source)
        self.index = index
        self.score = score
        self.block = block_size(source.num_documents, 1 << 18)

    @property
    def num_documents(self) -> int:
        """Documents of the source."""
        return len(self.index.order)

    def token_offsets(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of all documents that rank below each position."""
        marks = positions // STRIDE
        result = look_up(self.index.token_marks, marks)
        inside = positions - marks * STRIDE
        if not inside.any():
            return result
        members = marks[:, None] * STRIDE + np.arange(STRIDE - 1)
        used = np.arange(STRIDE - 1) < inside[:, None]
        documents = look_up(self.index.order, members[used]).astype(np.int64)
        lengths = np.zeros(used.shape, dtype=np.int64)
        try:
            lengths[used] = self.source.lengths(documents)
        except IndexError as error:  # a document that the source does not have
            raise damaged_index(self.index, self.source, self.score) from error
        return result + lengths.sum(axis=1)

    def locate(self, token: int) -> int:
        """Rank of the document that holds this token of the ranked order."""
        window = self._window(token, 1)
        return window.first_position + int(np.searchsorted(window.ends, token, side="right"))

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents of these ranks."""
        return look_up(self.index.order, positions).astype(np.int64)

    def lengths_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the documents of these ranks."""
        try:
            return self.source.lengths(self.documents_at(positions))
        except IndexError as error:  # a document that the source does not have
            raise damaged_index(self.index, self.source, self.score) from error

    def positions_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ranks of these documents."""
        try:
            return ranks_of(
                documents, self.index.order, lambda some: self.source.scores_of(self.score, some), self.index.seed
            )
        except IndexError as error:
            raise damaged_index(self.index, self.source, self.score) from error

    def scored_below(self, limit: float, *, or_equal: bool) -> int:
        """How many documents score below a limit (or just that), as scores of their stored type compare with it."""
        limit = float(np.asarray(limit, dtype=self.source.score_dtype(self.score)))
        low, high = 0, self.num_documents
        while low < high:
            middle = (low + high) // 2
            document = look_up(self.index.order, np.array([middle])).astype(np.int64)
            score = float(self.source.scores_of(self.score, document)[0])
            low, high = (middle + 1, high) if score < limit or (or_equal and score == limit) else (low, middle)
        return low

    def find_pieces(self, token: int, count: int) -> Pieces:
        """Return pieces of documents in rank order, best last."""
        window = self._window(token, count)
        positions = np.arange(window.first_position, window.first_position + len(window.ends))
        return cut_pieces(window.documents, positions, window.starts, window.ends, token, count)

    def _window(self, token: int, count: int) -> _Window:
        """All ranked documents between the stored marks around these tokens."""
        marks = self.index.token_marks
        first = int(marks.searchsorted(token, side="right")) - 1
        last = int(marks.searchsorted(token + count, side="left"))
        documents = self.index.order[first * STRIDE : last * STRIDE].astype(np.int64)
        try:
            lengths = self.source.lengths(documents)
            ends = marks[first] + lengths.cumsum()
            if ends[-1] == marks[last]:
                return _Window(documents, ends - lengths, ends, first * STRIDE)
        except IndexError:  # a document or a mark that does not exist
            pass
        where = f" (rank {first * STRIDE:,} to {min(last * STRIDE, self.num_documents) - 1:,})"
        raise damaged_index(self.index, self.source, self.score, where)


def gather(source: Source, pieces: Pieces, out: NDArray[np.int64]) -> None:
    """Fill `out` with the tokens of pieces, which are as many."""
    bases = source.token_starts(pieces.documents) + pieces.starts
    source.read_pieces(bases.tolist(), pieces.sizes.tolist(), out)


def cut_pieces(
    documents: NDArray[np.int64],
    positions: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    token: int,
    count: int,
) -> Pieces:
    """What `count` tokens from `token` on have of documents that begin and end at these tokens."""
    # Starts and ends ascend, so that what is used is a slice, but for empty documents in it.
    used: slice | NDArray[np.bool_] = slice(
        int(ends.searchsorted(token, side="right")), int(starts.searchsorted(token + count, side="left"))
    )
    if not (ends[used] > starts[used]).all():
        used = (ends > token) & (starts < token + count) & (ends > starts)
    starts, ends = starts[used], ends[used]
    return Pieces(
        documents[used], positions[used], np.maximum(token - starts, 0), np.minimum(token + count, ends) - starts
    )


def _segments(source: Source, pieces: Pieces) -> list[Segment]:
    """The pieces in terms of shards."""
    columns = (pieces.documents.tolist(), pieces.starts.tolist(), pieces.stops.tolist())
    return [source.segment(*piece) for piece in zip(*columns, strict=True)]
