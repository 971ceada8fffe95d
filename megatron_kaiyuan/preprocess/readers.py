"""From parts of input files to blocks: pieces of a few megabytes that any process can turn into documents.

A block of plain JSONL is a byte range that the worker reads itself, so reading and JSON parsing use all cores.
Compressed JSONL and Parquet have to be decoded from the start of a file or row group; the main process does that and
ships whole lines or an Arrow batch. Where blocks are cut depends on the input alone, never on the number of workers.
"""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_kaiyuan.errors import PreprocessError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.preprocess.decompress import DamagedStreamError, Readable, open_stream
from megatron_kaiyuan.preprocess.formats import kind_of
from megatron_kaiyuan.preprocess.inputs import InputFile, Part, part_bytes

__all__ = [
    "BLOCK_BYTES",
    "ArrowRows",
    "Block",
    "ByteRange",
    "FoundLines",
    "Lines",
    "LongLine",
    "Unreadable",
    "lines_of",
    "read_blocks",
]

BLOCK_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 28
"""A longer line is a faulty row; it is passed over without being held in memory."""
_PARQUET_ROWS = 1024
_MAGIC_BYTES = 8
_PARQUET_BUFFER = 1 << 20
"""Bytes of a column that are read at once."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The lines of a plain file whose first byte lies in `[start, stop)`."""

    path: str
    start: int
    stop: int
    file_bytes: int
    """Size when the run started: a file that changes under it is an error."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines, decompressed or from standard input."""

    data: bytes


@dataclass(frozen=True, slots=True)
class LongLine:
    """One line of a compressed file or of standard input that is over the limit, without its content."""


@dataclass(frozen=True, slots=True)
class ArrowRows:
    """Some rows of a Parquet file as an Arrow IPC stream, only the columns asked for."""

    data: bytes
    columns: tuple[str, ...]
    """All top-level columns of the file, for the message about a missing one."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The rest of a file, which cannot be read."""

    problem: str


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of one part."""

    source: int
    """Position of its part in the list of parts."""
    input_bytes: int
    """Its share of the file on disk, for progress and rates."""
    payload: ByteRange | Lines | LongLine | ArrowRows | Unreadable


def read_blocks(parts: Sequence[Part], keys: Sequence[str], block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """All blocks of all parts in order.

    Args:
        parts: files, or pieces of them.
        keys: names the documents are read from, dots for nested ones; other Parquet columns are never decoded.
        block_bytes: about how much text one block holds.
    """
    for source, part in enumerate(parts):
        file = part.file
        if file.kind == "unreadable":
            yield Block(source, file.bytes, Unreadable(file.problem))
        elif file.kind == "plain":
            start, end = (part.start, part.stop) if part.stop is not None else (0, file.bytes)
            for first in range(start, end, block_bytes):
                stop = min(first + block_bytes, end)
                yield Block(source, stop - first, ByteRange(file.name, first, stop, file.bytes))
        elif file.kind == "parquet":
            yield from _parquet_blocks(source, part, keys, block_bytes)
        elif file.kind == "stdin":
            yield from _stdin_blocks(source, block_bytes)
        else:
            yield from _compressed_blocks(source, file, block_bytes)


def _compressed_blocks(source: int, file: InputFile, block_bytes: int) -> Iterator[Block]:
    done = 0
    try:
        with Path(file.name).open("rb") as raw:
            for payload in _whole_lines(open_stream(file.kind, raw), block_bytes):
                reached = raw.tell()
                yield Block(source, reached - done, payload)
                done = reached
    except (OSError, DamagedStreamError) as error:
        yield Block(source, file.bytes - done, Unreadable(str(error)))


def _stdin_blocks(source: int, block_bytes: int) -> Iterator[Block]:
    """Yield the blocks of standard input, whose first bytes decide its format too."""
    raw = io.BufferedReader(cast(io.RawIOBase, sys.stdin.buffer))
    kind = kind_of(raw.peek(_MAGIC_BYTES))
    if kind == "parquet":
        raise PreprocessError("--input -: standard input holds Parquet, which is read from its end; name the file")
    try:
        for payload in _whole_lines(open_stream(kind, raw), block_bytes):
            yield Block(source, len(payload.data) if isinstance(payload, Lines) else MAX_LINE_BYTES, payload)
    except (OSError, DamagedStreamError) as error:
        yield Block(source, 0, Unreadable(str(error)))


def _whole_lines(stream: Readable, block_bytes: int) -> Iterator[Lines | LongLine]:
    """Cut a stream after its last newline in every `block_bytes`.

    A line over the limit is dropped on the way.

    Raises:
        DamagedStreamError: the rest cannot be decoded; all whole lines before it were given.
    """
    parts: list[bytes] = []
    held = 0
    dropping = False
    try:
        while chunk := stream.read(block_bytes):
            first = chunk.find(b"\n")
            if dropping:
                if first < 0:
                    continue
                chunk, dropping = chunk[first + 1 :], False
                first = chunk.find(b"\n")
            if held + (first if first >= 0 else len(chunk)) > MAX_LINE_BYTES:
                yield LongLine()
                parts, held, dropping = [], 0, first < 0
                chunk = chunk[first + 1 :] if first >= 0 else b""
            cut = chunk.rfind(b"\n") + 1
            if cut:
                yield Lines(b"".join((*parts, chunk[:cut])))
                parts, held = [], 0
            parts.append(chunk[cut:])
            held += len(chunk) - cut
    except DamagedStreamError:
        if held and _is_object(b"".join(parts)):  # complete, though its newline is gone
            yield Lines(b"".join(parts))
        raise
    if held:
        yield Lines(b"".join(parts))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parquet_blocks(source: int, part: Part, keys: Sequence[str], block_bytes: int) -> Iterator[Block]:
    file = part.file
    done = rows = 0
    size = part_bytes(part)
    try:
        # else Arrow holds the file, or a row group, in memory
        with pq.ParquetFile(file.name, pre_buffer=False, buffer_size=_PARQUET_BUFFER) as parquet:
            groups = list(range(parquet.num_row_groups))[part.start : part.stop]
            total = max(sum(parquet.metadata.row_group(group).num_rows for group in groups), 1)
            columns = tuple(parquet.schema_arrow.names)
            wanted = list(dict.fromkeys(name for key in keys if (name := _column_of(parquet.schema_arrow, key))))
            size_of_batch = _rows_of_block(parquet.metadata, groups, wanted, block_bytes)
            batches = parquet.iter_batches(
                batch_size=size_of_batch, row_groups=groups, columns=wanted, use_threads=False
            )
            for batch in batches:
                rows += batch.num_rows
                reached = size * rows // total
                yield Block(source, reached - done, ArrowRows(_as_ipc(batch), columns))
                done = reached
    except (pa.ArrowException, OSError) as error:
        yield Block(source, size - done, Unreadable(f"not a whole Parquet file: {error}"))


def _column_of(schema: pa.Schema, key: str) -> str:
    """Return the column, or the part of a struct, that holds a key.

    It is the last part of its way that exists, empty for none.
    """
    if key in schema.names:
        return key
    first, *rest = key.split(".")
    if first not in schema.names:
        return ""
    way, kind = [first], schema.field(first).type
    for part in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            break
        way, kind = [*way, part], kind.field(part).type
    return ".".join(way)


def _rows_of_block(metadata: pq.FileMetaData, groups: Sequence[int], wanted: Sequence[str], block_bytes: int) -> int:
    """How many rows fill a block in the row group whose rows are the longest on average: books make short blocks."""
    longest = 0.0
    for number in groups:
        group = metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        read = [column for column in columns if any(_is_part_of(column.path_in_schema, name) for name in wanted)]
        longest = max(longest, sum(column.total_uncompressed_size for column in read) / max(group.num_rows, 1))
    return max(1, min(_PARQUET_ROWS, int(block_bytes / max(longest, 1.0))))


def _is_part_of(path: str, name: str) -> bool:
    """Whether a leaf of the schema belongs to a field that is read, nested ones included."""
    return path == name or path.startswith(f"{name}.") or name.startswith(f"{path.split('.')[0]}.")


def _as_ipc(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


@dataclass(frozen=True, slots=True)
class FoundLines:
    """The lines of a block without their newline."""

    lines: list[bytes | memoryview]
    """Views of the block where possible: cutting copies out of it would cost as much as reading it."""
    first_byte: int | None
    """Where the first of them begins in its file; None for a compressed one."""
    last_is_cut: bool = False
    """The last line is over the limit, and only its beginning is here."""


def lines_of(payload: ByteRange | Lines) -> FoundLines:
    """Cut a block into lines.

    Raises:
        PreprocessError: the file changed size since the run began, or cannot be read.
    """
    if isinstance(payload, Lines):
        return FoundLines(_split(payload.data), None)
    try:
        return _read_range(payload)
    except OSError as error:
        raise PreprocessError(
            f"{error.filename or payload.path}: {error.strerror}; mend the file or leave it out"
        ) from error


def _split(data: bytes) -> list[bytes | memoryview]:
    view, find, start = memoryview(data), data.find, 0
    lines: list[bytes | memoryview] = []
    while (stop := find(b"\n", start)) >= 0:
        lines.append(view[start:stop])
        start = stop + 1
    if start < len(data):
        lines.append(view[start:])
    return lines


def _read_range(span: ByteRange) -> FoundLines:
    """Return the lines that begin in the range.

    The last one may end after it.
    """
    with Path(span.path).open("rb") as stream:
        size = stream.seek(0, 2)
        if size != span.file_bytes:
            raise PreprocessError(
                f"{span.path}: {counted(size, 'byte')} now, {span.file_bytes} when the run began; run again when "
                "nothing writes "
                "to it"
            )
        first = stream.seek(max(span.start - 1, 0))
        if span.start:
            # from one byte earlier: the newline before `start` shows whether a line starts exactly there
            first += len(stream.readline(span.stop - first))
        data = stream.read(span.stop - first)
        lines = _split(data)
        if not data or data.endswith(b"\n"):
            return FoundLines(lines, first)
        room = MAX_LINE_BYTES - len(lines[-1]) + 1
        rest = stream.readline(room)
    lines[-1] = b"".join((lines[-1], rest.removesuffix(b"\n")))
    return FoundLines(lines, first, last_is_cut=len(lines[-1]) > MAX_LINE_BYTES)
