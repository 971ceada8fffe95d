"""What ended a rank, in one sentence where the cause is known and no fault of the program's."""

import errno
import os
import re
import traceback
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kaiyuan.errors import DeviceError, KaiyuanError, MetricsError, SaveError, TrainingStopped
from megatron_kaiyuan.host.cut_files import which_are_cut, why_bus_error
from megatron_kaiyuan.host.terminal import visible

__all__ = ["Failure", "failure_of"]

_WORKER_GONE = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (is killed by signal: [\w ]+|exited unexpectedly)"
)
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a rank by an exception."""

    text: str
    """One sentence; a traceback where the cause is not known."""
    is_told_here: bool = True
    """Whether this rank prints it."""
    is_consequence: bool = False
    """Another rank failed before, and its text says why."""


def failure_of(error: BaseException) -> Failure:
    """Describe the exception that ended this rank."""
    text = str(error)
    if isinstance(error, KaiyuanError):
        return Failure(f"{type(error).__name__}: {visible(_without_worker(error))}", _tells(error))
    if found := _WORKER_GONE.search(text):
        is_bus_error = "Bus error" in found[2]  # often torch has not seen by which signal it died
        if (cut := why_bus_error() if is_bus_error else which_are_cut()) is not None:
            return Failure(f"a data loader worker (process {found[1]}) ended: {cut}")
        return Failure(
            f"a data loader worker (process {found[1]}) {found[2]}: if no line above says why, the machine most likely "
            "ran out of memory. Lower --num-workers or ask for more memory, and start again"
        )
    if isinstance(error, torch.distributed.DistError) or any(lost in text for lost in _LOST):
        rank = os.environ.get("RANK", "0")
        return Failure(
            f"rank {rank} lost another rank ({text.splitlines()[0]}): that rank says why, or its host is gone",
            is_consequence=True,
        )
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return Failure(f"{type(error).__name__}: {error}: make room or mend the disk, and start again")
    if isinstance(error, CheckpointException) and not error.failures:
        return Failure("a checkpoint was not written or read: rank 0 says why", is_told_here=False, is_consequence=True)
    return Failure("".join(traceback.format_exception(error)).rstrip())


def _without_worker(error: KaiyuanError) -> str:
    """Return the message without the traceback that a loader worker puts before it.

    A worker sends its error as one text.
    """
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker" in text.splitlines()[0]:
        return text.rpartition(f"{type(error).__name__}: ")[2].rstrip()
    return text


def _tells(error: KaiyuanError) -> bool:
    """Whether this process prints the error.

    All ranks detect what is wrong before the start, and one a host prints it: files may be missing on one of them only.
    One rank alone looks at a metrics file, and once training has begun each rank reads its own samples.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, DeviceError | MetricsError):
        return True
    if isinstance(error, SaveError | TrainingStopped):
        return error.of_one_rank
    return torch.distributed.is_initialized()
