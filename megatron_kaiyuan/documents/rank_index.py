"""The rank index of a source: built once by `tools/rank_data.py`, memory-mapped ever after.

One file beside the shards: an 8-byte magic, the header's length (u64), a JSON header padded to 4096 bytes, the
documents in ascending score (uint32, or uint64 past 2**32 documents), and the tokens before every 16th of them
(int64): 4.5 bytes a document and nothing per sample. It is written under a temporary name and renamed, so that it is
whole or absent; several builders at once write the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.ranking import STRIDE, Ranking, Take, prepare_ranking, stride_sums
from megatron_kaiyuan.errors import RankIndexError
from megatron_kaiyuan.host.atomic import atomic_file
from megatron_kaiyuan.host.cli import tool, tool_command
from megatron_kaiyuan.host.files import is_read_only, open_regular
from megatron_kaiyuan.host.maps import map_array
from megatron_kaiyuan.host.terminal import agreed, counted, shell_command
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.shard import Shard
from megatron_kaiyuan.shards.shard_files import Meter, SilentMeter
from megatron_kaiyuan.shards.source import Source

__all__ = [
    "RankIndex",
    "build_rank_index",
    "content_digest",
    "content_digests",
    "damaged_index",
    "index_path",
    "load_or_rank",
    "open_rank_index",
    "save_rank_index",
    "verify_rank_index",
    "write_rank_index",
]

_MAGIC = b"KYRANK01"
_HEADER_BYTES = 4096
_SMALL_SOURCE = 1 << 20
_PROBE_BYTES = 1024


@dataclass(frozen=True)
class RankIndex:
    """Documents of a source in ascending score."""

    order: NDArray[np.unsignedinteger]
    """Document numbers, uint32 or uint64 `[N]`."""
    token_marks: NDArray[np.int64]
    """Tokens before every 16th rank and, last, in all: int64 `[ceil(N / 16) + 1]`."""
    seed: int
    """Of the hash that orders equal scores."""
    digest: str
    """Of the shards and scores that were ranked."""
    path: Path | None = None
    """The file that the arrays are maps of; None where they are in memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        # a spawned worker maps the file itself rather than receive a copy of it
        if self.path is not None:
            return _map_again, (self.path, self.seed, self.digest)
        return RankIndex, (self.order, self.token_marks, self.seed, self.digest)


def index_path(source: Source, score: str) -> Path:
    """Where the rank index of these shards by this score lies: beside the first shard."""
    first = Path(source.shards[0].prefix)
    if len(source.shards) == 1:
        return first.with_name(f"{first.name}.{score}.rank")
    names = "\n".join(os.path.relpath(shard.prefix, first.parent) for shard in source.shards)
    return first.parent / f"shards-{hashlib.sha256(names.encode()).hexdigest()[:12]}.{score}.rank"


def build_rank_index(source: Source, score: str, seed: int = 0, digest: str | None = None) -> RankIndex:
    """Rank all documents of a source in memory.

    `digest` as for `open_rank_index`.

    Raises:
        ScoreError: a score sidecar is missing, of the wrong length, or holds NaN.
        ShardError: the lengths in the `.idx` files do not add up to the tokens in the `.bin` files.
    """
    ranking = prepare_ranking(source.load_scores(score), seed)
    order = np.empty(ranking.count, dtype=ranking.dtype)

    def keep(first: int, documents: NDArray[np.unsignedinteger]) -> None:
        order[first : first + len(documents)] = documents

    marks = _hand_out(ranking, source, keep, SilentMeter())
    return RankIndex(order, marks, seed, digest or content_digest(source, score))


def write_rank_index(source: Source, score: str, path: Path, seed: int = 0, meter: Meter | None = None) -> None:
    """Rank all documents of a source and store the index.

    It takes at most 12 bytes of memory a document, and more where `ranking.py` says that a slower sort is needed.
    The file is that of `save_rank_index(build_rank_index(...))`, but documents go to it while others are being sorted.

    Raises:
        ScoreError, ShardError: as `build_rank_index`.
        RankIndexError: the folder cannot be written; says how to store the index elsewhere.
        OSError: the folder is missing, or the disk is full; nothing is left behind then.
    """
    try:
        _write_rank_index(source, score, path, seed, meter or SilentMeter())
    except OSError as error:
        if not is_read_only(error):
            raise
        small = ""
        if source.num_documents <= _SMALL_SOURCE:
            small = f" (with up to {_SMALL_SOURCE:,} documents, as here, a plan ranks them itself and needs no index)"
        raise RankIndexError(
            f"{path}: cannot be written ({error.strerror}){small}; give another file and name it in the plan, as "
            f"rank_index: FILE of the source:\n  {_command(source, score, None)} --output FILE"
        ) from error


def _write_rank_index(source: Source, score: str, path: Path, seed: int, meter: Meter) -> None:
    digest = content_digest(source, score)
    ranking = prepare_ranking(source.load_scores(score), seed)
    first_order = _HEADER_BYTES + 8 * (-(-ranking.count // STRIDE) + 1)
    with atomic_file(path) as stream:
        descriptor, width = stream.fileno(), np.dtype(ranking.dtype).itemsize

        def store(first: int, documents: NDArray[np.unsignedinteger]) -> None:
            _write_at(descriptor, documents, first_order + width * first)

        marks = _hand_out(ranking, source, store, meter)
        stream.write(_header(ranking.count, int(marks[-1]), ranking.dtype, seed, digest))
        stream.write(marks.data)


def _hand_out(ranking: Ranking, source: Source, take: Take, meter: Meter) -> NDArray[np.int64]:
    """Give every ranked document to `take`, and return the token marks."""
    marks = np.zeros(-(-ranking.count // STRIDE) + 1, dtype=np.int64)
    with ThreadPoolExecutor(1) as reader:  # while the first documents are being sorted
        lengths = reader.submit(source.load_lengths)

        def take_and_count(first: int, documents: NDArray[np.unsignedinteger]) -> None:
            take(first, documents)
            sums = stride_sums(lengths.result(), documents)
            marks[first // STRIDE + 1 : first // STRIDE + 1 + len(sums)] = sums

        meter.start(f"ranking {counted(ranking.count, 'document')}", 2 * ranking.count)
        ranking.hand_out(take_and_count, meter.advance)
    np.cumsum(marks, out=marks)
    if marks[-1] != source.num_tokens:
        raise source.damaged(
            f"lengths add up to {counted(marks[-1], 'token')}, the .bin files hold {source.num_tokens:,}"
        )
    return marks


def _write_at(descriptor: int, array: NDArray[Any], offset: int) -> None:
    """Write a whole array at a place of a file.

    Threads may do so side by side.
    """
    left = memoryview(np.ascontiguousarray(array)).cast("B")
    while len(left):
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def content_digest(source: Source, score: str | None = None) -> str:
    """Identifies shards (and their scores) by sizes and three probes of each file, at a cost independent of their size.

    A changed byte outside the probes is not seen here: `--verify` compares everything.
    """
    return content_digests([(source, score)])[0]


def content_digests(sources: Sequence[tuple[Source, str | None]]) -> list[str]:
    """`content_digest` of several sources, the files of all of them side by side."""
    files = [(shard, score) for source, score in sources for shard in source.shards]
    probes = iter(side_by_side(_probe_shard, files))
    return [hashlib.sha256(b"".join(islice(probes, len(source.shards)))).hexdigest() for source, _ in sources]


def _probe_shard(file: tuple[Shard, str | None]) -> bytes:
    shard, score = file
    counts = f"{shard.documents} {shard.tokens} {shard.dtype}\n".encode()
    scores = b"" if score is None else _probe(f"{shard.prefix}.scores.{score}.npy")
    return counts + _probe(f"{shard.prefix}.idx") + scores


def _probe(path: str) -> bytes:
    """Return size, beginning, middle and end of a file.

    A missing file counts as an empty one.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            places = (0, (size - _PROBE_BYTES) // 2, size - _PROBE_BYTES)
            pieces = [os.pread(stream.fileno(), _PROBE_BYTES, max(place, 0)) for place in places]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return b"missing"
    return b"".join([size.to_bytes(8, "little"), *pieces])


def save_rank_index(index: RankIndex, path: Path) -> None:
    """Write the index atomically: under its final name it is complete, or it is not there."""
    count, tokens = len(index.order), int(index.token_marks[-1])
    with atomic_file(path) as stream:
        stream.write(_header(count, tokens, index.order.dtype.type, index.seed, index.digest))
        stream.write(np.ascontiguousarray(index.token_marks).data)
        stream.write(np.ascontiguousarray(index.order).data)


def _header(documents: int, tokens: int, dtype: type[np.unsignedinteger], seed: int, digest: str) -> bytes:
    header = {
        "format": "megatron_kaiyuan.rank_index/1",
        "documents": documents,
        "tokens": tokens,
        "dtype": np.dtype(dtype).name,
        "stride": STRIDE,
        "seed": seed,
        "digest": digest,
    }
    raw = json.dumps(header, sort_keys=True).encode()
    return (_MAGIC + len(raw).to_bytes(8, "little") + raw).ljust(_HEADER_BYTES, b"\0")


def open_rank_index(path: Path, source: Source, score: str, digest: str | None = None) -> RankIndex:
    """Memory-map an index and check that it belongs to these shards and scores.

    Args:
        path: the index.
        source: the shards.
        score: name of their scores.
        digest: their `content_digest` where the caller has it already.

    Raises:
        RankIndexError: the file is missing, damaged, truncated, or was built from other shards or scores.
    """
    command = _command(source, score, path)
    if not path.is_file():
        raise RankIndexError(
            f"source {source.name!r}: no rank index {path} for its {counted(source.num_documents, 'document')}; build "
            "it "
            f"once with\n  {command}"
        )
    header = _read_header(path)
    index = _map_arrays(path, header)
    if index.digest != (digest or content_digest(source, score)):
        raise RankIndexError(
            f"{path}: built from other shards or scores than those of source {source.name!r}; build it again with\n"
            f"  {command}"
        )
    return index


def damaged_index(index: RankIndex, source: Source, score: str, where: str = "") -> RankIndexError:
    """Return the error of an index that was read and cannot be right.

    `where` says which of its entries.
    """
    if index.path is None:
        return RankIndexError(
            f"source {source.name!r}: its files no longer agree with the ranking by {score!r} made of them{where}; "
            "they were changed or damaged since: start anew"
        )
    command = _command(source, score, index.path)
    return RankIndexError(
        f"{index.path}: damaged, or the shards of source {source.name!r} are{where}; see how much with\n"
        f"  {command} --verify\nand build it again with the same command without --verify"
    )


def _command(source: Source, score: str, path: Path | None) -> str:
    command = f"{tool_command('rank')} {shell_command(*source.named, '--score', score)}"
    if path is None or path == index_path(source, score):
        return command
    return f"{command} --output {shell_command(path)}"


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        raw = stream.read(_HEADER_BYTES)
    if len(raw) < _HEADER_BYTES or not raw.startswith(_MAGIC):
        raise RankIndexError(f"{path}: not a rank index, or a truncated one; delete it and run {tool('rank')}")
    length = int.from_bytes(raw[8:16], "little")
    try:
        header: dict[str, Any] = json.loads(raw[16 : 16 + length])
        if not isinstance(header["digest"], str) or {type(header[k]) for k in ("documents", "stride", "seed")} != {int}:
            raise ValueError("a field has another type")
        if header["dtype"] not in ("uint32", "uint64") or header["stride"] != STRIDE or header["documents"] < 1:
            raise ValueError("a field has an impossible value")
    except (ValueError, KeyError, TypeError) as error:
        raise RankIndexError(f"{path}: damaged header ({error}); delete it and run {tool('rank')}") from error
    return header


def _map_arrays(path: Path, header: dict[str, Any]) -> RankIndex:
    documents, dtype = header["documents"], np.dtype(header["dtype"])
    marks = -(-documents // header["stride"]) + 1
    expected = _HEADER_BYTES + 8 * marks + dtype.itemsize * documents
    if path.stat().st_size != expected:
        raise RankIndexError(
            f"{path}: {counted(path.stat().st_size, 'byte')}, expected {expected}; delete it and run {tool('rank')}"
        )
    arrays = [
        map_array(path, np.dtype(kind), count, offset, random=True)
        for kind, offset, count in ((dtype, _HEADER_BYTES + 8 * marks, documents), (np.int64, _HEADER_BYTES, marks))
    ]
    return RankIndex(arrays[0], arrays[1], header["seed"], header["digest"], path)


def _map_again(path: Path, seed: int, digest: str) -> RankIndex:
    """The index that another process had mapped."""
    index = _map_arrays(path, _read_header(path))
    if (index.seed, index.digest) != (seed, digest):
        raise RankIndexError(f"{path}: built again while it was in use, from other shards or scores; start anew")
    return index


def verify_rank_index(path: Path, source: Source, score: str) -> None:
    """Compare a stored index with a fresh ranking, document by document.

    Raises:
        RankIndexError: the index is missing, stale, or differs; says where first.
    """
    stored = open_rank_index(path, source, score)
    fresh = build_rank_index(source, score, stored.seed)
    for name in ("order", "token_marks"):
        different = np.flatnonzero(getattr(stored, name) != getattr(fresh, name))
        if len(different):
            raise RankIndexError(
                f"{path}: {counted(len(different), 'entry', 'entries')} of {name} "
                f"{agreed(len(different), 'differs', 'differ')} from a fresh ranking, the first at {different[0]:,}; "
                f"the file is damaged or the scores have changed: run {tool('rank')} again without --verify"
            )


def load_or_rank(source: Source, score: str, path: Path | None = None, digest: str | None = None) -> RankIndex:
    """The stored index (beside the shards, or at `path`), or for a small source without one, a ranking made here.

    `digest` is as for `open_rank_index`.

    Raises:
        RankIndexError: no index at `path`, or none at all and the source has more than 2**20 documents; the message
            has the command.
    """
    usual = index_path(source, score)
    if path is None and not usual.is_file() and source.num_documents <= _SMALL_SOURCE:
        return build_rank_index(source, score, digest=digest)
    return open_rank_index(path or usual, source, score, digest)
