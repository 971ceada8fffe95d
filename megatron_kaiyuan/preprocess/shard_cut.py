"""Which parts of the input each shard is built from.

The cut is a function of the list of files and the size of a shard alone, so every task of a job array finds the same
one without talking to the others. A build that goes on after a file was mended keeps the cut it began with: else a
file that is a byte longer would move the edges of all shards behind it, and nothing that is finished could stay.
"""

import functools
from collections.abc import Collection, Sequence
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_kaiyuan.preprocess.inputs import InputFile, Part

__all__ = ["PartNumbers", "cut_into_shards", "first_row", "keep_cut", "part_bytes"]

PartNumbers = tuple[int, int, int | None]
"""A part as `build.json` has it: number of the input, start, stop."""


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
