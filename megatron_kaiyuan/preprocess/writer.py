"""Streaming writer of Megatron's `.bin`/`.idx` pair with score sidecars, in memory that does not grow with the data.

Format: megatron/core/datasets/indexed_dataset.py, version 1, one sequence a document; docs/shards.md has the bytes.
Megatron's builder keeps lengths and pointers in Python lists (about 100 bytes a document) until the end. Here they are
spooled to disk and the index is composed from the spool in chunks.

Nothing carries its final name before everything is on disk. All files are first written under partial names (see
partial.py); `publish` renames them, the manifest last, so a manifest means a whole shard.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ConfigError, PreprocessError
from megatron_kaiyuan.preprocess.document_table import DocumentTable, Origins
from megatron_kaiyuan.preprocess.partial import (
    HashedFile,
    Ownership,
    Spool,
    is_complete,
    is_of_build,
    refuse_existing,
    remove_dead_partials,
    remove_existing,
)
from megatron_kaiyuan.shards.manifest import FileRecord, Manifest, ScoreSummary, manifest_path
from megatron_kaiyuan.shards.shard import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION

__all__ = ["ShardWriter", "optimal_dtype"]

_CODES = {np.dtype(kind): code for code, kind in DTYPE_CODES.items()}
_UINT16_VOCABULARY = 65500
_CHUNK = 1 << 18


def optimal_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Type of the token ids on disk: uint16 below 65500 entries, else int32 (Megatron's `DType.optimal_dtype`)."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


class ShardWriter:
    """Writes one shard. Use as a context manager: leaving it without `publish` deletes everything written.

    Args:
        prefix: output path without suffix.
        dtype: int32 or uint16, see `optimal_dtype`.
        score_keys: names of the score sidecars, `prefix.scores.<key>.npy`.
        with_ids: documents have names, kept in the document table.
        overwrite: replace any shard of this name.
        build: identifies the command and its input; an earlier shard of the same build is replaced in any case.

    Raises:
        ConfigError: the shard exists, or another process is writing it at this moment.
        PreprocessError: the folder cannot be written.
    """

    def __init__(
        self,
        prefix: str,
        dtype: np.dtype[np.generic],
        score_keys: Sequence[str] = (),
        *,
        with_ids: bool = False,
        overwrite: bool = False,
        build: str | None = None,
    ) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self.max_token_id = -1
        self._code = _CODES[self.dtype]
        self._composed: list[HashedFile] = []
        self._overwrite = overwrite
        self._begun = ExitStack()
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._prepare(score_keys, build)
            self._bin = self._begin(HashedFile(Path(f"{prefix}.bin")))
            self._lengths = self._begin(Spool(Path(f"{prefix}.lengths"), np.int32))
            self._scores = {key: self._begin(Spool(Path(f"{prefix}.scores.{key}"), np.float64)) for key in score_keys}
            table = self._begin(HashedFile(Path(f"{prefix}.documents.parquet")))
            self._table = self._begin(DocumentTable(table, score_keys, with_ids=with_ids))
        except OSError as error:
            self._begun.close()
            raise PreprocessError(
                f"output {prefix}: {error.strerror or error}; free or mend the disk, or choose a folder that can be "
                "written, and run the same command again: what is finished stays"
            ) from error
        except ConfigError:
            self._begun.close()
            raise

    def _begin[Partial: HashedFile | Spool | DocumentTable](self, partial: Partial) -> Partial:
        """Remember a file that has to be discarded after a failure."""
        self._begun.callback(partial.discard)
        return partial

    def _prepare(self, score_keys: Sequence[str], build: str | None) -> None:
        """Become the owner, and remove what a killed run left.

        Torn files go before the partial manifest that says whose they are.
        """
        owned = self._begun.enter_context(Ownership(self.prefix))  # the first begun goes last
        ours = is_of_build(self.prefix, build)
        if not self._overwrite and not ours:
            refuse_existing(self.prefix, score_keys)
        torn = ours and not self._overwrite and not manifest_path(self.prefix).exists()
        remove_dead_partials(self.prefix, owned, torn=torn)

    @property
    def documents(self) -> int:
        """Documents appended so far."""
        return self._lengths.count

    def append(
        self,
        tokens: NDArray[np.generic],
        lengths: NDArray[np.integer],
        scores: NDArray[np.floating] | None = None,
        origins: Origins | None = None,
    ) -> None:
        """Append a batch of documents.

        Args:
            tokens: ids of all documents one after another, `[sum(lengths)]`, of the shard's dtype.
            lengths: tokens of each document, `[n]`.
            scores: `[n, number of score keys]`; may be left out where there are none.
            origins: where the documents come from; without them the table says nothing about that.
        """
        assert tokens.dtype == self.dtype, f"tokens are {tokens.dtype}, the shard is {self.dtype}"
        assert int(lengths.sum(dtype=np.int64)) == len(tokens), "lengths do not add up to the number of tokens"
        assert not self._scores or (scores is not None and scores.shape == (len(lengths), len(self._scores)))
        self._bin.write(memoryview(np.ascontiguousarray(tokens)).cast("B") if len(tokens) else b"")
        self._lengths.append(lengths)
        for column, spool in enumerate(self._scores.values()):
            assert scores is not None
            spool.append(scores[:, column])
        self._table.append(lengths, scores, origins)
        self.tokens += len(tokens)
        if len(tokens):
            self.max_token_id = max(self.max_token_id, int(tokens.max()))

    def compose(self) -> tuple[dict[str, FileRecord], dict[str, ScoreSummary]]:
        """Write the index and the sidecars under partial names, and force all to disk.

        Nothing is visible yet.
        """
        files = {"bin": self._bin.sync(), "idx": self._compose_index()}
        summaries = {}
        for key, spool in self._scores.items():
            files[f"scores.{key}"], summary = self._compose_scores(key, spool)
            if spool.count:  # nothing has no range, and JSON has no infinity
                summaries[key] = summary
        table = self._table.finish()
        self._composed.append(table)
        files["documents"] = table.sync()
        return files, summaries

    def publish(self, manifest: Manifest) -> None:
        """Give every file its final name.

        The index comes after the data, and the manifest last.
        """
        if not self._overwrite and manifest.build and is_complete(self.prefix, manifest.build):
            return  # another start of this command has built it while this one waited
        target = manifest_path(self.prefix)
        record = self._begin(HashedFile(target))
        self._composed.append(record)
        record.write(manifest.to_json().encode() + b"\n")
        record.sync()
        if self._overwrite:  # another command's; the names of this one's own files go from bytes to the same bytes
            remove_existing(self.prefix)
        index, *sidecars, last = self._composed
        for file in (self._bin, *sidecars, index, last):
            file.publish()

    def _compose_index(self) -> FileRecord:
        """Header, lengths (int32), byte pointers (int64), document boundaries (int64, one more than documents)."""
        index = self._begin(HashedFile(Path(f"{self.prefix}.idx")))
        self._composed.append(index)
        count = self._lengths.count
        index.write(INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, self._code, count, count + 1))
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

    def _compose_scores(self, key: str, spool: Spool) -> tuple[FileRecord, ScoreSummary]:
        """Write float32, or float64 where float32 would round a whole number: distinct ones must not become ties."""
        rounded = any(_rounds_whole_numbers(scores) for scores in spool.chunks())
        dtype = np.dtype(np.float64 if rounded else np.float32)
        sidecar = self._begin(HashedFile(Path(f"{self.prefix}.scores.{key}.npy")))
        self._composed.append(sidecar)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (spool.count,)}
        np.lib.format.write_array_header_1_0(sidecar, header)
        low, high, total = np.inf, -np.inf, 0.0
        for scores in spool.chunks():
            stored = scores.astype(dtype)
            sidecar.write(stored.tobytes())
            low, high = min(low, float(stored.min())), max(high, float(stored.max()))
            total += float(stored.astype(np.float64).sum())
        return sidecar.sync(), ScoreSummary(min=low, max=high, mean=total / max(spool.count, 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._begun.close()


def _rounds_whole_numbers(scores: NDArray[np.number]) -> bool:
    """Whether float32 would change a whole number among these float64 scores."""
    return bool(((scores.astype(np.float32) != scores) & (scores == np.rint(scores))).any())
