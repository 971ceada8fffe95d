"""Streaming writer of Megatron's `.bin`/`.idx` pair with score sidecars, in memory that does not grow with the data.

Format: megatron/core/datasets/indexed_dataset.py, version 1, one sequence a document; docs/shards.md has the bytes.
Megatron's builder keeps lengths and pointers in Python lists (about 100 bytes a document) until the end. Here they are
spooled to disk and the index is composed from the spool in chunks.

Nothing carries its final name before everything is on disk. All files are first written as `<name>.partial`; `commit`
renames them, the manifest last, so a manifest means a whole shard.
"""

import fcntl
import hashlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ConfigError, PreprocessError
from megatron_kaiyuan.preprocess.manifest import FileRecord, Manifest, ScoreSummary, manifest_path

__all__ = ["ShardWriter", "optimal_dtype"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPE_CODES = {"int32": 4, "uint16": 8}
_UINT16_VOCABULARY = 65500
_CHUNK = 1 << 18
_PARTIAL = ".partial"


def optimal_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Type of the token ids on disk: uint16 below 65500 entries, else int32 (Megatron's `DType.optimal_dtype`)."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


class _HashedFile:
    """A partial file that counts and hashes what passes through it."""

    def __init__(self, final: Path, stream: BinaryIO | None = None) -> None:
        self.final = final
        self.partial = Path(f"{final}{_PARTIAL}")
        self._stream = stream or self.partial.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._size += len(data)

    def sync(self) -> FileRecord:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return FileRecord(name=self.final.name, bytes=self._size, sha256=self._digest.hexdigest())

    def publish(self) -> None:
        self.partial.replace(self.final)

    def close(self) -> None:
        self._stream.close()


class _Spool:
    """A column of numbers on disk: appended block by block, read back in chunks of a fixed size."""

    def __init__(self, path: Path, dtype: type[np.int32] | type[np.float32]) -> None:
        self.path = path
        self.count = 0
        self._dtype = np.dtype(dtype)
        self._stream = path.open("w+b")

    def append(self, values: NDArray[np.generic]) -> None:
        self._stream.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.count += len(values)

    def chunks(self) -> Iterator[NDArray[np.number]]:
        self._stream.flush()
        self._stream.seek(0)
        while data := self._stream.read(_CHUNK * self._dtype.itemsize):
            yield np.frombuffer(data, dtype=self._dtype)

    def close(self) -> None:
        self._stream.close()


class ShardWriter:
    """Writes one shard. Use as a context manager: leaving it without `publish` deletes everything written.

    Args:
        prefix: output path without suffix.
        dtype: int32 or uint16, see `optimal_dtype`.
        score_keys: names of the score sidecars, `prefix.scores.<key>.npy`.
        overwrite: replace an existing shard of this name; otherwise that is an error.

    Raises:
        ConfigError: the shard exists, or another process is writing it at this moment.
        PreprocessError: the folder cannot be written.
    """

    def __init__(
        self, prefix: str, dtype: np.dtype[np.generic], score_keys: Sequence[str] = (), *, overwrite: bool = False
    ) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self.max_token_id = -1
        self._code = _DTYPE_CODES[self.dtype.name]
        self._overwrite = overwrite
        if not overwrite:
            refuse_existing(prefix, score_keys)
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = _HashedFile(Path(f"{prefix}.bin"), _open_locked(Path(f"{prefix}.bin{_PARTIAL}")))
            self._lengths = _Spool(Path(f"{prefix}.lengths{_PARTIAL}"), np.int32)
            self._scores = {key: _Spool(Path(f"{prefix}.scores.{key}{_PARTIAL}"), np.float32) for key in score_keys}
        except OSError as error:
            raise PreprocessError(f"output {prefix}: {error}; choose a folder that can be written") from error
        self._composed: list[_HashedFile] = []

    @property
    def documents(self) -> int:
        """Documents appended so far."""
        return self._lengths.count

    def append(
        self, tokens: NDArray[np.generic], lengths: NDArray[np.integer], scores: NDArray[np.floating] | None = None
    ) -> None:
        """Append a batch of documents.

        Args:
            tokens: ids of all documents one after another, `[sum(lengths)]`, of the shard's dtype.
            lengths: tokens of each document, `[n]`.
            scores: `[n, number of score keys]`; may be left out where there are none.
        """
        assert tokens.dtype == self.dtype, f"tokens are {tokens.dtype}, the shard is {self.dtype}"
        assert int(lengths.sum(dtype=np.int64)) == len(tokens), "lengths do not add up to the number of tokens"
        assert not self._scores or (scores is not None and scores.shape == (len(lengths), len(self._scores)))
        self._bin.write(np.ascontiguousarray(tokens).tobytes())
        self._lengths.append(lengths)
        for column, spool in enumerate(self._scores.values()):
            assert scores is not None
            spool.append(scores[:, column])
        self.tokens += len(tokens)
        if len(tokens):
            self.max_token_id = max(self.max_token_id, int(tokens.max()))

    def compose(self) -> tuple[dict[str, FileRecord], dict[str, ScoreSummary]]:
        """Write the index and the sidecars under partial names and force all to disk; still nothing is visible."""
        files = {"bin": self._bin.sync(), "idx": self._compose_index()}
        summaries = {}
        for key, spool in self._scores.items():
            files[f"scores.{key}"], summaries[key] = self._compose_scores(key, spool)
        return files, summaries

    def publish(self, manifest: Manifest) -> None:
        """Give every file its final name; the index comes after the data, and the manifest last."""
        target = manifest_path(self.prefix)
        record = _HashedFile(target)
        self._composed.append(record)
        record.write(manifest.model_dump_json(indent=2).encode() + b"\n")
        record.sync()
        if self._overwrite:
            _remove_existing(self.prefix)
        index, *sidecars, last = self._composed
        for file in (self._bin, *sidecars, index, last):
            file.publish()
        _sync_folder(target.parent)

    def _compose_index(self) -> FileRecord:
        """Header, lengths (int32), byte pointers (int64), document boundaries (int64, one more than documents)."""
        index = _HashedFile(Path(f"{self.prefix}.idx"))
        self._composed.append(index)
        count = self._lengths.count
        index.write(_HEADER.pack(_MAGIC, _VERSION, self._code, count, count + 1))
        for lengths in self._lengths.chunks():
            index.write(lengths.tobytes())
        start = 0
        for lengths in self._lengths.chunks():
            ends = start + np.cumsum(lengths.astype(np.int64) * self.dtype.itemsize)
            index.write(np.concatenate(([start], ends[:-1])).astype(np.int64).tobytes())
            start = int(ends[-1])
        for first in range(0, count + 1, _CHUNK):
            index.write(np.arange(first, min(first + _CHUNK, count + 1), dtype=np.int64).tobytes())
        return index.sync()

    def _compose_scores(self, key: str, spool: _Spool) -> tuple[FileRecord, ScoreSummary]:
        sidecar = _HashedFile(Path(f"{self.prefix}.scores.{key}.npy"))
        self._composed.append(sidecar)
        header = {"descr": "<f4", "fortran_order": False, "shape": (spool.count,)}
        np.lib.format.write_array_header_1_0(sidecar, header)
        low, high, total = np.inf, -np.inf, 0.0
        for scores in spool.chunks():
            sidecar.write(scores.tobytes())
            low, high = min(low, float(scores.min())), max(high, float(scores.max()))
            total += float(scores.astype(np.float64).sum())
        return sidecar.sync(), ScoreSummary(min=low, max=high, mean=total / max(spool.count, 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for spool in (self._lengths, *self._scores.values()):
            spool.path.unlink(missing_ok=True)
            spool.close()
        for file in (*self._composed, self._bin):  # the lock on the .bin goes last
            file.partial.unlink(missing_ok=True)
            file.close()


def refuse_existing(prefix: str, score_keys: Sequence[str] = ()) -> None:
    """Raise ConfigError if any final file of the shard `prefix` exists."""
    names = [f"{prefix}.bin", f"{prefix}.idx", *(f"{prefix}.scores.{key}.npy" for key in score_keys)]
    for path in [*map(Path, names), manifest_path(prefix)]:
        if path.exists():
            whole = "" if manifest_path(prefix).exists() else " (without a manifest: interrupted, or another tool's)"
            raise ConfigError(
                f"--output-prefix: {path} exists{whole}; give --overwrite to replace this shard, or another prefix"
            )


def _remove_existing(prefix: str) -> None:
    """The manifest and the index go first, so that no reader can open a mixture of the old and the new shard."""
    manifest_path(prefix).unlink(missing_ok=True)
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    name = re.escape(Path(prefix).name)
    for path in Path(prefix).parent.iterdir():
        if re.fullmatch(rf"{name}\.scores\..+\.npy", path.name):  # a key of the earlier run may not be written again
            path.unlink()


def _open_locked(path: Path) -> BinaryIO:
    """Open for writing and hold it alone; the lock dies with the process, so a killed run leaves no lock behind."""
    stream = path.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same_file = path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino
    except BlockingIOError:
        same_file = False
    except OSError:  # a file system without locks: two runs on one prefix cannot be told apart there
        same_file = True
    if not same_file:
        stream.close()
        raise ConfigError(f"--output-prefix: another process is writing {path}; wait for it or choose another prefix")
    stream.truncate(0)
    return stream


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
