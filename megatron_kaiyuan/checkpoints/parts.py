"""Parts of a `torch_dist` checkpoint's tensors, read and written so that memory holds a layer and not the model."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from megatron_kaiyuan.checkpoints.reading import Checkpoint, single_process
from megatron_kaiyuan.checkpoints.safe_loading import readable
from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.host.terminal import counted

__all__ = ["LazyTensor", "read_rows", "row_groups", "write_parts"]


class _RowsPlanner(DefaultLoadPlanner):
    """Reads rows `[first, first + n)` of one tensor, whatever pieces it was stored in."""

    def __init__(self, name: str, first: int, rows: Tensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._name, self._rows = name, rows
        self._offsets = (first, *(0 for _ in rows.shape[1:]))
        self.num_read = 0

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        wanted = ChunkStorageMetadata(torch.Size(self._offsets), self._rows.shape)
        stored: Any = self.metadata.state_dict_metadata[self._name]
        items = create_read_items_for_chunk_list(self._name, stored, [wanted])
        self.num_read = sum(item.lengths.numel() for item in items)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = self._rows
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(dimension, offset, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: the tensor is a view of the result."""


def read_rows(checkpoint: Checkpoint, name: str, first: int, end: int) -> Tensor:
    """Rows `[first, end)` of a tensor, in its stored dtype, on the CPU.

    Raises:
        ConvertError: the stored pieces do not cover them.
    """
    shape, dtype = checkpoint.tensors[name]
    rows = torch.empty((end - first, *shape[1:]), dtype=dtype)
    planner = _RowsPlanner(name, first, rows)
    with single_process(), readable(checkpoint.folder):
        load_checkpoint({name: rows}, storage_reader=checkpoint.reader, planner=planner, no_dist=True)
    if planner.num_read != rows.numel():
        raise ConvertError(
            f"{checkpoint.folder}: {name}: {planner.num_read:,} of {counted(rows.numel(), 'value')} are stored; the "
            "checkpoint "
            "is incomplete, convert another one"
        )
    return rows


def row_groups(checkpoint: Checkpoint, name: str) -> list[tuple[int, int]]:
    """Ranges of rows, each as short as its stored pieces allow: reading these ranges reads every piece once."""
    stored: Any = checkpoint.reader.read_metadata().state_dict_metadata[name]
    spans = sorted({(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in stored.chunks})
    groups: list[tuple[int, int]] = []
    for first, end in spans:
        if groups and first < groups[-1][1]:
            groups[-1] = (groups[-1][0], max(end, groups[-1][1]))
        else:
            groups.append((first, end))
    return groups


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor to write: its form, and how to make each of its pieces when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Sequence[Callable[[], Tensor]]
    """Of equal shape, along the first dimension; one = the whole tensor."""


class _LazyPlanner(DefaultSavePlanner):
    """Asks for each piece when it is written, and forgets it then."""

    def __init__(self, tensors: Mapping[str, LazyTensor], objects: Mapping[str, io.BytesIO]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._objects = tensors, objects

    def create_local_plan(self) -> SavePlan:
        items = [item for name, tensor in self._tensors.items() for item in _pieces_to_write(name, tensor)]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return self._objects[index.fqn]
        tensor = self._tensors[index.fqn]
        assert index.offset is not None
        piece = tensor.pieces[index.offset[0] * len(tensor.pieces) // tensor.shape[0]]()
        return piece.contiguous()


def _pieces_to_write(name: str, tensor: LazyTensor) -> Iterable[WriteItem]:
    rows = tensor.shape[0] // len(tensor.pieces)
    size = torch.Size((rows, *tensor.shape[1:]))
    for number in range(len(tensor.pieces)):
        offsets = torch.Size((number * rows, *(0 for _ in tensor.shape[1:])))
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, size), TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape)
        )
        yield WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


def write_parts(folder: Path, tensors: Mapping[str, LazyTensor], objects: Mapping[str, io.BytesIO]) -> None:
    """Write tensors piece by piece into the files of a checkpoint.

    Args:
        folder: Exists; receives `.metadata` and the data.
        tensors: Whole tensors by name.
        objects: Stored bytes by name.
    """
    with single_process():
        save_checkpoint(
            dict.fromkeys((*tensors, *objects)),
            storage_writer=FileSystemWriter(folder, thread_count=1),
            planner=_LazyPlanner(tensors, objects),
            no_dist=True,
        )
