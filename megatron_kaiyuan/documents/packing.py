"""Documents packed whole into windows, as far as they fit: an order of windows instead of documents.

The documents of a set are taken in groups of neighbours, and each group is packed for itself: what is longer than a
window is cut into full ones, and the rest and all shorter documents go, the longest first, into the window where they
leave least free, or into a new one (best fit; Ding et al., "Fewer Truncations Improve Language Modeling", 2024). So a
window is located by the number of windows before its group, 8 bytes for each group, and by packing that group again.

A window has room for `seq_length + 1` tokens, inputs and the last target, and shares none with the next one; what is
left over is padding. Cut documents overlap by one token, so that each token but the first is predicted.
"""

from bisect import bisect_left, insort
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.order import GatheredOrder, Pieces, gather
from megatron_kaiyuan.documents.runs import DocumentRuns
from megatron_kaiyuan.documents.shuffled import ShuffledOrder, digest_of
from megatron_kaiyuan.documents.stored_sums import open_sums, sums_path, write_sums
from megatron_kaiyuan.errors import RankIndexError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.terminal import counted

__all__ = ["PackedOrder", "Piece", "pack_group"]

_GROUP = 512
"""Documents that are packed together."""
_FEWEST = 16
"""Where the order ascends, a group is a 32nd of the documents, but so many at least."""
_PARTS = 32
_SMALL_SET = 1 << 17
"""Documents that are packed at each start, in some tenths of a second; of more, the sums are stored."""
_KEPT_GROUPS = 64
_PROBED = 64
"""Groups of a simulated source that are packed."""


type Piece = tuple[int, int, int]
"""Number of a document in its group, and its tokens `start <= t < stop`. A plain tuple: there are millions of them."""


def pack_group(lengths: list[int], seq_length: int) -> list[list[Piece]]:
    """The windows of a group of documents, by their middles.

    Each holds its pieces in the order of the documents.
    """
    room = seq_length + 1
    windows: list[list[Piece]] = []
    pieces: list[tuple[int, Piece]] = []  # the longest first, equal ones in order
    for document, length in enumerate(lengths):
        start = 0
        while length - start > room:
            windows.append([(document, start, start + room)])
            start += seq_length
        if length:
            pieces.append((start - length, (document, start, length)))
    pieces.sort()
    free: list[tuple[int, int]] = []  # tokens that are free in a window, and its number; ascending
    for negative, piece in pieces:
        place = bisect_left(free, (-negative, -1))
        if place == len(free):
            left, number = room, len(windows)
            windows.append([piece])
        else:
            left, number = free.pop(place)
            windows[number].append(piece)
        left += negative
        if left:
            insort(free, (left, number))
    for window in windows:
        window.sort()
    windows.sort(key=lambda window: (_middle(window), window[0]))
    return windows


def _middle(window: list[Piece]) -> float:
    """Mean number of the document that its tokens are of."""
    if len(window) == 1:
        return float(window[0][0])
    total = weighted = 0
    for document, start, stop in window:
        total += stop - start
        weighted += document * (stop - start)
    return weighted / total


class PackedOrder(GatheredOrder):
    """Windows of whole documents.

    A window stands where other orders have a document of `seq_length` tokens.

    Args:
        runs: the documents.
        seq_length: predicted tokens of a window.
        ascending: whether the windows ascend with the order, so that groups must be small parts of it.
        shuffled: a random order of the same documents, in which they are packed; None: as they are.
        must_be_stored: whether the sums of a large set must be stored; False: they are made where they are not.
    """

    def __init__(
        self,
        runs: DocumentRuns,
        seq_length: int,
        shuffled: ShuffledOrder | None,
        *,
        ascending: bool,
        must_be_stored: bool,
    ) -> None:
        super().__init__(runs.order.source)
        self.runs, self.seq_length = runs, seq_length
        self.ranked, self.block = runs.order.ranked, 1
        self._shuffled, self._must_be_stored = shuffled, must_be_stored
        self.group = min(_GROUP, max(_FEWEST, runs.num_documents // _PARTS)) if ascending else _GROUP
        self._kept: dict[int, list[list[Piece]]] = {}

    @property
    def num_documents(self) -> int:
        """Windows."""
        return int(self.sums[-1])

    @property
    def is_shuffled(self) -> bool:
        """Whether documents were put in random order before they were packed."""
        return self._shuffled is not None

    @property
    def shuffled_bands(self) -> int:
        """Bands that were shuffled one by one before they were packed.

        0 where none was.
        """
        return 0 if self._shuffled is None else self._shuffled.num_bands

    @property
    def padding(self) -> float:
        """Share of a pass's targets that are padding."""
        targets = self.num_documents * self.seq_length
        return 1 - self._facts["predicted"] / targets if targets else 0.0

    def token_offsets(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Every window counts as `seq_length` tokens."""
        return positions * self.seq_length

    def locate(self, token: int) -> int:
        """The window that this token counts to."""
        return token // self.seq_length

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows are their own numbers."""
        return positions

    def lengths_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Every window counts as `seq_length` tokens."""
        return np.full(len(positions), self.seq_length, dtype=np.int64)

    def positions_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows are their own numbers."""
        return documents

    def read(self, token: int, out: NDArray[np.int64]) -> None:
        """Fill `out`, one token longer than a window counts, with the window's tokens and zeros."""
        pieces = self.pieces(token, self.seq_length)
        count = int(pieces.sizes.sum())
        gather(self.source, pieces, out[:count])
        out[count:] = 0

    def find_pieces(self, token: int, count: int) -> Pieces:
        """Return the pieces of documents of the window that this token counts to."""
        assert token % self.seq_length == 0 and count == self.seq_length, "windows are read whole"  # noqa: PT018
        window = token // self.seq_length
        number = int(self.sums.searchsorted(window, side="right")) - 1
        found = self._windows_of(number)[window - int(self.sums[number])]
        places = np.array([piece[0] for piece in found], dtype=np.int64)
        positions = self._positions(number)[places]
        starts, stops = (np.array([piece[end] for piece in found], dtype=np.int64) for end in (1, 2))
        return Pieces(self.runs.order.documents_at(positions), positions, starts, stops)

    def middle_position(self, window: int) -> int:
        """Position of the document in the middle of the group that a window is of."""
        number = int(self.sums.searchsorted(window, side="right")) - 1
        middle = min(number * self.group + self.group // 2, self.runs.num_documents - 1)
        return int(self.runs.positions_at(np.array([middle]))[0])

    @property
    def is_small(self) -> bool:
        """Whether it is packed at each start, or only counted on."""
        return self.runs.num_documents <= _SMALL_SET or not self.source.shards

    @property
    def sums(self) -> NDArray[np.int64]:
        """Windows before each group and, last, in all.

        They are int64 `[groups + 1]`.

        Raises:
            RankIndexError: the set is large and its sums are stored nowhere, or are damaged.
        """
        return self._known[1]

    @cached_property
    def path(self) -> Path:
        """Where the sums are stored: beside the first shard."""
        return sums_path(self.source, self._digest, "packing")

    def open_stored(self) -> None:
        """Open the stored sums.

        Errors as of `sums`.
        """
        self._stored()

    def write(self) -> None:
        """Store the sums."""
        facts, sums = self._packed()
        write_sums(self.path, self._digest, facts, sums)

    @property
    def _facts(self) -> dict[str, int]:
        return self._known[0]

    @cached_property
    def _known(self) -> tuple[dict[str, int], NDArray[np.int64]]:
        if not self.source.shards:
            return self._estimated()
        if self.is_small:
            return self._packed()
        try:
            return self._stored()
        except RankIndexError:
            if self._must_be_stored:
                raise
            return self._packed()

    @cached_property
    def _digest(self) -> str:
        random = None if self._shuffled is None else self._shuffled.identity
        return digest_of(self.runs, self.seq_length, self.group, random)

    def _stored(self) -> tuple[dict[str, int], NDArray[np.int64]]:
        what = f"source {self.source.name!r}: packing: whole of {counted(self.runs.num_documents, 'document')}"
        facts, sums = open_sums(self.path, self._digest, ("predicted",), what)
        if len(sums) != self._num_groups + 1:
            raise RankIndexError(f"{self.path}: damaged; delete it and run {tool('rank')} --plan PLAN")
        return facts, sums

    def _packed(self) -> tuple[dict[str, int], NDArray[np.int64]]:
        sums, predicted = np.zeros(self._num_groups + 1, dtype=np.int64), 0
        for number in range(self._num_groups):
            windows = self._pack(number)
            sums[number + 1] = len(windows)
            predicted += _predicted(windows)
        return {"predicted": predicted}, np.cumsum(sums)

    def _estimated(self) -> tuple[dict[str, int], NDArray[np.int64]]:
        """By some groups: documents that do not exist need not all be packed."""
        groups = self._num_groups
        if not groups:
            return {"predicted": 0}, np.zeros(1, dtype=np.int64)
        some = np.unique(np.linspace(0, groups - 1, _PROBED).astype(np.int64)).tolist()
        packed = [self._pack(number) for number in some]
        counts = np.interp(np.arange(groups), some, [len(windows) for windows in packed])
        sums = np.concatenate([[0], np.cumsum(counts)]).round().astype(np.int64)
        share = sum(map(_predicted, packed)) / max(1, self.seq_length * sum(map(len, packed)))
        return {"predicted": int(share * self.seq_length * int(sums[-1]))}, sums

    @property
    def _num_groups(self) -> int:
        return -(-self.runs.num_documents // self.group)

    def _positions(self, number: int) -> NDArray[np.int64]:
        """Positions of the documents of a group in the order that the set is of."""
        first, stop = number * self.group, min((number + 1) * self.group, self.runs.num_documents)
        if self._shuffled is not None:
            return self._shuffled.positions_in(first, stop)
        return self.runs.positions_at(np.arange(first, stop))

    def _pack(self, number: int) -> list[list[Piece]]:
        return pack_group(self.runs.order.lengths_at(self._positions(number)).tolist(), self.seq_length)

    def _windows_of(self, number: int) -> list[list[Piece]]:
        found = self._kept.get(number)
        if found is None:
            found = self._pack(number)
            if len(found) != int(self.sums[number + 1] - self.sums[number]):
                raise RankIndexError(
                    f"source {self.source.name!r}: its documents pack otherwise than when they were counted; its files "
                    f"were changed or damaged: check them with {tool('inspect')} --verify, delete *.packing beside "
                    f"them and run {tool('rank')} --plan PLAN"
                )
            if len(self._kept) >= _KEPT_GROUPS:
                self._kept.clear()
            self._kept[number] = found
        return found


def _predicted(windows: list[list[Piece]]) -> int:
    return sum(stop - start for window in windows for _, start, stop in window) - len(windows)
