"""What is wrong with the files of a checkpoint: from its small files alone, or from every byte.

Reasons begin with a verb ("has no .metadata"); the caller puts the folder in front.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_kaiyuan.checkpoints.checksums import (
    CHECKSUMS_ARGUMENT,
    CHECKSUMS_NAME,
    FileSum,
    find_difference,
    read_checksums,
)
from megatron_kaiyuan.checkpoints.safe_loading import load_object, load_stored, one_line, read_metadata
from megatron_kaiyuan.errors import CheckpointError
from megatron_kaiyuan.host.terminal import counted

__all__ = [
    "COMMON_STATE",
    "DESCRIPTION_NAME",
    "LEGACY_COMMON_STATE",
    "METADATA_NAME",
    "Verified",
    "Verifier",
    "check_format",
    "damage",
    "is_legacy",
    "verify",
]

METADATA_NAME = ".metadata"
"""Pickled list of all tensors and where they are."""
DESCRIPTION_NAME = "metadata.json"
"""Format of the checkpoint; written last."""
LEGACY_COMMON_STATE = "common.pt"
"""File with the run's arguments and counters in checkpoints of Megatron before 0.19, which keeps them in an object."""
COMMON_STATE = "common_state/shard_0_1"
_BACKEND = "torch_dist"
_PART_NAME = re.compile(r"[\w-][\w.-]*")
"""Of a file in the folder of the checkpoint."""
_ARCHIVE_START, _ARCHIVE_END, _END_LENGTH = b"PK\x03\x04", b"PK\x05\x06", 22
"""Of everything that `torch.save` writes: a zip archive without a comment."""


_verified: dict[Path, tuple[tuple[str, int, int], ...]] = {}
"""Name, size and time of change of the files that this process has compared with their checksums, by folder."""


Verifier = Callable[[Path], "Verified"]
"""Looks at a checkpoint: `verify`, or something that shows its progress meanwhile."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The findings of `verify`."""

    damage: str | None
    """None: the checkpoint can be loaded."""
    files: int = 0
    """Compared with their checksums; 0: the checkpoint has none, and only its form was looked at."""
    num_bytes: int = 0

    def __str__(self) -> str:
        if self.damage is not None:
            return self.damage
        if not self.files:
            return f"not verified: it has no {CHECKSUMS_NAME}, as checkpoints of stock Megatron and earlier versions"
        return f"verified: {counted(self.files, 'file')}, {self.num_bytes / 1e9:,.2f} GB, as they were saved"


def damage(folder: Path) -> str | None:
    """Say why a `torch_dist` checkpoint cannot be loaded, from its small files and the form of the others.

    Sums are compared for the small files only: see `verify`. Reads no tensor.

    Returns:
        The reason; None if there is none.
    """
    if not folder.is_dir():
        return "is missing"
    try:
        check_format(folder)
        sums = read_checksums(folder)
        if sums is not None:
            _check_small_files(folder, sums)
        metadata = read_metadata(folder / METADATA_NAME)
        if sums is None:
            _check_form(folder, metadata)
        else:
            _check_listed(folder, metadata, sums)
        state = _common_state(folder, metadata)
        if sums is None and getattr(state.get("args"), CHECKSUMS_ARGUMENT, False):
            return f"has no {CHECKSUMS_NAME}, with which it was saved"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def verify(folder: Path, progress: Callable[[int], None] = lambda _bytes: None) -> Verified:
    """Compare every file of a checkpoint with its checksum.

    A process reads a checkpoint once, and again only if its files have other sizes or times since.

    Args:
        folder: Of the checkpoint.
        progress: Called with the bytes of each step, from several threads.
    """
    reason = damage(folder)
    sums = None if reason else read_checksums(folder)
    if sums is None:
        return Verified(reason)
    found = Verified(None, len(sums), sum(expected.bytes for expected in sums.values()))
    seen = _look_of(folder, sums)
    if _verified.get(folder.resolve()) != seen:
        if difference := find_difference(folder, sums, progress):
            return Verified(difference[1])
        _verified[folder.resolve()] = seen
    return found


def _look_of(folder: Path, names: Iterable[str]) -> tuple[tuple[str, int, int], ...]:
    found = [(name, (folder / name).stat()) for name in sorted({*names, CHECKSUMS_NAME})]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found)


def check_format(folder: Path) -> None:
    """Refuse a folder that is no complete `torch_dist` checkpoint.

    Raises:
        CheckpointError: a file that is written last is missing, or names another format.
    """
    if is_legacy(folder):
        raise CheckpointError("is in Megatron's legacy format: train on with --ckpt-format torch")
    for name in (DESCRIPTION_NAME, METADATA_NAME):
        if not (folder / name).is_file():
            raise CheckpointError(f"has no {name}: its save did not end, or it is not in torch_dist format")
    try:
        description = json.loads((folder / DESCRIPTION_NAME).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a {DESCRIPTION_NAME} that is unreadable ({error})") from error
    backend = description.get("sharded_backend") if isinstance(description, dict) else None
    if backend != _BACKEND:
        raise CheckpointError(f"has a {DESCRIPTION_NAME} of backend {backend!r}; only {_BACKEND} can be read")


def is_legacy(folder: Path) -> bool:
    """Whether a checkpoint is in the format of `--ckpt-format torch`, one folder for each model-parallel rank."""
    return any(folder.glob("mp_rank_*"))


def _check_small_files(folder: Path, sums: dict[str, FileSum]) -> None:
    """What is opened first is as it was saved, and the rest has its size."""
    small = {name: sums[name] for name in (DESCRIPTION_NAME, METADATA_NAME, LEGACY_COMMON_STATE) if name in sums}
    if difference := find_difference(folder, small):
        raise CheckpointError(difference[1])
    for name, expected in sorted(sums.items()):
        _check_size(folder, name, expected.bytes)


def _check_listed(folder: Path, metadata: Metadata, sums: dict[str, FileSum]) -> None:
    """Nothing is read that has no checksum."""
    _check_entries(metadata)
    read = {METADATA_NAME, DESCRIPTION_NAME, *_sizes_needed(metadata)}
    if (folder / LEGACY_COMMON_STATE).exists():
        read.add(LEGACY_COMMON_STATE)
    if unknown := sorted(read - sums.keys()):
        raise CheckpointError(f"has a {unknown[0]} that {CHECKSUMS_NAME} does not list: it was not saved with the rest")


def _check_form(folder: Path, metadata: Metadata) -> None:
    """Without checksums: every entry makes sense, and every stored item is an archive in its place."""
    sizes = _sizes_needed(metadata)
    _check_entries(metadata)
    places: dict[str, set[tuple[int, int]]] = {name: set() for name in sorted(sizes)}
    for place in metadata.storage_data.values():
        places[place.relative_path].add((place.offset, place.length))
    for name, spans in places.items():
        _check_size(folder, name, sizes[name])
        with (folder / name).open("rb") as stream:
            for offset, length in sorted(spans):
                stream.seek(offset)
                start = stream.read(len(_ARCHIVE_START))
                stream.seek(offset + length - _END_LENGTH)
                if start != _ARCHIVE_START or stream.read(len(_ARCHIVE_END)) != _ARCHIVE_END:
                    raise CheckpointError(f"has other bytes than a tensor in {name} at byte {offset:,}")


def _check_size(folder: Path, name: str, size: int) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"has no {name}")
    if path.stat().st_size < size:
        raise CheckpointError(f"has only {path.stat().st_size:,} of {counted(size, 'byte')} in {name}")


def _sizes_needed(metadata: Metadata) -> dict[str, int]:
    """Return the bytes that each file must have at least, by file name.

    Raises:
        CheckpointError: the list of places makes no sense.
    """
    needed: dict[str, int] = {}
    with _sensible():
        for index, place in metadata.storage_data.items():
            name, end = place.relative_path, place.offset + place.length
            if not _are_counts((place.offset, place.length - _END_LENGTH)) or not isinstance(index, MetadataIndex):
                raise CheckpointError(f"has a {METADATA_NAME} with a place that makes no sense ({place!r:.100})")
            if not isinstance(place, _StorageInfo) or not _PART_NAME.fullmatch(name):
                raise CheckpointError(f"has a {METADATA_NAME} that points outside its folder ({name!r:.100})")
            needed[name] = max(needed.get(name, 0), end)
    return needed


def _check_entries(metadata: Metadata) -> None:
    """Every tensor has a shape, and every piece of it a place."""
    with _sensible():
        for name, entry in metadata.state_dict_metadata.items():
            if missing := [index for index in _indices(name, entry) if index not in metadata.storage_data]:
                raise CheckpointError(f"has a {METADATA_NAME} that does not say where {missing[0].fqn!r:.100} is")


@contextmanager
def _sensible() -> Iterator[None]:
    """Other types than expected are damage."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"has a {METADATA_NAME} that makes no sense ({one_line(error)})") from error


def _indices(name: str, entry: object) -> list[MetadataIndex]:
    """Under which keys the places of an entry are stored."""
    if isinstance(entry, BytesStorageMetadata):
        return [MetadataIndex(name)]
    if not isinstance(entry, TensorStorageMetadata):
        raise TypeError(f"{name} is a {type(entry).__name__}")
    sound = isinstance(entry.properties.dtype, torch.dtype) and _are_counts(entry.size) and len(entry.chunks) > 0
    for chunk in entry.chunks:
        spans = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        sound = sound and _are_counts((*chunk.offsets, *chunk.sizes))
        sound = sound and all(offset + size <= whole for offset, size, whole in spans)
    if not sound:
        raise ValueError(f"the shape of {name}")
    return [MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]


def _are_counts(values: tuple[object, ...]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _common_state(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Load every object beside the tensors, as a start does, and return the run's arguments and counters.

    Raises:
        CheckpointError: one is damaged or names something else than data, or there are no arguments.
    """
    stored: Any = None
    objects = [name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    for name in objects:
        place = metadata.storage_data[MetadataIndex(name)]
        with (folder / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            value = load_stored(io.BytesIO(stream.read(place.length)), name, place.relative_path)
        stored = value if name == COMMON_STATE else stored
    legacy = folder / LEGACY_COMMON_STATE
    if legacy.exists():
        with legacy.open("rb") as stream:
            stored = [load_object(stream, LEGACY_COMMON_STATE)]
    state = stored[0] if isinstance(stored, list) and stored else None
    if not isinstance(state, dict):
        raise CheckpointError("has no arguments of a run: it was not written by megatron.training")
    return state
