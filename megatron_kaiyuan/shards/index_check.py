"""Check that an `.idx`'s arrays agree with each other, and its bytes with the manifest.

All of it is read.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.files import open_regular
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.shard import INDEX_HEADER, Shard
from megatron_kaiyuan.shards.shard_files import read_lengths, read_numbers

__all__ = ["CHECKED_BYTES", "check_indexes", "index_faults", "read_boundaries", "require_sound_index"]

CHECKED_BYTES = 1 << 28
"""Indexes of a start are read in whole while they are no larger together: some 13 million documents, below a second."""
_BLOCK_BYTES = 1 << 20


def check_indexes(shards: Sequence[Shard]) -> bool:
    """Compare every `.idx` with its manifest, or its arrays with each other where there is none.

    Returns:
        Whether they were compared; larger ones are not, see `CHECKED_BYTES`.

    Raises:
        ShardError: an index differs, with its name.
    """
    if sum(shard.index_bytes for shard in shards) > CHECKED_BYTES:
        return False
    side_by_side(_check_index, shards)
    return True


def require_sound_index(shard: Shard) -> None:
    """Raise ShardError where the index of one shard is damaged, whatever its size."""
    _check_index(shard)


def _check_index(shard: Shard) -> None:
    path = f"{shard.prefix}.idx"
    expected = shard.record.idx_sha256 if shard.record else None
    problem = next(index_faults(shard), None)
    if problem is None and expected is not None:
        digest = _sha256(path)
        if digest != expected:
            problem = (
                f"sha256 {digest[:16]}..., its manifest says {expected[:16]}...: bits have flipped, or the two are of "
                "different shards"
            )
    if problem is not None:
        raise ShardError(
            f"{path}: {problem}; the file is damaged: copy it again or rebuild the shard ({tool('inspect')} "
            "--verify says more)"
        )


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def index_faults(shard: Shard, *, one_each: bool = False) -> Iterator[str]:
    """Say what is inconsistent in the arrays of an `.idx`, one sentence each.

    Args:
        shard: its index is read in whole.
        one_each: with as many documents as sequences, report boundaries that are not one sequence apart; an empty
            document beside one of two sequences is odd, but no more than that.
    """
    end = bad_lengths = bad_pointers = first = 0
    examples: dict[str, str] = {}
    for lengths, pointers in zip(read_lengths(shard), _read_pointers(shard), strict=True):
        ends = pointers + lengths.astype(np.int64) * shard.dtype.itemsize
        wrong = pointers != np.concatenate([[end], ends[:-1]])
        negative = lengths < 0
        if negative.any() and not bad_lengths:
            at = int(negative.argmax())
            examples["length"] = f"document {first + at:,} has {int(lengths[at])}"
        if wrong.any() and not bad_pointers:
            at = int(wrong.argmax())
            examples["pointer"] = f"document {first + at:,} begins at byte {int(pointers[at]):,}"
            examples["end"] = f"{int(ends[at - 1]) if at else end:,}"
        bad_lengths += int(negative.sum())
        bad_pointers += int(wrong.sum())
        end, first = int(ends[-1]), first + len(lengths)
    if bad_lengths:
        yield f"negative lengths: {bad_lengths:,}, the first: {examples['length']}"
    if bad_pointers:
        yield (
            f"documents that do not begin where the one before ends: {bad_pointers:,}, the first: "
            f"{examples['pointer']}, not at {examples['end']}"
        )
    if fault := _boundary_fault(shard, one_each=one_each and shard.boundaries == shard.documents + 1):
        yield fault


def read_boundaries(shard: Shard) -> NDArray[np.int64]:
    """Sequences before each document as the index counts them, int64 `[boundaries]`."""
    return np.concatenate(list(_boundaries_in_pieces(shard)))


def _read_pointers(shard: Shard) -> Iterator[NDArray[np.int64]]:
    place = INDEX_HEADER.size + 4 * shard.documents
    return read_numbers(Path(f"{shard.prefix}.idx"), np.dtype(np.int64), shard.documents, place)


def _boundaries_in_pieces(shard: Shard) -> Iterator[NDArray[np.int64]]:
    place = INDEX_HEADER.size + 12 * shard.documents
    return read_numbers(Path(f"{shard.prefix}.idx"), np.dtype(np.int64), shard.boundaries, place)


def _boundary_fault(shard: Shard, *, one_each: bool) -> str:
    bad = first = before = 0
    for stored in _boundaries_in_pieces(shard):
        expected = np.arange(first, first + len(stored))
        earlier = np.concatenate([[before], stored[:-1]])
        wrong = stored != expected if one_each else (stored < earlier) | (stored > shard.documents)
        bad += int(wrong.sum())
        first, before = first + len(stored), int(stored[-1])
    if not bad:
        return ""
    told = "that are not one sequence apart" if one_each else "that do not ascend"
    return f"document boundaries {told}: {bad:,}"
