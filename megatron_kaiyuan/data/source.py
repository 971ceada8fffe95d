"""A source: the documents of many shards, numbered in storage order as if they were one."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.build_check import require_whole_folder
from megatron_kaiyuan.data.maps import advise_random, open_maps
from megatron_kaiyuan.data.shards import Shard, open_shard, resolve_prefixes
from megatron_kaiyuan.errors import ScoreError, ShardError

__all__ = ["Segment", "Source", "open_source"]

_OPENING_THREADS = 16


@dataclass(frozen=True, slots=True)
class Segment:
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
        result = np.empty(len(documents), dtype=np.int64)
        for shard, where, local in self._by_shard(documents):
            result[where] = shard.lengths[local]
        return result

    def token_starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens stored before each of these documents; `num_documents` is allowed and gives `num_tokens`."""
        if len(self.shards) == 1 and len(documents) and int(documents.max()) < self.num_documents:
            return self.shards[0].token_start(documents)
        result = np.full(len(documents), self.num_tokens, dtype=np.int64)
        inside = np.flatnonzero(documents < self.num_documents)
        for shard, where, local in self._by_shard(documents[inside]):
            base = self.token_offsets[self._shard_number[shard.prefix]]
            result[inside[where]] = base + shard.token_start(local)
        return result

    def document_of_token(self, token: int) -> int:
        """The document that holds stored token number `token`."""
        number = int(np.searchsorted(self.token_offsets, token, side="right")) - 1
        local = self.shards[number].document_of_token(token - int(self.token_offsets[number]))
        return int(self.document_offsets[number]) + local

    def read_tokens(self, token: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with consecutive stored tokens from number `token` on, across shard boundaries."""
        done = 0
        number = bisect_right(self._token_offset_list, token) - 1
        while done < len(out):
            first = token + done - self._token_offset_list[number]
            piece = self.shards[number].token_data[first : first + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            number += 1

    def read_pieces(self, tokens: list[int], sizes: list[int], out: NDArray[np.int64]) -> None:
        """Fill `out` with several pieces one after another: `sizes[i]` stored tokens from number `tokens[i]` on."""
        done = 0
        if len(self.shards) == 1:  # the usual case of random access, without a search and a call for each piece
            data = self.shards[0].token_data
            for token, size in zip(tokens, sizes, strict=True):
                out[done : done + size] = data[token : token + size]
                done += size
            return
        for token, size in zip(tokens, sizes, strict=True):
            self.read_tokens(token, out[done : done + size])
            done += size

    def segment(self, document: int, start: int, stop: int) -> Segment:
        """The segment of a document of the source, in terms of its shard."""
        number = int(np.searchsorted(self.document_offsets, document, side="right")) - 1
        return Segment(self.shards[number].prefix, document - int(self.document_offsets[number]), start, stop)

    def number(self, segment: Segment) -> int:
        """The number, in the source, of the document of a segment."""
        return int(self.document_offsets[self._shard_number[segment.shard]]) + segment.document

    def load_scores(self, score: str) -> NDArray[np.floating]:
        """Checked scores of all documents in storage order, `[num_documents]`; reads all of them.

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
        offsets = self.document_offsets.tolist()
        if len(self.shards) == 1:
            self.shards[0].read_lengths(lengths)
            return lengths
        parts = [lengths[first:stop] for first, stop in pairwise(offsets)]
        with ThreadPoolExecutor(_OPENING_THREADS) as pool:
            list(pool.map(lambda shard, part: shard.read_lengths(part), self.shards, parts))
        return lengths

    def scores_of(self, score: str, documents: NDArray[np.int64]) -> NDArray[np.floating]:
        """Scores of these documents alone, float64 `[n]`; reads only their pages."""
        result = np.empty(len(documents), dtype=np.float64)
        for shard, where, local in self._by_shard(documents):
            result[where] = _kept_scores(shard, score)[local]
        return result

    @cached_property
    def _token_offset_list(self) -> list[int]:
        """`token_offsets` as plain integers: bisecting a list is several times faster for one number."""
        offsets: list[int] = self.token_offsets.tolist()
        return offsets

    @cached_property
    def _shard_number(self) -> dict[str, int]:
        return {shard.prefix: number for number, shard in enumerate(self.shards)}

    def _by_shard(
        self, documents: NDArray[np.int64]
    ) -> Iterator[tuple[Shard, NDArray[np.int64] | slice, NDArray[np.int64]]]:
        """Group documents by shard: the shard, where they stand in the argument, their numbers in the shard."""
        if len(self.shards) == 1:
            yield self.shards[0], slice(None), documents
            return
        if not len(documents):  # np.split would still give one, empty, group
            return
        numbers = np.searchsorted(self.document_offsets, documents, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        present, firsts = np.unique(numbers[order], return_index=True)
        for number, where in zip(present, np.split(order, firsts[1:]), strict=True):
            yield self.shards[number], where, documents[where] - self.document_offsets[number]


def open_source(name: str, shards: str | Sequence[str]) -> Source:
    """Open and validate all shards of a source.

    Raises:
        ShardError: no shard, an invalid shard, shards of different token dtypes, or a folder half built.
    """
    for item in [shards] if isinstance(shards, str) else shards:
        require_whole_folder(Path(item))
    prefixes = resolve_prefixes(shards)
    if len(prefixes) == 1:  # a thread would cost as much as the opening: a plan may have a thousand such sources
        opened: tuple[Shard, ...] = (open_shard(prefixes[0]),)
    else:
        with ThreadPoolExecutor(_OPENING_THREADS) as pool:  # a network file system answers each question slowly
            opened = tuple(pool.map(open_shard, prefixes))
    if len({shard.dtype for shard in opened}) > 1:
        first, other = opened[0], next(shard for shard in opened if shard.dtype != opened[0].dtype)
        raise ShardError(
            f"source {name!r}: {first.prefix} holds {first.dtype} tokens and {other.prefix} {other.dtype}; shards "
            "of one "
            "source come from one tokenizer: rebuild them with the same vocabulary"
        )
    named = (shards,) if isinstance(shards, str) else tuple(shards)
    source = Source(name, tuple(shard for shard in opened if shard.documents), named)
    if source.num_tokens == 0:
        raise ShardError(f"source {name!r}: {shards!r} holds no tokens; check the preprocessing log")
    return source


def score_path(prefix: str, score: str) -> Path:
    """Where the scores called `score` of a shard are stored."""
    return Path(f"{prefix}.scores.{score}.npy")


def load_score_sidecar(shard: Shard, score: str) -> NDArray[np.floating]:
    """Memory-map and check the scores of one shard."""
    return check_scores(_map_scores(shard, score), shard.documents, os.fspath(score_path(shard.prefix, score)))


def _kept_scores(shard: Shard, score: str) -> NDArray[np.floating]:
    """The scores of one shard, mapped once for many look-ups: a training sample asks for them two dozen times."""
    attribute = f"_scores.{score}"
    kept: NDArray[np.floating] | None = shard.__dict__.get(attribute)
    return kept if kept is not None else open_maps().keep(shard, attribute, _map_scores(shard, score, random=True))


def _map_scores(shard: Shard, score: str, *, random: bool = False) -> NDArray[np.floating]:
    """Memory-map the scores of one shard, for a few of them or for all; checks their number but reads none of them."""
    path = score_path(shard.prefix, score)
    if not path.is_file():
        present = sorted(other.name for other in path.parent.glob(f"{Path(shard.prefix).name}.scores.*.npy"))
        raise ScoreError(
            f"{path}: no such score sidecar (there: {', '.join(present) or 'none'}); build the shard with "
            f"--score-key {score}, or give the scores with tools/rank_data.py --scores"
        )
    mapped = open_npy(path, os.fspath(path))
    if random:
        advise_random(mapped)
    scores = mapped.view(np.ndarray)
    check_score_shape(scores, shard.documents, os.fspath(path))
    return scores


def load_npy(path: str | os.PathLike[str], origin: str) -> NDArray[Any]:
    """Memory-map a `.npy` file; a file that is none, or a truncated one, raises ScoreError."""
    return open_npy(path, origin).view(np.ndarray)


def open_npy(path: str | os.PathLike[str], origin: str) -> "np.memmap[Any, Any]":
    """`load_npy` that keeps numpy's class, which knows at what byte the numbers begin."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # the header is parsed as Python text, so damage shows as any of the parser's errors
        raise ScoreError(f"{origin}: not a whole .npy file of numbers ({error}); write the scores again") from error


def check_score_shape(scores: NDArray[np.floating], documents: int, origin: str) -> None:
    """Raise ScoreError unless there is one number for each document."""
    if scores.ndim != 1 or len(scores) != documents:
        raise ScoreError(
            f"{origin}: shape {scores.shape}, but the shard has {documents} documents; scores need one number per "
            "document in storage order: write them again"
        )
    if scores.dtype.kind not in "fiu":
        raise ScoreError(f"{origin}: dtype {scores.dtype} is not a number; scores are floats, higher is better")


def check_scores(scores: NDArray[np.floating], documents: int, origin: str) -> NDArray[np.floating]:
    """Scores as they are, if there is one number for each document and none is NaN."""
    check_score_shape(scores, documents, origin)
    if scores.dtype.kind == "f" and len(scores) and np.isnan(scores.min()):  # the minimum with a NaN is NaN
        missing = np.flatnonzero(np.isnan(scores))
        raise ScoreError(
            f"{origin}: {len(missing)} scores are NaN, the first for document {missing[0]}; a document without a "
            "score has "
            "no rank: score it, or leave it out when building the shard (--on-error skip)"
        )
    return scores
