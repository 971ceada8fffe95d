"""Writing a checkpoint: no helper process, a reason when it fails, and no beginning of what does not fit."""

import errno
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_kaiyuan.checkpoints import writing
from megatron_kaiyuan.errors import SaveError
from tests.helpers import files_end_at


def bucket(path: Path, values: torch.Tensor) -> Any:
    chunk = ChunkStorageMetadata(torch.Size([0]), values.size())
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(values), values.size())
    item = WriteItem(MetadataIndex(path.name), WriteItemType.TENSOR, tensor_data=data)
    return str(path), path.name, ([], [(item, values)])


def write(*buckets: Any) -> Any:
    results = writing.results_queue(asynchronous=False)
    writing.write_buckets([_StorageWriterTransforms()], False, 0, buckets, results)
    return results.get_nowait()


def test_a_save_of_the_rank_itself_has_no_helper_process(tmp_path: Path) -> None:
    before = multiprocessing.active_children()
    written = write(bucket(tmp_path / "a", torch.arange(5)), bucket(tmp_path / "b", torch.ones(3)))

    assert multiprocessing.active_children() == before
    assert [[result.index.fqn for result in written[number]] for number in (0, 1)] == [["a"], ["b"]]
    assert torch.load(tmp_path / "a").tolist() == [0, 1, 2, 3, 4]


def test_a_full_disk_is_named_with_the_bytes_that_are_needed_and_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12))

    error = write(bucket(tmp_path / "a", torch.zeros(250)))

    assert str(error) == (
        f"{tmp_path / 'a'}: No space left on device: the file needs 5,096 bytes, the disk has 12 free"
    )


def test_a_full_disk_is_named_wherever_in_the_file_it_ends(tmp_path: Path) -> None:
    """torch writes an archive: where its last part does not fit, it complains of an `unexpected pos` instead."""
    path, values = tmp_path / "a", torch.zeros(10_000)
    write(bucket(path, values))
    size = path.stat().st_size
    for room in range(0, size, size // 40):
        path.unlink(missing_ok=True)
        with files_end_at(room):
            error = write(bucket(path, values))
        assert str(error).startswith(f"{path}: File too large: the file needs "), (room, error)


def test_another_failure_keeps_its_own_words(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a"

    error = write(bucket(path, torch.zeros(1)), bucket(tmp_path / "b", torch.zeros(1)))

    assert str(error) == f"{path}: FileNotFoundError: [Errno 2] No such file or directory: '{path}'"


@pytest.mark.parametrize("other_needs", [0, 3000], ids=["fits", "does not"])
def test_a_save_that_does_not_fit_is_refused_by_the_bytes_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_needs: int
) -> None:
    """This rank writes 1,000 bytes of numbers; another one sees a disk with room for these alone."""
    room = 1000 + 4096

    def reduced(value: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        value.copy_(value + other_needs if op == torch.distributed.ReduceOp.SUM else value.clamp(max=room))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    buckets = [bucket(tmp_path / "a", torch.zeros(250))]

    if not other_needs:
        writing.check_space(tmp_path, buckets)
        return
    with pytest.raises(SaveError, match=rf"{tmp_path}: no space left .* needs 8,096 bytes, 5,096 are free"):
        writing.check_space(tmp_path, buckets)
