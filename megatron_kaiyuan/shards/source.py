"""A source: the documents of many shards, numbered in storage order as if they were one."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.cli import tool_command
from megatron_kaiyuan.host.maps import look_up, open_maps
from megatron_kaiyuan.host.terminal import shell_command
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.build_check import mixed_keys, require_whole_folder
from megatron_kaiyuan.shards.index_check import check_indexes, require_sound_index
from megatron_kaiyuan.shards.score_files import kept_scores, load_score_sidecar
from megatron_kaiyuan.shards.shard import (
    Shard,
    open_recorded_shard,
    refuse_duplicates,
    refuse_empty_name,
    resolve_item,
)

__all__ = ["Segment", "Source", "open_source", "open_sources", "sources_at_once"]

_MAPS_OF_A_SHARD = 2  # index and scores; tokens are probed without a map
_MANY_LOOK_UPS = 2048
"""From so many on, threads are worth starting for them."""


class Segment(NamedTuple):
    """A piece of one document: tokens `start <= t < stop` of document `document` of shard `shard`."""

    shard: str
    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class Source:
    """Documents of all shards of a source, in storage order."""

    name: str
    shards: tuple[Shard, ...]
    named: tuple[str, ...] = ()
    """Prefixes, directories or globs that named the shards; error messages repeat them."""

    @cached_property
    def document_offsets(self) -> NDArray[np.int64]:
        """Documents before each shard, int64 `[shards + 1]`."""
        return np.concatenate([[0], np.cumsum([shard.documents for shard in self.shards], dtype=np.int64)])

    @cached_property
    def token_offsets(self) -> NDArray[np.int64]:
        """Tokens before each shard, int64 `[shards + 1]`."""
        return np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)])

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return int(self.document_offsets[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return int(self.token_offsets[-1])

    def lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of these documents, int64 `[n]`."""
        return self._look_up(documents, lambda number: self.shards[number].lengths, np.dtype(np.int64))

    def token_starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens stored before each of these documents.

        `num_documents` is allowed and gives `num_tokens`.
        """
        if len(documents) and documents.max() >= self.num_documents:
            result = np.full(len(documents), self.num_tokens, dtype=np.int64)
            inside = documents < self.num_documents
            result[inside] = self.token_starts(documents[inside])
            return result
        starts = self._look_up(documents, lambda number: self.shards[number].pointers, np.dtype(np.int64))
        starts //= self.shards[0].dtype.itemsize
        if len(self.shards) > 1:
            starts += self.token_offsets[self._shards_of(documents)]
        return starts

    def document_of_token(self, token: int) -> int:
        """The document that holds stored token number `token`."""
        number = int(np.searchsorted(self.token_offsets, token, side="right")) - 1
        local = self.shards[number].document_of_token(token - int(self.token_offsets[number]))
        return int(self.document_offsets[number]) + local

    def read_tokens(self, token: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with consecutive stored tokens from number `token` on, across shard boundaries.

        Raises:
            ShardError: they lie outside the shards, by an index that is damaged.
        """
        try:
            self._read_across(token, out)
        except (IndexError, ValueError) as error:
            raise self.damaged(error) from error

    def _read_across(self, token: int, out: NDArray[np.int64]) -> None:
        done = 0
        number = bisect_right(self._token_offset_list, token) - 1
        while done < len(out):
            first = token + done - self._token_offset_list[number]
            piece = self.shards[number].token_data[first : first + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            number += 1

    def damaged(self, error: object) -> ShardError:
        """Return the error of a source that is no longer as it was opened, naming the first damaged index."""
        for shard in self.shards:
            try:
                require_sound_index(shard)
            except ShardError as damage:
                return damage
        return ShardError(
            f"source {self.name!r}: cannot be read as it was opened ({error}): a file was changed or damaged; find "
            f"it with\n  {tool_command('inspect')} {shell_command(*self.named)} --verify"
        )

    def probe_tokens(self, token: int, count: int) -> NDArray[np.int64]:
        """Read `count` stored tokens from number `token` on, within one shard, int64 `[count]`.

        They are read and not mapped.
        """
        if not count:
            return np.empty(0, dtype=np.int64)
        number = bisect_right(self._token_offset_list, token) - 1
        return self.shards[number].read_tokens(token - self._token_offset_list[number], count).astype(np.int64)

    def read_pieces(self, tokens: list[int], sizes: list[int], out: NDArray[np.int64]) -> None:
        """Fill `out` with several pieces one after another: `sizes[i]` stored tokens from number `tokens[i]` on."""
        done = 0
        try:
            if len(self.shards) == 1:  # the usual case of random access, without a search and a call for each piece
                data = self.shards[0].token_data
                for token, size in zip(tokens, sizes, strict=True):
                    out[done : done + size] = data[token : token + size]
                    done += size
                return
            for token, size in zip(tokens, sizes, strict=True):
                self._read_across(token, out[done : done + size])
                done += size
        except (IndexError, ValueError) as error:
            raise self.damaged(error) from error

    def segment(self, document: int, start: int, stop: int) -> Segment:
        """The segment of a document of the source, in terms of its shard."""
        number = int(np.searchsorted(self.document_offsets, document, side="right")) - 1
        return Segment(self.shards[number].prefix, document - int(self.document_offsets[number]), start, stop)

    def number(self, segment: Segment) -> int:
        """The number, in the source, of the document of a segment."""
        return int(self.document_offsets[self._shard_number[segment.shard]]) + segment.document

    def load_scores(self, score: str) -> NDArray[np.floating]:
        """Return checked scores of all documents in storage order, `[num_documents]`.

        All of them are read.

        Raises:
            ScoreError: a sidecar is missing, has another length than its shard, or holds NaN.
        """
        if len(self.shards) == 1:
            return load_score_sidecar(self.shards[0], score)
        # each part is copied out of its map at once: a map of every shard would be too many open files
        return np.concatenate([np.array(load_score_sidecar(shard, score)) for shard in self.shards])

    def load_lengths(self) -> NDArray[np.int32]:
        """Tokens of all documents in storage order, int32 `[num_documents]`: read into memory, not mapped.

        Looking up documents in random order touches every page anyway, and mapped pages are small ones.
        """
        lengths = np.empty(self.num_documents, dtype=np.int32)
        parts = [lengths[first:stop] for first, stop in pairwise(self.document_offsets.tolist())]
        side_by_side(lambda some: some[0].read_lengths(some[1]), list(zip(self.shards, parts, strict=True)))
        return lengths

    def scores_of(self, score: str, documents: NDArray[np.int64]) -> NDArray[np.floating]:
        """Return the scores of these documents alone, float64 `[n]`.

        Only their pages are read.
        """
        return self._look_up(documents, lambda number: kept_scores(self.shards[number], score), np.dtype(np.float64))

    def score_dtype(self, score: str) -> np.dtype[Any]:
        """Return the type of number that all scores are stored in, float64 where shards differ."""
        found = {kept_scores(shard, score).dtype for shard in self.shards}
        return found.pop() if len(found) == 1 else np.dtype(np.float64)

    @cached_property
    def _token_offset_list(self) -> list[int]:
        """`token_offsets` as plain integers: bisecting a list is several times faster for one number."""
        offsets: list[int] = self.token_offsets.tolist()
        return offsets

    @cached_property
    def _shard_number(self) -> dict[str, int]:
        return {shard.prefix: number for number, shard in enumerate(self.shards)}

    def _look_up(
        self, documents: NDArray[np.int64], numbers_of: Callable[[int], NDArray[Any]], dtype: np.dtype[Any]
    ) -> NDArray[Any]:
        """A number for each document, from an array that each shard has.

        Args:
            documents: int64 `[n]`.
            numbers_of: gives the mapped array of a shard by its number, `[documents of the shard]`.
            dtype: of the result.

        Returns:
            An array of its own, `[n]`.
        """
        many = len(documents) >= _MANY_LOOK_UPS
        if len(self.shards) == 1 and not many:  # the usual case of a training sample
            return look_up(numbers_of(0), documents).astype(dtype, copy=False)
        out = np.empty(len(documents), dtype=dtype)

        def fill(piece: tuple[int, NDArray[np.int64] | slice]) -> None:
            number, where = piece
            out[where] = look_up(numbers_of(number), documents[where] - self.document_offsets[number])

        pieces = self._by_shard(documents)
        if many:
            side_by_side(fill, pieces)
        else:
            for piece in pieces:
                fill(piece)
        return out

    def _by_shard(self, documents: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64] | slice]]:
        """The number of each shard that has some of these documents, and where they stand in the argument."""
        if len(self.shards) == 1:
            parts = range(0, len(documents), _MANY_LOOK_UPS)
            return [(0, slice(first, first + _MANY_LOOK_UPS)) for first in parts]
        shards = self._shards_of(documents)
        # numpy sorts 16-bit numbers by counting them, ten times as fast
        order = (shards.astype(np.uint16) if len(self.shards) < 1 << 16 else shards).argsort(kind="stable")
        counts = np.bincount(shards, minlength=len(self.shards))
        present = counts.nonzero()[0]
        ends = counts[present].cumsum().tolist()
        return [
            (number, order[first:stop]) for number, first, stop in zip(present.tolist(), [0, *ends], ends, strict=False)
        ]

    def _shards_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the shard of each document."""
        return self.document_offsets.searchsorted(documents, side="right") - 1


def sources_at_once(sources: Iterable[Source]) -> int:
    """How many sources may be looked up side by side so that the maps of all of them stay open.

    With more, each would close the maps of the others, and mapping again costs more than waiting in turn.
    """
    shards = max((len(source.shards) for source in sources), default=0)
    return open_maps().limit // max(1, _MAPS_OF_A_SHARD * shards)


def open_source(name: str, shards: str | Sequence[str]) -> Source:
    """Open and validate all shards of a source.

    Raises:
        ShardError: no shard, a damaged shard or manifest, shards of different token dtypes, a folder half built, or a
            folder of several text keys.
    """
    return open_sources({name: shards})[name]


def open_sources(named: Mapping[str, str | Sequence[str]]) -> dict[str, Source]:
    """Open the shards of several sources side by side.

    Errors as `open_source`.
    """
    prefixes = {name: _prefixes(name, shards) for name, shards in named.items()}
    shards = side_by_side(open_recorded_shard, [prefix for some in prefixes.values() for prefix in some])
    check_indexes(shards)
    opened = iter(shards)
    return {name: _joined(name, named[name], tuple(islice(opened, len(some)))) for name, some in prefixes.items()}


def _prefixes(name: str, shards: str | Sequence[str]) -> list[str]:
    items = [shards] if isinstance(shards, str) else list(shards)
    found = []
    for item in items:
        refuse_empty_name(item)
        require_whole_folder(item)
        prefixes = resolve_item(item)
        problem = mixed_keys(item, prefixes)
        if problem:
            raise ShardError(f"source {name!r}: {problem}")
        found += prefixes
    refuse_duplicates(items, found)
    return found


def _joined(name: str, shards: str | Sequence[str], opened: tuple[Shard, ...]) -> Source:
    if len({shard.dtype for shard in opened}) > 1:
        first, other = opened[0], next(shard for shard in opened if shard.dtype != opened[0].dtype)
        raise ShardError(
            f"source {name!r}: {first.prefix} holds {first.dtype} tokens and {other.prefix} {other.dtype}; shards "
            "of one source come from one tokenizer: rebuild them with the same vocabulary"
        )
    named = (shards,) if isinstance(shards, str) else tuple(shards)
    source = Source(name, tuple(shard for shard in opened if shard.documents), named)
    if source.num_tokens == 0:
        raise ShardError(f"source {name!r}: {shards!r} holds no tokens; check the preprocessing log")
    return source
