"""From `--input` arguments to input files; and from files to the parts of each shard."""

import functools
import glob as globbing
import hashlib
import os
import stat
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_kaiyuan.errors import ConfigError, PreprocessError

__all__ = [
    "STDIN",
    "InputFile",
    "Kind",
    "Part",
    "PartNumbers",
    "cut_into_shards",
    "expand_inputs",
    "first_row",
    "keep_cut",
    "part_bytes",
    "refuse_output_among_inputs",
]

STDIN = "-"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
PARQUET_MAGIC = b"PAR1"
_SUFFIXES = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst")
_PROBE_BYTES = 4096
_OPENING_THREADS = 16
Kind = Literal["plain", "gzip", "zstd", "parquet", "stdin", "unreadable"]
PartNumbers = tuple[int, int, int | None]
"""A part as `build.json` has it: number of the input, start, stop."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file, its format found from its first bytes rather than its name."""

    name: str
    bytes: int
    kind: Kind
    problem: str = ""
    """Why it cannot be read, for kind `unreadable`."""
    probe: str = ""
    """Hash of its first and last 4 KiB: a file that was changed between two runs is very likely to have another."""


@dataclass(frozen=True, slots=True)
class Part:
    """A whole input file (`stop` is None), or a piece of it.

    Of a plain file a piece is the lines whose first byte lies in `[start, stop)`; of a Parquet file, row groups
    `start <= group < stop`.
    """

    file: InputFile
    start: int = 0
    stop: int | None = None


def expand_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """Files named by paths, globs and directories, in the order given and sorted by name within a glob or directory.

    Directories are searched recursively for .jsonl, .json and .ndjson, each also with .gz or .zst, and .parquet; a file
    named outright may have any name; `-` is standard input.

    Raises:
        PreprocessError: a pattern matches nothing, a file is named twice or is a pipe, or standard input is one of
            several.
    """
    if STDIN in patterns:
        if len(patterns) > 1:
            raise PreprocessError(f"--input {' '.join(patterns)}: standard input (-) is read alone; name files instead")
        return [InputFile(name=STDIN, bytes=0, kind="stdin")]
    names = [name for pattern in patterns for name in _expand(pattern)]
    seen: dict[str, str] = {}
    for name in names:
        resolved = os.path.realpath(name)  # of a link to itself too
        if resolved in seen:
            raise PreprocessError(
                f"--input: {name} is named twice (also as {seen[resolved]}); name each file once, repetition belongs "
                "in the plan"
            )
        seen[resolved] = name
    if len(names) == 1:
        return [_inspect(names[0])]
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:  # a network file system answers each question slowly
        return list(pool.map(_inspect, names))


def refuse_output_among_inputs(patterns: Sequence[str], output: Path) -> None:
    """A directory that is searched for input must not hold the output: the next start would read it as documents.

    Raises:
        ConfigError: `output`, the folder that is written to, lies in a directory of `patterns`.
    """
    for pattern in patterns:
        if pattern != STDIN and Path(pattern).is_dir() and output.resolve().is_relative_to(Path(pattern).resolve()):
            raise ConfigError(
                f"--input {pattern} is searched for documents, and the output goes to {output}, inside it: the next "
                "start would read manifests and tables as input; write to a folder outside, or name the input by a glob"
            )


def _expand(pattern: str) -> list[str]:
    if Path(pattern).is_dir():
        found = [str(path) for path in Path(pattern).rglob("*") if _is_document_file(path)]
        what = "a directory without .jsonl, .json, .ndjson (.gz, .zst) or .parquet files"
    elif Path(pattern).exists():
        return [pattern]
    elif globbing.has_magic(pattern):
        root = Path(pattern).anchor
        matches = Path(root).glob(pattern.removeprefix(root))
        # a link to nothing is a fault, a pipe is refused: neither is passed over
        found = [str(path) for path in matches if not path.is_dir() and not path.name.startswith(".")]
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
    if name.startswith(".") or not (name.endswith(_SUFFIXES) or path.name.endswith(".parquet")):
        return False
    return not path.is_dir()


def _refuse_pipe(name: str) -> None:
    if not stat.S_ISREG(Path(name).stat().st_mode):
        raise PreprocessError(
            f"--input {name}: a pipe or a device, not a file; it can be read only once: give `--input -` with "
            "--output-prefix, and the documents on standard input"
        )


def _inspect(name: str) -> InputFile:
    try:
        _refuse_pipe(name)  # before it is opened, which would wait for a writer
        with Path(name).open("rb") as stream:
            head = stream.read(_PROBE_BYTES)
            size = stream.seek(0, 2)
            stream.seek(max(size - _PROBE_BYTES, 0))
            probe = hashlib.sha256(head + stream.read(_PROBE_BYTES)).hexdigest()[:16]
    except OSError as error:
        return InputFile(name=name, bytes=0, kind="unreadable", problem=error.strerror or str(error))
    kind: Kind = "plain"
    if head.startswith(GZIP_MAGIC):
        kind = "gzip"
    elif head.startswith(ZSTD_MAGIC):
        kind = "zstd"
    elif head.startswith(PARQUET_MAGIC):
        kind = "parquet"
    elif name.endswith((".parquet", *_COMPRESSED)):
        problem = f"its first bytes {head[:4]!r} belie its suffix"
        return InputFile(name=name, bytes=size, kind="unreadable", problem=problem, probe=probe)
    return InputFile(name=name, bytes=size, kind=kind, probe=probe)


@functools.cache
def _group_rows(file: InputFile) -> tuple[int, ...]:
    """Rows of each row group of a Parquet file; none of one that cannot be read, which reading it will tell."""
    try:
        with pq.ParquetFile(file.name) as parquet:
            return tuple(parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))
    except (pa.ArrowException, OSError):
        return ()


def part_bytes(part: Part) -> int:
    """Its share of the file on disk; the shares of all parts of a file add up to the file."""
    if part.stop is None:
        return part.file.bytes
    if part.file.kind == "plain":
        return part.stop - part.start
    rows = _group_rows(part.file)
    before, after = (part.file.bytes * sum(rows[:edge]) // max(sum(rows), 1) for edge in (part.start, part.stop))
    return after - before


def first_row(part: Part) -> int | None:
    """Number in its file of the first row of a part; None where only reading all that stands before it would tell."""
    if part.start == 0:
        return 0
    return sum(_group_rows(part.file)[: part.start]) if part.file.kind == "parquet" else None


def cut_into_shards(inputs: Sequence[InputFile], shard_bytes: int) -> list[tuple[Part, ...]]:
    """Parts of each shard: about `shard_bytes` of input as it lies on disk, in order, nothing left out or twice.

    Plain files are cut at any byte, Parquet files between row groups; a compressed file is never cut, because reading
    it begins at its start. Small files share a shard.
    """
    shards: list[tuple[Part, ...]] = []
    current: list[Part] = []
    filled = 0
    for file in inputs:
        for part, size in _pieces(file, shard_bytes, shard_bytes - filled if current else shard_bytes):
            if current and filled + size > shard_bytes:
                shards.append(tuple(current))
                current, filled = [], 0
            current.append(part)
            filled += size
    if current:
        shards.append(tuple(current))
    return shards


def _pieces(file: InputFile, shard_bytes: int, room: int) -> list[tuple[Part, int]]:
    """Pieces of one file with their sizes; the first fits into `room`, where a plain file allows it."""
    if file.kind == "plain" and file.bytes > max(room, 0):
        edges = [0, *range(room, file.bytes, shard_bytes), file.bytes] if room > 0 else []
        edges = edges or [*range(0, file.bytes, shard_bytes), file.bytes]
        return [(Part(file, start, stop), stop - start) for start, stop in pairwise(edges)]
    if file.kind == "parquet" and file.bytes > shard_bytes:
        return _row_group_pieces(file, shard_bytes)
    return [(Part(file), file.bytes)]


def _row_group_pieces(file: InputFile, shard_bytes: int) -> list[tuple[Part, int]]:
    rows = _group_rows(file)
    total = max(sum(rows), 1)
    pieces: list[tuple[Part, int]] = []
    start = taken = 0
    for group, count in enumerate(rows):
        taken += count
        if file.bytes * taken // total >= shard_bytes or group == len(rows) - 1:
            pieces.append((Part(file, start, group + 1), file.bytes * taken // total))
            start, taken = group + 1, 0
    return pieces or [(Part(file), file.bytes)]


def keep_cut(
    cut: Sequence[Sequence[PartNumbers]], inputs: Sequence[InputFile], changed: Collection[int]
) -> list[tuple[Part, ...]] | None:
    """The parts of an earlier cut, for inputs some of which have changed since.

    A file that is cut keeps its edges as far as it reaches, and its last piece takes what was added. A piece behind
    its new end is empty. None where a changed file can no longer be cut: compressed now, or not to be read.
    """
    last = {number: (shard, place) for shard, parts in enumerate(cut) for place, (number, _, _) in enumerate(parts)}
    pieces = {number for parts in cut for number, _, stop in parts if stop is not None}
    ends = {number: _end(inputs[number]) for number in pieces & set(changed)}
    if None in ends.values():
        return None
    return [
        tuple(
            _kept(Part(inputs[number], start, stop), ends.get(number), is_last=last[number] == (shard, place))
            for place, (number, start, stop) in enumerate(parts)
        )
        for shard, parts in enumerate(cut)
    ]


def _end(file: InputFile) -> int | None:
    """Where the last piece of a file ends, in bytes or row groups; None for a file that is never cut."""
    if file.kind == "parquet":
        return len(_group_rows(file)) or None
    return file.bytes if file.kind == "plain" else None


def _kept(part: Part, end: int | None, *, is_last: bool) -> Part:
    if end is None or part.stop is None:
        return part
    return Part(part.file, min(part.start, end), end if is_last else min(part.stop, end))
