"""A source's stream in a phase: the passes over its selected documents, packed into windows of `seq_length` tokens.

Copies of a document come pass by pass, or band by band: the selection is cut into bands of neighbours, and each band
is shown as often as asked for before the next one begins. In rank order that is one ascent instead of several.

With `shuffle: documents` each pass has its documents in a random order of its own before they are packed; where the
stream ascends, band by band.

With `packing: whole` the documents of the stream are windows already, each of whole documents and, by count, of
`seq_length` tokens; passes, bands and partial passes are of windows.

Otherwise packing is Megatron's: the stream's tokens are cut every `seq_length` tokens, a window has one token more (the
last target, which is the next window's first input), and documents flow across windows. An ascending stream starts
`leftover` tokens late, so that its last window ends with its best document; any other stream ends early. Either way
fewer than `seq_length` tokens of a stream are never predicted, and `leftover` says how many.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.unseen import NOTHING, Seen, thinned
from megatron_kaiyuan.documents.order import Pieces
from megatron_kaiyuan.documents.packing import PackedOrder
from megatron_kaiyuan.documents.permutation import KeyedPermutation, derive_key
from megatron_kaiyuan.documents.runs import DocumentRuns
from megatron_kaiyuan.documents.shuffled import ShuffledOrder, as_shuffled, stride_of
from megatron_kaiyuan.shards.source import Segment

__all__ = ["Shuffling", "Stream"]

_KEPT_PASSES = 32
"""Passes whose permutation is kept; a small one is a table."""


@dataclass(frozen=True)
class _Bands:
    """Tokens before each band and, last, in all: int64 `[bands + 1]` each."""

    selected: NDArray[np.int64]
    """Of one whole pass."""
    extra: NDArray[np.int64]
    """Of the partial pass."""
    starts: NDArray[np.int64]
    """Of the stream."""


@dataclass(frozen=True, slots=True)
class Shuffling:
    """Documents in random order before they are packed."""

    key: int
    num_bands: int = 1
    """Bands of the selection, equal in documents, that are shuffled one by one; more than one where it ascends."""


@dataclass(frozen=True)
class Stream:
    """Passes over a set of documents, as windows."""

    selected: DocumentRuns
    """Documents of one whole pass."""
    whole_passes: int
    extra: DocumentRuns | None
    """Documents of the last, partial pass (None = none)."""
    repeat: Fraction
    """Passes asked for. A budget decides how many there are: `whole_passes` plus what `extra` stands for."""
    seq_length: int
    ascending: bool
    """Whether windows come in the order of the documents (a curriculum) or in random order, pass by pass."""
    key: int
    num_bands: int = 1
    """Bands of an ascending selection, equal in documents, that are repeated one after another; 1: pass by pass."""
    seen: Seen = NOTHING
    """What earlier phases have shown of it; this one goes on with the rest."""
    shuffling: Shuffling | None = None
    """Of documents; None: they are packed in the order of the selection."""
    packed: PackedOrder | None = None
    """What `selected` are windows of, where documents are packed whole."""

    @property
    def documents_selected(self) -> DocumentRuns:
        """The documents of one whole pass, however they are packed."""
        return self.selected if self.packed is None else self.packed.runs

    @property
    def tokens_shared(self) -> int:
        """Tokens that a window shares with the next one: the last target, unless windows are packed whole."""
        return 1 if self.packed is None else 0

    def tokens_of(self, windows: int) -> int:
        """Tokens that so many windows need."""
        return windows * self.seq_length + self.tokens_shared

    def windows_in(self, tokens: int) -> int:
        """Windows that so many tokens fill."""
        return max(0, (tokens - self.tokens_shared) // self.seq_length)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all passes."""
        return self.whole_passes * self.selected.num_tokens + (self.extra.num_tokens if self.extra else 0)

    @cached_property
    def num_windows(self) -> int:
        """Windows of all passes."""
        return self.windows_in(self.num_tokens)

    @property
    def available(self) -> int:
        """Windows that no earlier phase has shown."""
        return self.num_windows - self.seen.windows

    @property
    def leftover(self) -> int:
        """Tokens of the stream that no window predicts, not counting the very first."""
        return self.num_tokens - self.tokens_of(self.num_windows) if self.num_windows else self.num_tokens

    @cached_property
    def first_token(self) -> int:
        """Where the first window starts: an ascending stream drops from its worst end."""
        return self.leftover if self.ascending and self.num_windows else 0

    @cached_property
    def num_passes(self) -> int:
        """Whole and partial passes."""
        return self.whole_passes + (1 if self.extra is not None else 0)

    @cached_property
    def pass_windows(self) -> NDArray[np.int64]:
        """Return the first window of each pass and, last, the number of windows, int64 `[passes + 1]`."""
        starts = np.arange(self.num_passes + 1, dtype=np.int64) * self.selected.num_tokens - self.first_token
        starts[-1] = self.num_windows * self.seq_length
        return np.clip(-(-starts // self.seq_length), 0, self.num_windows)

    @cached_property
    def _inner_windows(self) -> NDArray[np.int64]:
        """Return how many windows of each pass end within the pass, int64 `[passes]`.

        Only these are permuted. The one window that runs into the next pass stays last in its pass, so that a further
        pass leaves the order of the passes before it as it was.
        """
        ends = np.arange(1, self.num_passes + 1, dtype=np.int64) * self.selected.num_tokens
        ends[-1] = self.num_tokens
        complete = (ends - self.tokens_shared - self.first_token) // self.seq_length
        return np.maximum(np.minimum(complete, self.num_windows) - self.pass_windows[:-1], 0)

    def windows(self, samples: NDArray[np.int64], used: int) -> NDArray[np.int64]:
        """The windows that the stream's samples show, int64 `[n]`.

        Args:
            samples: sample numbers of this stream in its phase, `0 <= j < used`.
            used: how many of its windows the phase uses. An ascending stream is thinned evenly, its last window always
                stays; a shuffled one is cut short, which leaves out a random part.
        """
        if self.ascending:
            return self.seen.lifted(thinned(samples, used, self.available))
        samples = samples + self.seen.samples
        if self.seen.levels:
            return self.seen.lifted(self._rest_permutation.many(samples))
        result = samples.copy()  # sample j of a shuffled stream lies in the pass of window j
        passes = self.pass_of_window(samples)
        within = samples - self.pass_windows[passes]
        permuted = within < self._inner_windows[passes]
        for number in sorted(set(passes.tolist())):
            where = permuted & (passes == number)
            result[where] = int(self.pass_windows[number]) + self._permutation(number).many(within[where])
        return result

    def window(self, sample: int, used: int) -> int:
        """`windows` for one sample, in plain integers: faster for random access."""
        if self.ascending:
            return self.seen.lifted_one((sample + 1) * self.available // used - 1)
        sample += self.seen.samples
        if self.seen.levels:
            return self.seen.lifted_one(self._rest_permutation(sample))
        firsts, inner = self._pass_lists
        number = bisect_right(firsts, sample) - 1
        first = firsts[number]
        if sample - first >= inner[number]:
            return sample
        return first + self._permutation(number)(sample - first)

    def pass_of_window(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pass (over its band, where there are several) in which each window starts, int64 `[n]`."""
        if self.num_bands == 1:
            return np.searchsorted(self.pass_windows, windows, side="right").astype(np.int64) - 1
        tokens = self.first_token + windows * self.seq_length
        bands = np.searchsorted(self._bands.starts, tokens, side="right") - 1
        sizes = np.maximum(np.diff(self._bands.selected)[bands], 1)
        numbers: NDArray[np.int64] = np.minimum((tokens - self._bands.starts[bands]) // sizes, self.whole_passes)
        return numbers

    def read(self, window: int) -> NDArray[np.int64]:
        """Return the tokens of a window, int64 `[seq_length + 1]`: inputs and, shifted by one, targets."""
        out = np.empty(self.seq_length + 1, dtype=np.int64)
        if self.packed is not None:
            self.packed.read(self._packed_token(window), out)
            return out
        done = 0
        for documents, token, count in self._pass_pieces(window):
            for order_token, size in documents.pieces(token, count):
                documents.order.read(order_token, out[done : done + size])
                done += size
        return out

    def padding(self, window: int) -> int:
        """Tokens at the end of a window that are none of its documents'."""
        if self.packed is None:
            return 0
        return self.seq_length + 1 - sum(int(pieces.sizes.sum()) for pieces in self.pieces(window))

    def _packed_token(self, window: int) -> int:
        """Where the order of packed windows has a window of the stream."""
        ((documents, token, count),) = self._pass_pieces(window)
        ((order_token, _),) = documents.pieces(token, count)
        return order_token

    def pieces(self, window: int) -> list[Pieces]:
        """The pieces of documents that a window is made of, run by run."""
        return [
            documents.order.pieces(order_token, size)
            for documents, token, count in self._pass_pieces(window)
            for order_token, size in documents.pieces(token, count)
        ]

    def segments(self, window: int) -> list[Segment]:
        """The pieces of documents that a window is made of, in terms of shards."""
        return [
            segment
            for documents, token, count in self._pass_pieces(window)
            for order_token, size in documents.pieces(token, count)
            for segment in documents.order.segments(order_token, size)
        ]

    def documents(self, window: int) -> NDArray[np.int64]:
        """Return the documents of a window as ascending numbers in the source, int64 `[n]`."""
        return np.unique(np.concatenate([pieces.documents for pieces in self.pieces(window)]))

    def positions(self, window: int) -> tuple[int, int]:
        """Lowest and highest position, in the documents' order, of the documents of a window."""
        if self.shuffling is not None or self.packed is not None:
            all_of_it = np.concatenate([pieces.positions for pieces in self.pieces(window)])
            return int(all_of_it.min()), int(all_of_it.max())
        found = [
            documents.order.locate(place)
            for documents, token, count in self._pass_pieces(window)
            for order_token, size in documents.pieces(token, count)
            for place in (order_token, order_token + size - 1)
        ]
        return min(found), max(found)

    def middle_position(self, window: int) -> int:
        """Position, in the documents' order, of the document in the middle of a window.

        Where documents are shuffled or packed whole it is the middle of the band or of the group that this one is of.
        """
        before = self.seq_length // 2
        if self.packed is not None:
            return self.packed.middle_position(self._packed_token(window) // self.seq_length)
        if self.shuffling is not None:
            return self._middle_of_band(window)
        for documents, token, count in self._pass_pieces(window):
            for order_token, size in documents.pieces(token, count):
                if before < size:
                    return documents.order.locate(order_token + before)
                before -= size
        raise AssertionError(f"window {window} has no middle")

    def _middle_of_band(self, window: int) -> int:
        """Position of the document in the middle of the band that is shuffled and holds the middle of a window."""
        documents, first, count = self._passes_of(window)[0]
        runs = self.extra if documents == self.whole_passes else self.selected
        assert runs is not None
        edges = self._shuffle_edges(documents)
        place = first + min(self.seq_length // 2, count - 1)
        band = int(runs.tokens_before(edges[1:-1]).searchsorted(place, side="right"))
        middle = np.minimum((edges[band : band + 1] + edges[band + 1 : band + 2]) // 2, runs.num_documents - 1)
        return int(runs.positions_at(middle)[0])

    def _pass_pieces(self, window: int) -> list[tuple[DocumentRuns, int, int]]:
        """A window's tokens pass by pass: documents of the pass, first token within the pass, count."""
        passes = self._passes_of(window)
        if self.shuffling is None and len(passes) == 1 and passes[0][0] < self.whole_passes:  # the usual case
            return [(self.selected, *passes[0][1:])]
        return [(self.documents_of_pass(number), token, count) for number, token, count in passes]

    def _passes_of(self, window: int) -> list[tuple[int, int, int]]:
        """A window's tokens pass by pass: number of the pass, first token within the pass, count."""
        token = self.first_token + window * self.seq_length
        missing = self.seq_length + self.tokens_shared
        starts, selected, extra = self._band_lists
        pieces = []
        while missing:
            band = bisect_right(starts, token) - 1
            first, size = selected[band], selected[band + 1] - selected[band]
            number, within = divmod(token - starts[band], size)
            if number >= self.whole_passes:
                number, within = self.whole_passes, token - starts[band] - self.whole_passes * size
                first, size = extra[band], extra[band + 1] - extra[band]
            count = min(missing, size - within)
            assert count > 0, "window outside its stream"
            pieces.append((number, first + within, count))
            token, missing = token + count, missing - count
        return pieces

    def documents_of_pass(self, number: int) -> DocumentRuns:
        """Return the documents of a pass in the order in which they are packed.

        The partial pass is the last one.
        """
        runs = self.extra if number == self.whole_passes else self.selected
        assert runs is not None, "window outside its stream"
        if self.shuffling is None:
            return runs
        found = self._shuffled.get(number)
        if found is None:
            if len(self._shuffled) >= _KEPT_PASSES:
                self._shuffled.clear()
            key = derive_key(self.shuffling.key, "documents", number)
            found = as_shuffled(runs, self._shuffle_edges(number), key, stride_of(self.num_passes))
            self._shuffled[number] = found
        return found

    def shuffled_orders(self) -> Iterator[ShuffledOrder]:
        """The random orders of its passes, where it has any."""
        for number in range(self.num_passes if self.shuffling is not None else 0):
            order = self.documents_of_pass(number).order
            assert isinstance(order, ShuffledOrder)
            yield order

    def _shuffle_edges(self, number: int) -> NDArray[np.int64]:
        """Indices, among the documents of a pass, at which its shuffled bands begin and, last, end."""
        assert self.shuffling is not None
        bands, documents = self.shuffling.num_bands, self.selected.num_documents
        edges = np.arange(bands + 1, dtype=np.int64) * documents // bands
        if number < self.whole_passes or self.extra is None:
            return edges
        inner = self.extra.documents_below(self.selected.positions_at(edges[1:-1]))
        return np.concatenate([[0], inner, [self.extra.num_documents]]).astype(np.int64)

    @cached_property
    def _shuffled(self) -> dict[int, DocumentRuns]:
        return {}

    @cached_property
    def _bands(self) -> "_Bands":
        documents = self.selected.num_documents
        edges = np.arange(self.num_bands + 1, dtype=np.int64) * documents // self.num_bands
        selected = self.selected.tokens_before(edges)
        extra = np.zeros_like(selected)
        if self.extra is not None:
            extra[1:-1] = self.extra.tokens_below(self.selected.positions_at(edges[1:-1]))
            extra[-1] = self.extra.num_tokens
        return _Bands(selected, extra, self.whole_passes * selected + extra)

    @cached_property
    def _band_lists(self) -> tuple[list[int], list[int], list[int]]:
        """`_bands` as plain integers: several times faster for one window."""
        bands = self._bands
        return bands.starts[:-1].tolist(), bands.selected.tolist(), bands.extra.tolist()

    def _permutation(self, number: int) -> KeyedPermutation:
        cache = self._permutations
        found = cache.get(number)
        if found is None:
            if len(cache) >= _KEPT_PASSES:
                cache.clear()
            found = KeyedPermutation(int(self._inner_windows[number]), derive_key(self.key, number))
            cache[number] = found
        return found

    @cached_property
    def _rest_permutation(self) -> KeyedPermutation:
        """Of what ascending phases left, in one pass."""
        return KeyedPermutation(self.available + self.seen.samples, derive_key(self.key, "rest"))

    @cached_property
    def _pass_lists(self) -> tuple[list[int], list[int]]:
        """`pass_windows` and `_inner_windows` as plain integers: several times faster for one sample."""
        return self.pass_windows.tolist(), self._inner_windows.tolist()

    @cached_property
    def _permutations(self) -> dict[int, KeyedPermutation]:
        return {}
