"""Documents of a set in a random order of their own, one order a pass, with the tokens before each of them.

Which document stands where is a keyed permutation and needs no array. How many tokens stand before it depends on all
lengths before it, so these are summed up once: every `stride`-th sum is kept, half a byte a document and pass at the
usual stride of 16. Sets of up to 2**20 documents are summed up in memory, a pass when it is first read. For larger ones
`tools/rank_data.py --plan` stores the sums beside the shards, and they are memory-mapped.

In a curriculum the set is cut into bands of neighbours, and each band is shuffled for itself.
"""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.order import DocumentOrder, GatheredOrder, Pieces, RankedOrder, cut_pieces
from megatron_kaiyuan.documents.permutation import KeyedPermutation, derive_key
from megatron_kaiyuan.documents.rank_index import content_digest
from megatron_kaiyuan.documents.ranking import STRIDE
from megatron_kaiyuan.documents.runs import DocumentRuns
from megatron_kaiyuan.documents.stored_sums import open_sums, sums_path, write_sums
from megatron_kaiyuan.errors import RankIndexError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.terminal import counted

__all__ = ["ShuffledOrder", "as_shuffled", "digest_of", "stride_of"]

_SMALL_SET = 1 << 20
_AT_ONCE = 1 << 20


def stride_of(passes: int) -> int:
    """Documents between two kept sums, so that all passes together keep at most 8 bytes a document."""
    return STRIDE << max(0, (-(-passes // STRIDE) - 1).bit_length())


class ShuffledOrder(GatheredOrder):
    """One random order of the documents of a set.

    Positions are those of the order that the set is of.

    Args:
        runs: the set.
        edges: indices at which its bands begin and, last, end, int64 `[bands + 1]`; each band is shuffled for itself.
        key: decides the order.
        stride: documents between two kept sums.
    """

    ranked = False
    block = 1

    def __init__(self, runs: DocumentRuns, edges: NDArray[np.int64], key: int, stride: int = STRIDE) -> None:
        super().__init__(runs.order.source)
        self._runs, self._edges, self._key, self._stride = runs, edges, key, stride

    @property
    def num_documents(self) -> int:
        """Documents of the set."""
        return self._runs.num_documents

    @property
    def num_bands(self) -> int:
        """Bands that are shuffled one by one."""
        return len(self._edges) - 1

    def token_offsets(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens before either end of the whole order, which is all that a pass asks for."""
        assert np.isin(positions, (0, self.num_documents)).all(), "a pass is read by its tokens"
        return np.where(positions == 0, 0, self._runs.num_tokens)

    def locate(self, token: int) -> int:
        """Position, in the order of the set, of the document that holds this token."""
        return int(self.pieces(token, 1).positions[0])

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the documents at these positions of the order that the set is of."""
        return self._runs.order.documents_at(positions)

    def lengths_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the documents at these positions of the order that the set is of."""
        return self._runs.order.lengths_at(positions)

    def positions_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Their positions in the order that the set is of."""
        return self._runs.order.positions_of(documents)

    def find_pieces(self, token: int, count: int) -> Pieces:
        """Return pieces of documents, in the random order."""
        first = int(self.marks.searchsorted(token, side="right")) - 1
        stop = int(self.marks.searchsorted(token + count, side="left"))
        positions = self.positions_in(first * self._stride, min(stop * self._stride, self.num_documents))
        documents = self._runs.order.documents_at(positions)
        lengths = self.source.lengths(documents)
        ends = int(self.marks[first]) + lengths.cumsum()
        if ends[-1] != self.marks[stop]:
            raise self._damaged()
        return cut_pieces(documents, positions, ends - lengths, ends, token, count)

    @property
    def is_small(self) -> bool:
        """Whether its sums are made in memory."""
        return self.num_documents <= _SMALL_SET

    @cached_property
    def marks(self) -> NDArray[np.int64]:
        """Tokens before every `stride`-th document of the order and, last, in all.

        They are int64 `[ceil(n / stride) + 1]`.

        Raises:
            RankIndexError: the set is large and its sums are stored nowhere, or are damaged.
        """
        return self._sums() if self.is_small else self._stored()

    @cached_property
    def path(self) -> Path:
        """Where the sums are stored: beside the first shard."""
        return sums_path(self.source, self._digest, "shuffle")

    def open_stored(self) -> None:
        """Open the stored sums.

        Errors as of `marks`.
        """
        self.marks  # noqa: B018

    def write(self) -> None:
        """Store the sums."""
        write_sums(self.path, self._digest, {"stride": self._stride}, self._sums())

    @cached_property
    def _digest(self) -> str:
        return digest_of(self._runs, *self.identity)

    @property
    def identity(self) -> tuple[object, ...]:
        """What the order of the set depends on."""
        return self._edges.tolist(), self._key

    def positions_in(self, first: int, stop: int) -> NDArray[np.int64]:
        """Positions, in the order of the set, of places `first <= place < stop` of the random order."""
        indices = np.arange(first, stop)
        bands = np.searchsorted(self._edges, indices, side="right") - 1
        for band in range(int(bands[0]), int(bands[-1]) + 1) if len(bands) else ():
            inside = np.flatnonzero(bands == band)
            if len(inside):
                start = int(self._edges[band])
                indices[inside] = start + self._permutation(band).many(indices[inside] - start)
        return self._runs.positions_at(indices)

    def _permutation(self, band: int) -> KeyedPermutation:
        found = self._permutations.get(band)
        if found is None:
            size = int(self._edges[band + 1] - self._edges[band])
            found = self._permutations[band] = KeyedPermutation(size, derive_key(self._key, band))
        return found

    @cached_property
    def _permutations(self) -> dict[int, KeyedPermutation]:
        return {}

    def _sums(self) -> NDArray[np.int64]:
        count, stride = self.num_documents, self._stride
        sums = np.zeros(-(-count // stride) + 1, dtype=np.int64)
        for first in range(0, count, _AT_ONCE):
            stop = min(first + _AT_ONCE, count)
            lengths = self._runs.order.lengths_at(self.positions_in(first, stop))
            starts = np.arange(0, stop - first, stride)
            sums[first // stride + 1 : first // stride + 1 + len(starts)] = np.add.reduceat(lengths, starts)
        np.cumsum(sums, out=sums)
        if sums[-1] != self._runs.num_tokens:
            raise self._damaged()
        return sums

    def _stored(self) -> NDArray[np.int64]:
        what = f"source {self.source.name!r}: shuffle: documents of {counted(self.num_documents, 'document')}"
        facts, sums = open_sums(self.path, self._digest, ("stride",), what)
        self._stride = facts["stride"]
        if self._stride < 1 or len(sums) != -(-self.num_documents // self._stride) + 1:
            raise self._damaged()
        found: NDArray[np.int64] = sums
        return found

    def _damaged(self) -> RankIndexError:
        where = "" if self.is_small else f"{self.path}: "
        return RankIndexError(
            f"{where}source {self.source.name!r}: lengths of documents do not add up to what was summed up of them; "
            f"its files were changed or damaged: check them with {tool('inspect')} --verify"
            + ("" if self.is_small else f", delete this file and run {tool('rank')} --plan PLAN")
        )


def as_shuffled(runs: DocumentRuns, edges: NDArray[np.int64], key: int, stride: int) -> DocumentRuns:
    """The set as one run of a random order."""
    order: DocumentOrder = ShuffledOrder(runs, edges, key, stride)
    return DocumentRuns(order, np.zeros(1, dtype=np.int64), np.array([runs.num_documents], dtype=np.int64))


def digest_of(runs: DocumentRuns, *more: object) -> str:
    """Identifies the documents of a set and their order, by the shards and the ranking, and what else is given."""
    order = runs.order
    ranking = f"{order.index.digest} {order.index.seed}" if isinstance(order, RankedOrder) else "as stored"
    digest = hashlib.sha256(f"{content_digest(order.source)} {ranking} {more}".encode())
    for numbers in (runs.starts, runs.stops):
        digest.update(np.ascontiguousarray(numbers, dtype=np.int64).tobytes())
    return digest.hexdigest()
