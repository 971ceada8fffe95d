"""How Megatron writes and opens the files of checkpoints here: as data, with checksums, and so that they stay.

Changes made to Megatron 0.19 and torch 2.11 from outside, each with its reason; `training/compat.py` has the others.
Import this after `cpu_platform.install()`. A second call of any of them changes nothing.
"""

import argparse
import functools
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_kaiyuan.checkpoints.checksums import (
    CHECKSUMS_ARGUMENT,
    SummedFile,
    collect_sums,
    sum_bytes,
    sum_file,
    write_checksums,
)
from megatron_kaiyuan.checkpoints.damage import DESCRIPTION_NAME, LEGACY_COMMON_STATE, METADATA_NAME
from megatron_kaiyuan.checkpoints.reading import TRACKER_NAME
from megatron_kaiyuan.checkpoints.safe_loading import load_object, load_stored, read_metadata, readable
from megatron_kaiyuan.errors import CheckpointError
from megatron_kaiyuan.host.atomic import write_text_atomically

__all__ = ["open_checkpoints_as_data", "write_checkpoints_to_stay"]


def open_checkpoints_as_data() -> None:
    """Let no file of a checkpoint run code, and say in a sentence what is wrong with one that cannot be read.

    Megatron refuses foreign classes in `common.pt` alone, and that only unless `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` is
    set. torch unpickles `.metadata` and the objects beside the tensors, where the run's arguments are, without any
    look, so starting a run on a folder, or evaluating it, would do what the files say.
    """
    # Read by torch.load alone, where the caller did not say what it wants; with it files may run code.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
    serialization.load_common = _load_common
    for name in ("load", "load_common_state_dict"):
        function = getattr(dist_checkpointing, name)
        if not hasattr(function, "__wrapped__"):
            setattr(dist_checkpointing, name, _told_in_a_sentence(function))


def _read_metadata(self: Any, *_args: Any, **_kwargs: Any) -> Metadata:
    try:
        metadata = read_metadata(Path(self.path) / METADATA_NAME)
    except CheckpointError as error:
        raise CheckpointError(f"{self.path} {error}") from error
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: Any, read_item: ReadItem, value: io.BytesIO) -> None:
    name = read_item.dest_index.fqn
    try:
        loaded = load_stored(value, name)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {error}") from error
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def _load_common(checkpoint_dir: str) -> Any:
    path = Path(checkpoint_dir) / LEGACY_COMMON_STATE
    try:
        return load_object(io.BytesIO(path.read_bytes()), LEGACY_COMMON_STATE)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{checkpoint_dir} {error}") from error


def _told_in_a_sentence(function: Any) -> Any:
    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        folder = kwargs.get("checkpoint_dir") or args[-1 if len(args) < 2 else 1]
        with readable(Path(folder)):
            return function(*args, **kwargs)

    return told


def write_checkpoints_to_stay(args: argparse.Namespace) -> None:
    """Write the checksum of every file with the checkpoint, and force each file and its name to disk in order.

    The order is: tensors, `.metadata`, `checksums.json`, `metadata.json`, tracker. Megatron leaves the last two, and
    all names, to the operating system, and writes them in place: a power failure, or a kill at the wrong moment,
    leaves a tracker that names a checkpoint without its files, or that is empty.

    Args:
        args: Megatron's validated arguments; every checkpoint says with them that it was written with checksums.
    """
    from megatron.training import checkpointing  # of training alone: tools do without

    setattr(args, CHECKSUMS_ARGUMENT, not args.enable_msc)  # an object store has checksums of its own
    original = TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def callbacks(self: Any, writer: Any, results: Any, async_strategy: str) -> Any:
        paths = [Path(bucket[0]) for bucket in writer.write_buckets or ()]
        request = original(self, writer, results, async_strategy)
        if writer.use_msc:
            return request
        if async_strategy == "mcore" and request.async_fn is not None:  # a synchronous save too is of this kind
            request = request._replace(async_fn=partial(_write_summed, request.async_fn))
        description = _description(CheckpointingConfig(self.backend, self.version))
        request.finalize_fns.append(partial(_finish, Path(writer.checkpoint_dir), paths, description))
        return request

    TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks = callbacks
    serialization.save_config = _save_config
    checkpointing.maybe_msc = _DurableTracker(checkpointing.maybe_msc)


def _write_summed(write: Any, *args: Any, **kwargs: Any) -> Any:
    """Write in this process, or in a helper that knows none of these changes, and sum up meanwhile."""
    filesystem_async.open = _open_summed  # hides Python's own in that module
    return write(*args, **kwargs)


def _open_summed(path: str, mode: str) -> Any:
    return SummedFile(Path(path)) if mode == "wb" else Path(path).open(mode)


def _finish(folder: Path, paths: list[Path], description: str) -> None:
    """Called on all ranks when all have written their files and rank 0 has written `.metadata`."""
    own = collect_sums(paths)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    torch.distributed.gather_object(own, gathered)
    if gathered is not None:
        sums = {name: found for part in gathered for name, found in part.items()}
        sums[METADATA_NAME] = sum_file(folder / METADATA_NAME)
        sums[DESCRIPTION_NAME] = sum_bytes(description.encode())
        write_checksums(folder, sums)


def _description(config: CheckpointingConfig) -> str:
    return json.dumps(asdict(config))


def _save_config(config: CheckpointingConfig, checkpoint_dir: str) -> None:
    write_text_atomically(Path(checkpoint_dir) / DESCRIPTION_NAME, _description(config))


class _DurableTracker:
    """Megatron's access to files, but that the tracker is replaced as a whole and is on disk then."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    @contextmanager
    def open(self, path: str, mode: str = "r") -> Iterator[Any]:
        """As `open`."""
        if mode != "w" or Path(path).name != TRACKER_NAME or "://" in str(path):
            with self._files.open(path, mode) as stream:
                yield stream
            return
        content = io.StringIO()
        yield content
        write_text_atomically(Path(path), content.getvalue())
