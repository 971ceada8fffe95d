"""The files of a source as a directory listing shows them, and reading them in pieces of bounded size."""

import glob as globbing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.score_files import check_score_shape, open_npy
from megatron_kaiyuan.shards.shard import INDEX_HEADER, Shard

__all__ = [
    "CHUNK",
    "Meter",
    "ShardFiles",
    "SilentMeter",
    "find_leftovers",
    "list_shard_files",
    "read_lengths",
    "read_numbers",
    "read_scores_in_chunks",
]

CHUNK = 1 << 20
"""Documents read at once."""
_TEMPORARY_PARTS = (".rank.", ".npy.")


class Meter(Protocol):
    """Hears how far a long reading has come."""

    def start(self, what: str, total: int) -> None:
        """Begin a meter before the first piece, with `total` in the unit of `advance`."""

    def advance(self, amount: int) -> None:
        """After every piece, from any thread."""


class SilentMeter:
    """A meter that nobody reads."""

    def start(self, what: str, total: int) -> None:
        """Nothing."""

    def advance(self, amount: int) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """What lies beside each other under one prefix."""

    prefix: str
    bin: Path
    idx: Path
    manifest: Path
    has_manifest: bool
    sidecars: Mapping[str, Path]
    """Score sidecars by score name, sorted."""

    @property
    def documents(self) -> Path:
        """Return the path of the table of where documents come from.

        Only shards of tools/preprocess_data.py have one.
        """
        return self.bin.with_suffix(".documents.parquet")


def list_shard_files(prefixes: Sequence[str]) -> list[ShardFiles]:
    """List the files of these shards.

    Each folder is read once, however many shards it holds.
    """
    folders = {folder: _names(folder) for folder in {Path(prefix).parent for prefix in prefixes}}
    sidecars = {folder: _sidecars(folder, names) for folder, names in folders.items()}
    found = []
    for prefix in prefixes:
        path = Path(prefix)
        manifest = path.with_name(f"{path.name}.manifest.json")
        found.append(
            ShardFiles(
                prefix=prefix,
                bin=path.with_name(f"{path.name}.bin"),
                idx=path.with_name(f"{path.name}.idx"),
                manifest=manifest,
                has_manifest=manifest.name in folders[path.parent],
                sidecars=sidecars[path.parent].get(path.name, {}),
            )
        )
    return found


def find_leftovers(shards: Sequence[str], files: Sequence[ShardFiles]) -> list[Path]:
    """What interrupted builds left in the folders, directories or globs that named the shards.

    These are partial and temporary files, and `.bin` files of a directory without an `.idx`.
    """
    known = {entry.bin for entry in files}
    found = []
    for item in shards:
        folder = Path(item)
        if folder.is_dir():
            found += [path for name in _names(folder) if _is_leftover(path := folder / name, known)]
        else:
            start = item if globbing.has_magic(item) else globbing.escape(item)
            names = globbing.glob(f"{start.removesuffix('.idx').removesuffix('.bin')}.*")  # noqa: PTH207
            found += [Path(name) for name in names if name.endswith(".partial")]
    return sorted(set(found))


def read_numbers(path: Path, dtype: np.dtype[Any], count: int, offset: int) -> Iterator[NDArray[Any]]:
    """`count` numbers from byte `offset` on, in arrays of at most `CHUNK`.

    Raises:
        EOFError: the file ends early.
    """
    with path.open("rb") as stream:
        stream.seek(offset)
        for first in range(0, count, CHUNK):
            wanted = min(CHUNK, count - first)
            numbers = np.fromfile(stream, dtype, wanted)
            if len(numbers) < wanted:
                raise EOFError(f"{path}: ends after {first + len(numbers)} of {counted(count, 'number')}")
            yield numbers


def read_lengths(shard: Shard) -> Iterator[NDArray[np.int32]]:
    """Tokens of each document, in arrays of at most `CHUNK`."""
    return read_numbers(Path(f"{shard.prefix}.idx"), np.dtype(np.int32), shard.documents, INDEX_HEADER.size)


def read_scores_in_chunks(path: Path, documents: int) -> Iterator[NDArray[np.floating]]:
    """Scores of a sidecar, in arrays of at most `CHUNK`.

    Raises:
        ScoreError: not a whole `.npy` file, or not one number for each document.
    """
    mapped = open_npy(path, os.fspath(path))
    check_score_shape(mapped, documents, os.fspath(path))
    dtype, offset = mapped.dtype, int(mapped.offset)
    del mapped  # read through a buffer instead: mapped pages would count as this process's memory
    return read_numbers(path, dtype, documents, offset)


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208


def _sidecars(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    found: dict[str, dict[str, Path]] = {}
    for name in names:
        base, separator, rest = name.partition(".scores.")
        if separator and rest.endswith(".npy") and not name.startswith("."):
            found.setdefault(base, {})[rest.removesuffix(".npy")] = folder / name
    return found


def _is_leftover(path: Path, known: set[Path]) -> bool:
    if path.name.endswith(".partial"):
        return True
    if path.name.startswith("."):  # temporary names of rank indexes and imported scores
        return any(part in path.name for part in _TEMPORARY_PARTS)
    return path.suffix == ".bin" and path not in known and not path.with_suffix(".idx").exists()
