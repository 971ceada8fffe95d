"""Reading Megatron's `.bin`/`.idx` shards with numpy alone, and never past their end.

Format (megatron/core/datasets/indexed_dataset.py, version 1): the `.idx` holds a 9-byte magic, u64 version, u8 dtype
code, u64 sequence count, u64 count of document boundaries (the leading 0 is stored), then int32 lengths, int64 byte
pointers and int64 document boundaries. Each sequence is a document here, as in Megatron's own training. Its tool writes
other boundaries for an empty text (a boundary and no sequence) and with --split-sentences (several sequences).
The `.bin` is the tokens alone. Megatron's reader checks none of the
sizes; a truncated `.bin` is read as uninitialised memory there. Here opening a shard compares the sizes of both files
with the header and the last entry.
"""

import glob as globbing
import os
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.cut_files import note_size
from megatron_kaiyuan.host.files import open_regular
from megatron_kaiyuan.host.maps import map_array, open_maps
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.manifest import ShardRecord, load_record

__all__ = [
    "DTYPE_CODES",
    "INDEX_HEADER",
    "INDEX_MAGIC",
    "INDEX_VERSION",
    "Shard",
    "open_recorded_shard",
    "open_shard",
    "real_files",
    "refuse_duplicates",
    "refuse_empty_name",
    "resolve_item",
    "resolve_prefixes",
]

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_TOKEN_CODES = (1, 2, 3, 4, 5, 8)


@dataclass(frozen=True)
class Shard:
    """One opened `.bin`/`.idx` pair. Arrays are memory-mapped when used and shared between workers, forked or spawned.

    Take an array once for a loop rather than an element at a time: see maps.py for how long a map stays open.
    """

    prefix: str
    """Path without suffix, as Megatron names a dataset."""
    documents: int
    tokens: int
    dtype: np.dtype[np.generic]
    boundaries: int
    """Entries of the index's array of document boundaries: documents + 1 where each holds one sequence."""
    record: ShardRecord | None = None
    """What its manifest says; None where it has none, or was opened without it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # without its maps: pickled, they would be copies of whole files; a spawned worker maps the files itself
        return Shard, (self.prefix, self.documents, self.tokens, self.dtype, self.boundaries, self.record)

    @property
    def index_bytes(self) -> int:
        """Size of the `.idx` without the modes of a multimodal one."""
        return INDEX_HEADER.size + 12 * self.documents + 8 * self.boundaries

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, int32 `[documents]`."""
        return self._index()[0]

    @property
    def pointers(self) -> NDArray[np.int64]:
        """Byte offset of each document in the `.bin`, int64 `[documents]`."""
        return self._index()[1]

    @property
    def token_data(self) -> NDArray[Any]:
        """All tokens, `[tokens]` of the shard's dtype."""
        kept: NDArray[Any] | None = self.__dict__.get("_tokens")
        if kept is None:
            return open_maps().keep(
                self, "_tokens", map_array(f"{self.prefix}.bin", self.dtype, self.tokens, 0, random=False)
            )
        return kept

    def read_lengths(self, out: NDArray[np.int32]) -> None:
        """Read the tokens of each document into `out`, int32 `[documents]`, contiguous."""
        with Path(f"{self.prefix}.idx").open("rb", buffering=0) as index:
            index.seek(INDEX_HEADER.size)
            left = memoryview(out).cast("B")
            while len(left):
                done = index.readinto(left)
                if not done:
                    raise ShardError(f"{self.prefix}.idx: became shorter while it was read; copy it again")
                left = left[done:]

    def read_tokens(self, first: int, count: int) -> NDArray[Any]:
        """Read some tokens without mapping the file, `[count]` of the shard's dtype.

        The first touch of a map can make the kernel read megabytes around it; this reads what it is asked for.
        """
        with Path(f"{self.prefix}.bin").open("rb", buffering=0) as tokens:
            raw = os.pread(tokens.fileno(), count * self.dtype.itemsize, first * self.dtype.itemsize)
        if len(raw) < count * self.dtype.itemsize:
            raise ShardError(f"{self.prefix}.bin: became shorter while it was read; copy it again")
        return np.frombuffer(raw, dtype=self.dtype)

    def _index(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Lengths and pointers, views of one map."""
        kept: tuple[NDArray[np.int32], NDArray[np.int64]] | None = self.__dict__.get("_arrays")
        if kept is None:
            raw = map_array(
                f"{self.prefix}.idx", np.dtype(np.uint8), 12 * self.documents, INDEX_HEADER.size, random=True
            )
            arrays = raw[: 4 * self.documents].view(np.int32), raw[4 * self.documents :].view(np.int64)
            return open_maps().keep(self, "_arrays", arrays)
        return kept

    def document_of_token(self, token: int) -> int:
        """Return the document that holds token number `token` of the shard.

        Empty documents hold none.
        """
        # not np.searchsorted: the array begins at byte 34 + 4 N of its file, and numpy copies an unaligned array whole
        return bisect_right(self.pointers, token * self.dtype.itemsize) - 1


def open_shard(prefix: str | os.PathLike[str]) -> Shard:
    """Open and validate one shard.

    Reads the header and five index entries, so the cost does not grow with the shard.

    Raises:
        ShardError: a file is missing, is not a version 1 index, holds no tokens dtype, or sizes disagree.
    """
    prefix = os.fspath(prefix)
    try:
        with open_regular(f"{prefix}.idx") as index:
            sequences, boundaries, dtype = _read_header(index, f"{prefix}.idx")
            end = _end_of_last_document(index, f"{prefix}.idx", sequences, boundaries, dtype)
        size = Path(f"{prefix}.bin").stat().st_size
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ShardError(
            f"shard {prefix!r}: {error.filename} does not exist (looked in {Path.cwd()}); "
            f"give the path of the .bin/.idx pair without its suffix, or build it with {tool('preprocess')}"
        ) from error
    if size != end:
        problem = "is truncated" if size < end else "is longer than its index says"
        raise ShardError(
            f"{prefix}.bin: {counted(size, 'byte')}, but {prefix}.idx ends at byte {end}: the file {problem}, or the "
            "two belong "
            "to different runs; copy or build both again"
        )
    shard = Shard(prefix, sequences, size // dtype.itemsize, dtype, boundaries)
    note_size(f"{prefix}.bin", size)
    note_size(f"{prefix}.idx", shard.index_bytes)
    return shard


def open_recorded_shard(prefix: str | os.PathLike[str]) -> Shard:
    """Open a shard together with the record of its manifest.

    Errors as `open_shard`, and ShardError where the manifest is damaged.
    """
    shard = open_shard(prefix)
    record = load_record(shard.prefix)
    return shard if record is None else replace(shard, record=record)


def _read_header(index: FileIO, path: str) -> tuple[int, int, np.dtype[np.generic]]:
    raw = index.read(INDEX_HEADER.size)
    if len(raw) < INDEX_HEADER.size or not raw.startswith(INDEX_MAGIC):
        raise ShardError(f"{path}: not a Megatron index (it starts with {raw[:9]!r}); rebuild the shard")
    _, version, code, sequences, boundaries = INDEX_HEADER.unpack(raw)
    if version != INDEX_VERSION:
        raise ShardError(
            f"{path}: index version {version}, only version {INDEX_VERSION} is known; "
            f"rebuild it with {tool('preprocess')}"
        )
    if code not in _TOKEN_CODES:
        raise ShardError(f"{path}: dtype code {code} does not hold token ids; expected one of {_TOKEN_CODES}")
    expected = INDEX_HEADER.size + sequences * (4 + 8) + boundaries * 8
    actual = os.fstat(index.fileno()).st_size
    if actual < expected:
        raise ShardError(
            f"{path}: {counted(actual, 'byte')}, its header asks for {expected}; the file is truncated, copy it again"
        )
    if actual not in (expected, expected + sequences):  # a multimodal index has one more byte a sequence
        raise ShardError(
            f"{path}: {counted(actual, 'byte')}, its header asks for {expected}; the file is damaged, copy it again"
        )
    return sequences, boundaries, np.dtype(DTYPE_CODES[code])


def _end_of_last_document(
    index: FileIO, path: str, sequences: int, boundaries: int, dtype: np.dtype[np.generic]
) -> int:
    """Return the byte at which the `.bin` should end.

    Checks both ends of each array, at the cost of three small reads. The last length and the first pointer lie side by
    side, and so do the last pointer and the first boundary.
    """
    if not boundaries:
        raise ShardError(f"{path}: no document boundary, not even the first; the file is damaged, copy it again")
    if not sequences:
        return 0
    lengths_end = INDEX_HEADER.size + 4 * sequences
    length, first = struct.unpack("<iq", os.pread(index.fileno(), 12, lengths_end - 4))
    pointer, boundary = struct.unpack("<qq", os.pread(index.fileno(), 16, lengths_end + 8 * (sequences - 1)))
    (last_boundary,) = struct.unpack("<q", os.pread(index.fileno(), 8, lengths_end + 8 * (sequences + boundaries - 1)))
    if (first, boundary, last_boundary) != (0, 0, sequences) or length < 0 or pointer < 0 or pointer % dtype.itemsize:
        raise ShardError(
            f"{path}: the first document begins at byte {first}, the last one of {counted(length, 'token')} at byte "
            f"{pointer}, "
            f"and documents are numbered {boundary} to {last_boundary} of {sequences}: the file is damaged, copy it "
            f"again or rebuild the shard ({tool('inspect')} --verify says more)"
        )
    return int(pointer + length * dtype.itemsize)


def resolve_prefixes(shards: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """Return the prefixes named by a prefix, a directory, a glob, or a list of these.

    They are sorted by name within each.

    Raises:
        ShardError: nothing matches, or the same shard is named twice.
    """
    items = [os.fspath(shards)] if isinstance(shards, str | os.PathLike) else list(shards)
    found = [prefix for item in items for prefix in resolve_item(item)]
    refuse_duplicates(items, found)
    return found


def refuse_duplicates(items: Sequence[str], found: Sequence[str]) -> None:
    """Raise ShardError where two of these prefixes, named by these items, are one shard."""
    files = real_files(found)
    times = Counter(files)
    duplicates = [prefix for prefix, file in zip(found, files, strict=True) if times[file] > 1]
    if duplicates:
        raise ShardError(f"shards {items}: {duplicates[-1]!r} is named twice; name each shard once and use repeat")


def real_files(prefixes: Sequence[str]) -> list[Hashable]:
    """Return a key for the `.bin` of each shard that is equal exactly for one and the same file.

    It is equal whatever links lead to the file.
    """
    return side_by_side(_real_file, prefixes)


def _real_file(prefix: str) -> Hashable:
    try:
        status = os.stat(f"{prefix}.bin")  # noqa: PTH116
    except OSError:  # opening it will report that
        return os.path.realpath(f"{prefix}.bin")
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(f"{prefix}.bin")


def refuse_empty_name(item: str) -> None:
    """Raise ShardError for an empty name, which would be the working directory."""
    if not item.strip():
        raise ShardError(f"shards {item!r}: an empty name; name a prefix, a directory (. is this one) or a glob")


def resolve_item(item: str) -> list[str]:
    """`resolve_prefixes` of one prefix, directory or glob."""
    refuse_empty_name(item)
    if Path(item).is_dir():
        found = sorted(str(path)[: -len(".idx")] for path in Path(item).glob("*.idx"))
        if not found and Path(f"{item}.idx").is_file():  # Megatron's datasets keep indexes in `PREFIX/cache`
            return [item]
        kind = "directory without .idx files"
    elif globbing.has_magic(item):
        pattern = item.removesuffix(".idx").removesuffix(".bin")
        found = sorted(name[: -len(".idx")] for name in globbing.glob(f"{pattern}.idx", recursive=True))  # noqa: PTH207
        kind = "glob that matches no .idx file"
    elif item.endswith(os.sep):
        raise ShardError(f"shards {item!r}: no such directory (looked in {Path.cwd()}); check the path")
    else:
        return [item.removesuffix(".idx").removesuffix(".bin")]
    if not found:
        raise ShardError(f"shards {item!r}: a {kind} (looked in {Path.cwd()}); name a prefix, a directory or a glob")
    return found
