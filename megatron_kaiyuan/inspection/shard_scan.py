"""Reading every byte of one shard: its checksums, whether its tokens are in range and its scores are numbers."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_kaiyuan.shards.shard_files import read_scores_in_chunks

__all__ = ["TokenScan", "count_missing_scores", "hash_file", "scan_tokens"]

_BLOCK_BYTES = 1 << 22


def hash_file(path: Path, advance: Callable[[int], None]) -> str:
    """Sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    for block in _blocks(path, advance):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TokenScan:
    """What reading a `.bin` once has shown."""

    sha256: str
    largest: int
    """Largest id, a negative one counted as what its bits mean without a sign; -1 for no tokens."""
    outside: int
    """Ids outside the vocabulary."""
    first_outside: int
    """Where the first of them stands, in tokens; -1 for none."""


def scan_tokens(path: Path, dtype: np.dtype[np.generic], vocab_size: int, advance: Callable[[int], None]) -> TokenScan:
    """Hash a `.bin` and look for ids that are negative or not below `vocab_size`, in one pass."""
    digest = hashlib.sha256()
    unsigned = np.dtype(f"u{dtype.itemsize}")
    largest = first_outside = -1
    outside = before = 0
    for block in _blocks(path, advance):
        digest.update(block)
        tokens = np.frombuffer(block, unsigned, len(block) // unsigned.itemsize)
        here = int(tokens.max(initial=0))
        largest = max(largest, here) if len(tokens) else largest
        if here >= vocab_size:
            wrong = tokens >= vocab_size
            outside += int(wrong.sum())
            first_outside = before + int(wrong.argmax()) if first_outside < 0 else first_outside
        before += len(tokens)
    return TokenScan(digest.hexdigest(), largest, outside, first_outside)


def count_missing_scores(path: Path, documents: int) -> tuple[int, int]:
    """How many scores of a sidecar are NaN, and the first document among them (-1 for none).

    Raises:
        ScoreError: not a whole `.npy` file, or not one number for each document.
    """
    missing = seen = 0
    first = -1
    for scores in read_scores_in_chunks(path, documents):
        nan = np.isnan(scores)
        if nan.any() and first < 0:
            first = seen + int(nan.argmax())
        missing += int(nan.sum())
        seen += len(scores)
    return missing, first


def _blocks(path: Path, advance: Callable[[int], None]) -> Iterator[memoryview]:
    """The bytes of a file in blocks, each valid until the next one is asked for."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while size := _fill(stream.readinto, buffer):
            yield buffer[:size]
            advance(size)


def _fill(readinto: Callable[[memoryview], int | None], buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends, so that a block never cuts a token in two."""
    size = 0
    while size < len(buffer) and (read := readinto(buffer[size:])):
        size += read
    return size
