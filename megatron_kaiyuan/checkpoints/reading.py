"""Reading and writing Megatron's `torch_dist` checkpoints tensor by tensor, in one process, without building a model.

A checkpoint is a folder `iter_0001000` of a save directory. Its `.metadata` names every tensor with its whole shape,
whatever the parallel layout of the run that wrote it, and `torch.distributed.checkpoint` reads any of them whole.
Objects that are not tensors are copied as stored bytes and never unpickled, but for the common state that holds the
run's arguments; it and `.metadata` are opened as data, see `safe_loading`.
"""

import argparse
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from megatron_kaiyuan.checkpoints.checksums import sum_file, write_checksums
from megatron_kaiyuan.checkpoints.damage import COMMON_STATE, DESCRIPTION_NAME, LEGACY_COMMON_STATE, check_format
from megatron_kaiyuan.checkpoints.safe_loading import load_object, load_stored, read_metadata, readable
from megatron_kaiyuan.errors import CheckpointError, ConfigError
from megatron_kaiyuan.host.atomic import publish_folder

__all__ = [
    "TRACKER_NAME",
    "Checkpoint",
    "Tracker",
    "find_checkpoints",
    "iteration_folder",
    "new_checkpoint_folder",
    "open_checkpoint",
    "output_conflict",
    "read_tracker",
    "saved_iterations",
    "single_process",
    "write_checkpoint",
]

TRACKER_NAME = "latest_checkpointed_iteration.txt"
"""File of a save directory that names the iteration Megatron loads."""

_FOLDER = re.compile(r"iter_([0-9]{7,18})")
_ITERATION = re.compile(r"[0-9]{1,18}")
_NOT_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state")
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


class _RawLoadPlanner(DefaultLoadPlanner):
    """Keeps objects as the bytes that are stored."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = value


class _RawSavePlanner(DefaultSavePlanner):
    """Stores bytes as they are given."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object if write_item.type == WriteItemType.BYTE_IO else super().transform_object(write_item, object)


class _CachedReader(FileSystemReader):
    """Reads `.metadata` once: it is needed for every group of tensors."""

    @cached_property
    def _metadata(self) -> Metadata:
        try:
            metadata = read_metadata(Path(self.path) / ".metadata")
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


@dataclass(frozen=True)
class Checkpoint:
    """One `torch_dist` checkpoint on disk."""

    folder: Path
    iteration: int

    @cached_property
    def reader(self) -> FileSystemReader:
        """Reader of the folder's files."""
        return _CachedReader(self.folder)

    @cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return whole shape and dtype of each tensor of the model, by tensor name."""
        stored = self.reader.read_metadata().state_dict_metadata
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in sorted(stored.items())
            if isinstance(entry, TensorStorageMetadata) and not _NOT_MODEL.match(name)
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the model's tensors."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """Names of the stored objects that belong to the model (extra states), and of the common state."""
        stored = self.reader.read_metadata().state_dict_metadata
        return tuple(
            name
            for name, entry in sorted(stored.items())
            if isinstance(entry, BytesStorageMetadata) and not _NOT_MODEL.match(name)
        )

    @cached_property
    def arguments(self) -> argparse.Namespace:
        """Arguments of the run that wrote the checkpoint.

        Raises:
            CheckpointError: they are damaged, or name something else than data.
            ConfigError: the checkpoint has none.
        """
        common = self._common_state()
        arguments = common.get("args") if isinstance(common, dict) else None
        if not isinstance(arguments, argparse.Namespace):
            raise ConfigError(f"{self.folder}: holds no arguments of a run; it was not written by megatron.training")
        return arguments

    def _common_state(self) -> Any:
        legacy = self.folder / LEGACY_COMMON_STATE
        try:
            if legacy.is_file():
                return load_object(io.BytesIO(legacy.read_bytes()), LEGACY_COMMON_STATE)
            stored = load_stored(self._load_raw([COMMON_STATE])[COMMON_STATE], COMMON_STATE)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder} {error}") from error
        return stored[0] if isinstance(stored, list) and stored else None

    def load_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Load these tensors whole, on the CPU, in their stored dtype."""
        state = {name: torch.empty(self.tensors[name][0], dtype=self.tensors[name][1]) for name in names}
        with single_process(), readable(self.folder):
            load_checkpoint(state, storage_reader=self.reader, planner=_RawLoadPlanner(False, False), no_dist=True)
        return state

    def load_objects(self) -> dict[str, io.BytesIO]:
        """Stored bytes of all `objects`."""
        return self._load_raw(self.objects)

    def _load_raw(self, names: Iterable[str]) -> dict[str, io.BytesIO]:
        known = set(self.objects)
        missing = [name for name in names if name not in known]
        if missing:
            raise ConfigError(f"{self.folder}: has no {missing[0]}; it was not written by megatron.training")
        state: dict[str, io.BytesIO] = {name: io.BytesIO() for name in names}
        with single_process(), readable(self.folder):
            load_checkpoint(state, storage_reader=self.reader, planner=_RawLoadPlanner(False, False), no_dist=True)
        return state


@contextmanager
def single_process() -> Iterator[None]:
    """For loading and saving without a process group."""
    with warnings.catch_warnings():
        # It says that one process loads alone, which is what is asked for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def iteration_folder(directory: Path, iteration: int) -> Path:
    """Folder of an iteration in a save directory."""
    return directory / f"iter_{iteration:07d}"


def saved_iterations(directory: Path) -> list[int]:
    """Return the iterations with a folder in a save directory, whole or not, ascending.

    None of them where there is no such directory.
    """
    if not directory.is_dir():
        return []
    return sorted(
        int(match[1]) for entry in directory.iterdir() if entry.is_dir() and (match := _FOLDER.fullmatch(entry.name))
    )


@dataclass(frozen=True, slots=True)
class Tracker:
    """What the tracker of a save directory says."""

    text: str | None
    """None: there is none."""

    @property
    def iteration(self) -> int | None:
        """Return the iteration that the tracker names.

        None where it names none, because it is missing, damaged or `release`.
        """
        return int(self.text) if self.text is not None and _ITERATION.fullmatch(self.text) else None


def read_tracker(directory: Path) -> Tracker:
    """Read the tracker of a save directory.

    Bytes that are no text stay visible in what it says.
    """
    path = directory / TRACKER_NAME
    return Tracker(path.read_text(encoding="utf-8", errors="backslashreplace").strip() if path.is_file() else None)


def output_conflict(output: Path, iteration: int, *, like: str | None = None) -> str | None:
    """Return why a checkpoint may not be written into a save directory and become its latest.

    None if it may.

    Args:
        output: The directory, which need not exist.
        iteration: Of the checkpoint.
        like: Checkpoints of other iterations may be there if they have this file; None: none may.
    """
    if iteration_folder(output, iteration).exists():
        return f"{iteration_folder(output, iteration).name} exists; remove it or name another directory"
    present = saved_iterations(output)
    for other in (iteration_folder(output, number) for number in present):
        if like is None or not (other / like).is_file():
            return f"holds {other.name}, another checkpoint; name a new directory"
    tracker = read_tracker(output)
    if tracker.text is not None and tracker.iteration not in (iteration, *present):
        return f"{TRACKER_NAME} there names {tracker.text!r}, another checkpoint; name a new directory"
    return None


def find_checkpoints(directory: Path, iterations: Sequence[int] | None = None) -> list[Checkpoint]:
    """Complete checkpoints of a save directory, oldest first.

    Args:
        directory: What `--save` named.
        iterations: Those to open, each of which must be there; default: all.

    Raises:
        ConfigError: no such directory, nothing in it, or a folder without its metadata (an unfinished save).
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; give the directory that --save named")
    found = saved_iterations(directory) if iterations is None else sorted(iterations)
    if not found:
        raise ConfigError(f"{directory}: holds no iter_* folder; give the directory that --save named")
    checkpoints = [Checkpoint(iteration_folder(directory, iteration), iteration) for iteration in found]
    for checkpoint in checkpoints:
        _check_format(checkpoint.folder)
    return checkpoints


def _check_format(folder: Path) -> None:
    try:
        check_format(folder)
    except CheckpointError as error:
        raise ConfigError(f"{folder} {error}; restore it from a copy, remove it, or name another checkpoint") from error


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], objects: Mapping[str, io.BytesIO], files: Mapping[str, bytes]
) -> None:
    """Write a checkpoint that Megatron loads, whole or not at all.

    Args:
        folder: `iter_*` folder; must not exist.
        tensors: Whole tensors of the model by name.
        objects: Stored bytes as `Checkpoint.load_objects` gives them.
        files: More small files to put beside, content by name.
    """
    with new_checkpoint_folder(folder, files) as unfinished, single_process():
        save_checkpoint(
            {**tensors, **objects},
            storage_writer=FileSystemWriter(unfinished, thread_count=1),
            planner=_RawSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )


@contextmanager
def new_checkpoint_folder(folder: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Open a folder to write a checkpoint into, which takes the name `folder` when the block ends well.

    Args:
        folder: `iter_*` folder; must not exist.
        files: Small files to put beside, content by name; Megatron's description of the format is added, and the
            checksums of all.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    _remove_files(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    for name, content in {**files, DESCRIPTION_NAME: json.dumps(_BACKEND).encode()}.items():
        (unfinished / name).write_bytes(content)
    write_checksums(unfinished, {path.name: sum_file(path) for path in unfinished.iterdir()})
    publish_folder(unfinished, folder)


def _remove_files(folder: Path) -> None:
    """Remove what an interrupted write left."""
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an `iter_*` folder, or the checkpoint that a save directory's tracker names.

    Raises:
        ConfigError: there is none, it is not in `torch_dist` format, or its `metadata.json` is torn.
    """
    tracker, folder = read_tracker(path), path
    if tracker.text is not None:
        if tracker.iteration is None:
            raise ConfigError(f"{path / TRACKER_NAME}: says {tracker.text!r}, not an iteration; name an iter_* folder")
        folder = iteration_folder(path, tracker.iteration)
    match = _FOLDER.fullmatch(folder.name)
    if match is None or not folder.is_dir():
        raise ConfigError(
            f"{path}: no checkpoint; give an iter_* folder, or a save directory with {TRACKER_NAME} "
            f"(looked for {folder})"
        )
    _check_format(folder)
    return Checkpoint(folder, int(match[1]))
