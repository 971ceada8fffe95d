"""Writing the files of a checkpoint: without a helper process, with the reason of a failure, never into a full disk."""

import errno
import multiprocessing
import os
import queue
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import async_utils
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_kaiyuan.errors import SaveError
from megatron_kaiyuan.host.parent_death import become_helper
from megatron_kaiyuan.host.terminal import counted

__all__ = ["check_space", "results_queue", "write_buckets"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BYTES_AN_ITEM = 4096
"""More than the header and the padding that torch writes around a tensor."""


def results_queue(*, asynchronous: bool) -> Any:
    """Return a queue for what a save has written.

    Megatron starts a process for it, half a gigabyte large, which a signal to the rank's process group kills: the next
    save then fails. Where the rank itself writes, the queue needs no process.
    """
    if not asynchronous:
        return queue.Queue()
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=become_helper)
    return manager.Queue()


@async_utils._disable_gc()  # type: ignore[untyped-decorator]
def write_buckets(transforms: Any, use_msc: bool, _rank: int, buckets: Sequence[Any], results: Any) -> None:  # noqa: FBT001
    """Write each bucket of a save into its file.

    Puts `{number: what was written}` or the error into `results`. Megatron's own function loses the error: it reports
    the type, or ends the rank with an assertion.
    """
    if multiprocessing.parent_process() is not None:
        become_helper()

    def write(number: int) -> Any:
        _, written = FileSystemWriterAsync.write_preloaded_data(
            transforms,
            local_proc_idx=number,
            write_bucket=buckets[number],
            results_queue=None,
            count_queue=None,
            use_fsync=True,
            use_msc=use_msc,
        )
        return written

    with ThreadPoolExecutor(max(1, len(buckets))) as pool:
        outcomes = list(pool.map(write, range(len(buckets))))
    for bucket, outcome in zip(buckets, outcomes, strict=True):
        if isinstance(outcome, Exception):
            results.put(OSError(_why_not_written(Path(bucket[0]), _size(bucket), outcome)))
            return
    results.put(dict(enumerate(outcomes)))


def check_space(folder: Path, buckets: Sequence[Any]) -> None:
    """Refuse, on all ranks alike, to begin a save that does not fit the disk.

    Args:
        folder: Of the checkpoint; it exists.
        buckets: What this rank is going to write.

    Raises:
        SaveError: names the folder, the bytes that all ranks need, and the bytes that are free.
    """
    device = torch.cuda.current_device()
    needed = torch.tensor(sum(map(_size, buckets)), dtype=torch.int64, device=device)
    free = torch.tensor(shutil.disk_usage(folder).free, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(needed)
    torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
    if needed > free:
        raise SaveError(
            f"{folder}: no space left for this checkpoint: it needs {counted(int(needed), 'byte')}, {free.item():,} "
            "are free"
        )


def _size(bucket: Any) -> int:
    """Bytes of a bucket on disk, at most."""
    _, _, (streams, tensors) = bucket
    content = sum(stream.getbuffer().nbytes for _, stream in streams)
    content += sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    return int(content) + _BYTES_AN_ITEM * (len(streams) + len(tensors))


def _why_not_written(path: Path, size: int, error: Exception) -> str:
    number = _cause(error)
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else size
    if number in _FULL or free < size:
        reason = os.strerror(number or errno.ENOSPC)
        return f"{path}: {reason}: the file needs {counted(size, 'byte')}, the disk has {free:,} free"
    return f"{path}: {type(error).__name__}: {error}"


def _cause(error: BaseException) -> int | None:
    """Return the number of the disk's first error.

    torch raises a fault of its archive (`unexpected pos`) over it.
    """
    found = None
    below: BaseException | None = error
    while below is not None:
        found = below.errno if isinstance(below, OSError) else found
        below = below.__cause__ or below.__context__
    return found
