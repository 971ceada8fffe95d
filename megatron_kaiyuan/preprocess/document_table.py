"""`P.documents.parquet`: one row a document with its origin, readable by any Parquet tool.

Columns: `file`, `row` (in the file, from 0; null in a shard that begins within a plain JSONL file, where the number is
known only after reading all before it), `offset` (byte of the line in its file; null for compressed input and Parquet),
`tokens` (as in the `.idx`), one `score.<key>` for each score, and `id` where `--id-key` is given. A file and a row, or
a file and an offset, name one document. Repeated and consecutive values cost next to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_kaiyuan.preprocess.partial import HashedFile

__all__ = ["DocumentTable", "Origins"]

_GROUP_ROWS = 1 << 16
"""Rows of a row group: fixed, so that the bytes do not depend on how the input was cut into blocks."""


@dataclass(frozen=True, slots=True)
class Origins:
    """Where some documents of one file come from."""

    file: str
    rows: NDArray[np.int64] | None
    """Row of each document in its file, from 0; None where it is not known, and then `offsets` are."""
    offsets: NDArray[np.int64] | None = None
    ids: Sequence[str] | None = None


class DocumentTable:
    """Writes the table in memory that does not grow with it."""

    def __init__(self, file: HashedFile, score_keys: Sequence[str], *, with_ids: bool) -> None:
        self._file = file
        self._score_keys = tuple(score_keys)
        self._schema = _schema(score_keys, with_ids=with_ids)
        plain = [f"score.{key}" for key in score_keys] + (["id"] if with_ids else [])
        encoding = dict.fromkeys(("row", "offset", "tokens"), "DELTA_BINARY_PACKED") | dict.fromkeys(plain, "PLAIN")
        self._writer = pq.ParquetWriter(
            file, self._schema, compression="zstd", use_dictionary=["file"], column_encoding=encoding
        )
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def append(
        self, lengths: NDArray[np.integer], scores: NDArray[np.floating] | None, origins: Origins | None
    ) -> None:
        """Add documents of one file."""
        count = len(lengths)
        file, rows, offsets, ids = (
            (origins.file, origins.rows, origins.offsets, origins.ids) if origins else (None, None, None, None)
        )
        columns = {
            "file": pa.repeat(pa.scalar(file, pa.string()), count),
            "row": pa.nulls(count, pa.int64()) if rows is None else pa.array(rows, pa.int64()),
            "offset": pa.nulls(count, pa.int64()) if offsets is None else pa.array(offsets, pa.int64()),
            "tokens": pa.array(lengths.astype(np.int32)),
        }
        for number, key in enumerate(self._score_keys):
            assert scores is not None
            columns[f"score.{key}"] = pa.array(np.ascontiguousarray(scores[:, number], dtype=np.float64))
        if "id" in self._schema.names:
            columns["id"] = pa.nulls(count, pa.string()) if ids is None else pa.array(ids, pa.string())
        self._pending.append(pa.table(columns, schema=self._schema))
        self._pending_rows += count
        if self._pending_rows >= _GROUP_ROWS:
            self._write_groups()

    def _write_groups(self) -> None:
        """Write whole row groups and keep the rest."""
        table = pa.concat_tables(self._pending)
        whole = table.num_rows - table.num_rows % _GROUP_ROWS
        for start in range(0, whole, _GROUP_ROWS):
            self._writer.write_table(table.slice(start, _GROUP_ROWS).combine_chunks(), row_group_size=_GROUP_ROWS)
        self._pending, self._pending_rows = [table.slice(whole)], table.num_rows - whole

    def finish(self) -> HashedFile:
        """Write the rest, and return the record of the complete file."""
        if self._pending_rows:
            table = pa.concat_tables(self._pending).combine_chunks()
            self._writer.write_table(table, row_group_size=_GROUP_ROWS)
        self._writer.close()
        return self._file

    def discard(self) -> None:
        """Remove the file unless it was published."""
        self._pending = []
        self._file.discard()
        self._writer.close()  # or it would close itself at some later time, with a warning


def _schema(score_keys: Sequence[str], *, with_ids: bool) -> pa.Schema:
    fields = [("file", pa.string()), ("row", pa.int64()), ("offset", pa.int64()), ("tokens", pa.int32())]
    fields += [(f"score.{key}", pa.float64()) for key in score_keys]
    return pa.schema([*fields, *([("id", pa.string())] if with_ids else [])])
