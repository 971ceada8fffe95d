"""Input files from `--input` arguments, and the parts of each shard from the files."""

import functools
import hashlib
import os
import stat
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_kaiyuan.errors import ConfigError, PreprocessError
from megatron_kaiyuan.preprocess.formats import Kind, recognise
from megatron_kaiyuan.preprocess.input_search import (
    DOCUMENT_SUFFIXES,
    HIDDEN,
    OTHER_SUFFIX,
    SEARCHED_ALREADY,
    Search,
    search,
)

__all__ = [
    "STDIN",
    "InputFile",
    "Part",
    "PartNumbers",
    "cut_into_shards",
    "describe_left_out",
    "find_inputs",
    "first_row",
    "keep_cut",
    "part_bytes",
    "refuse_output_among_inputs",
]

STDIN = "-"
_PROBE_BYTES = 4096
_OPENING_THREADS = 16
PartNumbers = tuple[int, int, int | None]
"""A part as `build.json` has it: number of the input, start, stop."""
_MOST_NAMED = 8
"""Entries that are named of each reason for leaving them out, at the start."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file, whose first bytes and not its name decide its format."""

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


def find_inputs(patterns: Sequence[str]) -> tuple[list[InputFile], Search]:
    """Return the files that paths, globs and folders name, and what the search left out.

    Files come in the order of the patterns, sorted by name within a glob or folder. A folder is searched recursively,
    links followed, for .jsonl, .json and .ndjson, each also compressed, and .parquet; a file named outright may have
    any name; `-` is standard input.

    Raises:
        PreprocessError: a pattern matches nothing, a file is named twice, is a pipe or has a name that is not UTF-8,
            or standard input is one of several.
    """
    if STDIN in patterns:
        if len(patterns) > 1:
            raise PreprocessError(f"--input {' '.join(patterns)}: standard input (-) is read alone; name files instead")
        return [InputFile(name=STDIN, bytes=0, kind="stdin")], Search()
    found = Search()
    for pattern in patterns:
        found.add(_search(pattern))
    for name in found.files:
        _check_name(name)
    with ThreadPoolExecutor(min(_OPENING_THREADS, len(found.files) or 1)) as pool:  # a network file system is slow
        _leave_out_same_files(found, list(pool.map(_identity, found.files)))
        files = list(pool.map(_inspect, found.files))
    files += [InputFile(name, 0, "unreadable", problem) for name, problem in found.unreadable.items()]
    return files, found


def refuse_output_among_inputs(found: Search, output: Path) -> None:
    """Refuse to write into a folder that is searched for input: the next start would read the output as documents.

    Raises:
        ConfigError: `output`, the folder that is written to, lies in a folder that was searched.
    """
    real = output.resolve()
    for folder in found.folders:
        if real.is_relative_to(folder):
            raise ConfigError(
                f"--input: the folder {folder} is searched for documents, and the output goes to {output}, inside it: "
                "the next start would read manifests and tables as input; write to a folder outside, or name the input "
                "by a glob"
            )


def _search(pattern: str) -> Search:
    found = search(pattern)
    if found.files or found.unreadable:
        return found
    what = "no such file"
    if found.folders:
        what = f"a folder without {', '.join(DOCUMENT_SUFFIXES)} (also .gz, .zst, .bz2, .xz, .lz4) or .parquet files"
    elif any(character in pattern for character in "*?["):
        what = "a glob that matches no file"
    raise PreprocessError(
        f"--input {pattern}: {what}{describe_left_out(found)} (looked in {Path.cwd()}); check the path"
    )


def describe_left_out(found: Search) -> str:
    """Return a clause that counts and names what a search left out, empty where it left out nothing."""
    reasons = {OTHER_SUFFIX: "with another suffix", HIDDEN: "hidden", SEARCHED_ALREADY: "searched already"}
    told = []
    for reason, names in found.left_out.items():
        more = ", ..." if len(names) > _MOST_NAMED else ""
        told.append(f"{len(names):,} {reasons[reason]} ({', '.join(names[:_MOST_NAMED])}{more})")
    return f", left out: {'; '.join(told)}" if told else ""


def _check_name(name: str) -> None:
    """Refuse a name that no manifest can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PreprocessError(
            f"--input {os.fsencode(name)!r}: the name is not UTF-8, so no manifest can record it; rename the file"
        ) from None


def _identity(name: str) -> tuple[int, int] | str:
    """Return what distinguishes a file from all others, whatever links lead to it."""
    try:
        status = os.stat(name)  # noqa: PTH116
    except OSError:  # a link to nothing, or to itself
        return os.path.realpath(name)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(name)


def _leave_out_same_files(found: Search, identities: Sequence[tuple[int, int] | str]) -> None:
    """Read a file once that a search meets again behind a linked folder, and refuse one that is named twice.

    Raises:
        PreprocessError: a file is named twice, or lies twice in the folders themselves.
    """
    named = list(zip(found.files, identities, strict=True))
    seen: dict[tuple[int, int] | str, str] = {}
    for name, identity in named:
        if name in found.behind_links:
            continue
        if identity in seen:
            raise PreprocessError(
                f"--input: {name} is named twice (also as {seen[identity]}, by its path or by a link); name each file "
                "once, repetition belongs in the plan"
            )
        seen[identity] = name
    again = {name for name, identity in named if name in found.behind_links and seen.setdefault(identity, name) != name}
    for name in sorted(again):
        found.leave_out(SEARCHED_ALREADY, name)
    found.files = [name for name in found.files if name not in again]


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
            tail = stream.read(_PROBE_BYTES)
    except OSError as error:
        return InputFile(name=name, bytes=0, kind="unreadable", problem=error.strerror or str(error))
    kind, problem = recognise(name, head, tail)
    probe = hashlib.sha256(head + tail).hexdigest()[:16]
    return InputFile(name=name, bytes=size, kind=kind, problem=problem, probe=probe)


@functools.cache
def _group_rows(file: InputFile) -> tuple[int, ...]:
    """Return the rows of each row group of a Parquet file, none of one that cannot be read.

    Reading it will report why.
    """
    try:
        with pq.ParquetFile(file.name) as parquet:
            return tuple(parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))
    except (pa.ArrowException, OSError):
        return ()


def part_bytes(part: Part) -> int:
    """Return a part's share of its file on disk, in bytes.

    The shares of all parts of a file add up to the file.
    """
    if part.stop is None:
        return part.file.bytes
    if part.file.kind == "plain":
        return part.stop - part.start
    rows = _group_rows(part.file)
    before, after = (part.file.bytes * sum(rows[:edge]) // max(sum(rows), 1) for edge in (part.start, part.stop))
    return after - before


def first_row(part: Part) -> int | None:
    """Return the number in its file of a part's first row.

    None where it is known only after reading all that stands before it.
    """
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
    """Return the pieces of one file with their sizes.

    The first fits into `room`, where a plain file allows it.
    """
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
    """Return where the last piece of a file ends, in bytes or row groups.

    None for a file that is never cut.
    """
    if file.kind == "parquet":
        return len(_group_rows(file)) or None
    return file.bytes if file.kind == "plain" else None


def _kept(part: Part, end: int | None, *, is_last: bool) -> Part:
    if end is None or part.stop is None:
        return part
    return Part(part.file, min(part.start, end), end if is_last else min(part.stop, end))
