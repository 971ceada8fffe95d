"""From `--input` arguments to blocks: pieces of a few megabytes that any process can turn into documents.

A block of plain JSONL is a byte range that the worker reads itself, so reading and JSON parsing use all cores.
Compressed JSONL and Parquet have to be decoded from the start of a file or row group; the main process does that and
ships whole lines or an Arrow batch. Where blocks are cut depends on the input alone, never on the number of workers.
"""

import glob as globbing
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_kaiyuan.errors import PreprocessError

__all__ = [
    "BLOCK_BYTES",
    "ArrowRows",
    "Block",
    "ByteRange",
    "InputFile",
    "Lines",
    "Unreadable",
    "expand_inputs",
    "lines_of",
    "read_blocks",
]

BLOCK_BYTES = 1 << 21
MAX_LINE_BYTES = 1 << 28
_PARQUET_ROWS = 1024
_SUFFIXES = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst")

Kind = Literal["plain", "gzip", "zstd", "parquet", "unreadable"]


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file, its format found from its first bytes rather than its name."""

    name: str
    bytes: int
    kind: Kind
    problem: str = ""
    """Why it cannot be read, for kind `unreadable`."""


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
    """Whole lines, decompressed."""

    data: bytes


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
    """A piece of one input file."""

    source: int
    """Position of its file in the list of inputs."""
    input_bytes: int
    """Its share of the file on disk, for progress and rates."""
    payload: ByteRange | Lines | ArrowRows | Unreadable


def expand_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """Files named by paths, globs and directories, in the order given and sorted by name within a glob or directory.

    Directories are searched recursively for .jsonl, .json and .ndjson, each also with .gz or .zst, and .parquet; a file
    named outright may have any name.

    Raises:
        PreprocessError: a pattern matches nothing, or a file is named twice.
    """
    names = [name for pattern in patterns for name in _expand(pattern)]
    seen: dict[Path, str] = {}
    for name in names:
        resolved = Path(name).resolve()
        if resolved in seen:
            raise PreprocessError(
                f"--input: {name} is named twice (also as {seen[resolved]}); name each file once, repetition belongs "
                "in the plan"
            )
        seen[resolved] = name
    return [_inspect(name) for name in names]


def _expand(pattern: str) -> list[str]:
    if Path(pattern).is_dir():
        found = [str(path) for path in Path(pattern).rglob("*") if path.is_file() and _is_document_file(path)]
        what = "a directory without .jsonl, .json, .ndjson (.gz, .zst) or .parquet files"
    elif Path(pattern).exists():
        return [pattern]
    elif globbing.has_magic(pattern):
        root = Path(pattern).anchor
        matches = Path(root).glob(pattern.removeprefix(root))
        found = [str(path) for path in matches if path.is_file() and not path.name.startswith(".")]
        what = "a glob that matches no file"
    else:
        found, what = [], "no such file"
    if not found:
        raise PreprocessError(f"--input {pattern}: {what} (looked in {Path.cwd()}); check the path")
    return sorted(found)


def _is_document_file(path: Path) -> bool:
    name = path.name
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return not name.startswith(".") and (name.endswith(_SUFFIXES) or path.name.endswith(".parquet"))


def _inspect(name: str) -> InputFile:
    try:
        size = Path(name).stat().st_size
        with Path(name).open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        return InputFile(name=name, bytes=0, kind="unreadable", problem=error.strerror or str(error))
    kind: Kind = "plain"
    if head.startswith(b"\x1f\x8b"):
        kind = "gzip"
    elif head == b"\x28\xb5\x2f\xfd":
        kind = "zstd"
    elif head == b"PAR1":
        kind = "parquet"
    elif name.endswith((".parquet", *_COMPRESSED)):
        return InputFile(name=name, bytes=size, kind="unreadable", problem=f"its first bytes {head!r} belie its suffix")
    return InputFile(name=name, bytes=size, kind=kind)


def read_blocks(inputs: Sequence[InputFile], keys: Sequence[str], block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """All blocks of all files in order.

    Args:
        inputs: as returned by `expand_inputs`.
        keys: names the documents are read from, dots for nested ones; other Parquet columns are never decoded.
        block_bytes: about how much text one block holds.
    """
    for source, file in enumerate(inputs):
        if file.kind == "unreadable":
            yield Block(source, file.bytes, Unreadable(file.problem))
        elif file.kind == "plain":
            for start in range(0, file.bytes, block_bytes):
                stop = min(start + block_bytes, file.bytes)
                yield Block(source, stop - start, ByteRange(file.name, start, stop, file.bytes))
        elif file.kind == "parquet":
            yield from _parquet_blocks(source, file, keys)
        else:
            yield from _compressed_blocks(source, file, block_bytes)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _compressed_blocks(source: int, file: InputFile, block_bytes: int) -> Iterator[Block]:
    done = 0
    try:
        with Path(file.name).open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if file.kind == "gzip" else pa.CompressedInputStream(raw, "zstd")
            for lines in _whole_lines(stream, file.name, block_bytes):
                reached = raw.tell()
                yield Block(source, reached - done, Lines(lines))
                done = reached
    except (OSError, EOFError, zlib.error) as error:
        yield Block(source, file.bytes - done, Unreadable(f"the compressed stream is damaged: {error}"))


def _whole_lines(stream: _Readable, name: str, block_bytes: int) -> Iterator[bytes]:
    parts: list[bytes] = []
    held = 0
    while chunk := stream.read(block_bytes):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            yield b"".join((*parts, chunk[:cut]))
            parts, held = [], 0
        parts.append(chunk[cut:])
        held += len(chunk) - cut
        if held > MAX_LINE_BYTES:
            raise _line_too_long(name)
    if held:
        yield b"".join(parts)


def _line_too_long(name: str) -> PreprocessError:
    return PreprocessError(
        f"{name}: a line longer than {MAX_LINE_BYTES >> 20} MiB; JSONL has one document a line (a JSON array over the "
        "whole file is not JSONL): convert the file first"
    )


def _parquet_blocks(source: int, file: InputFile, keys: Sequence[str]) -> Iterator[Block]:
    done = rows = 0
    try:
        with pq.ParquetFile(file.name) as parquet:
            total = max(parquet.metadata.num_rows, 1)
            columns = tuple(parquet.schema_arrow.names)
            wanted = [key for key in keys if key.split(".")[0] in columns or key in columns]
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted, use_threads=False):
                rows += batch.num_rows
                reached = file.bytes * rows // total
                yield Block(source, reached - done, ArrowRows(_as_ipc(batch), columns))
                done = reached
    except (pa.ArrowException, OSError) as error:
        yield Block(source, file.bytes - done, Unreadable(f"not a whole Parquet file: {error}"))


def _as_ipc(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def lines_of(payload: ByteRange | Lines) -> list[bytes]:
    """The lines of a block without their newline.

    Raises:
        PreprocessError: the file changed size since the run began, or a line is too long.
    """
    try:
        data = payload.data if isinstance(payload, Lines) else _read_range(payload)
    except OSError as error:
        raise PreprocessError(
            f"{error.filename or payload}: {error.strerror}; mend the file or leave it out"
        ) from error
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _read_range(span: ByteRange) -> bytes:
    with Path(span.path).open("rb") as stream:
        size = stream.seek(0, 2)
        if size != span.file_bytes:
            raise PreprocessError(
                f"{span.path}: {size} bytes now, {span.file_bytes} when the run began; run again when nothing writes "
                "to it"
            )
        # one byte earlier: whether a line starts exactly at `start` is told by the newline before it
        stream.seek(max(span.start - 1, 0))
        data = stream.read(span.stop - stream.tell())
        if span.start:
            first = data.find(b"\n") + 1
            data = data[first:] if first else b""
        if data and not data.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES)
            if len(rest) == MAX_LINE_BYTES:
                raise _line_too_long(span.path)
            data += rest
    return data
