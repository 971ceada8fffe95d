"""Files that became shorter while they were mapped: reading on is SIGBUS, which ends a process without a word.

So it is where a shard is copied again under a running job, or its disk lost the end of a file. Who opens a file notes
its size; who gets the signal, or sees a helper die of it, compares.
"""

import ctypes
import os
import shutil
import signal
from pathlib import Path

from megatron_kaiyuan.host.endings import record_reason
from megatron_kaiyuan.host.terminal import counted

__all__ = ["leave_bus_errors_to_parent", "name_cut_files", "note_size", "which_are_cut", "why_bus_error"]

_SHARED_MEMORY = Path("/dev/shm")
_SHOWN = 3

_sizes: dict[str, int] = {}
"""Bytes that a file has to have, by its path."""
_kept: list[object] = []
"""What the kernel calls must not be collected."""


def note_size(path: str | os.PathLike[str], size: int) -> None:
    """Note that a file has at least so many bytes as long as this process reads it."""
    path = os.fspath(path)
    _sizes[path] = max(size, _sizes.get(path, 0))


def which_are_cut() -> str | None:
    """Return a sentence that names files shorter than they were, and what to do.

    None: none is.
    """
    cut = [told for path, size in list(_sizes.items()) if (told := _told(path, size))]
    if not cut:
        return None
    more = f", and {len(cut) - _SHOWN} more files" if len(cut) > _SHOWN else ""
    return (
        f"{'; '.join(cut[:_SHOWN])}{more}: cut short while the run read it. Copy it again, leave it alone until the "
        "run has ended, and go on from the last checkpoint"
    )


def why_bus_error() -> str:
    """Say in a sentence why the kernel sent SIGBUS, as far as the files' sizes show, and what to do."""
    if (cut := which_are_cut()) is not None:
        return cut
    free = f" ({_shared_memory()} bytes free)" if _SHARED_MEMORY.is_dir() else ""
    return (
        "a bus error (SIGBUS): every file of the data is as long as it was, so a disk does not answer, or "
        f"{_SHARED_MEMORY} is full{free}; mend that, and go on from the last checkpoint"
    )


def name_cut_files() -> None:
    """Let SIGBUS end this process with `why_bus_error()`, which torchrun then reports, and exit code 1.

    The kernel sends it to the thread that reads the map, in the midst of a copy of numpy or torch. Python's own
    handlers would wait for the copy to end, which it never does; this one is called there and then.
    """
    if _kept:
        return
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
    _kept.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))


def leave_bus_errors_to_parent() -> None:
    """Let SIGBUS end this process silently: its parent names the file. torch would name shared memory as the cause."""
    signal.signal(signal.SIGBUS, signal.SIG_DFL)


def _shared_memory() -> str:
    return f"{shutil.disk_usage(_SHARED_MEMORY).free:,}"


def _told(path: str, size: int) -> str:
    try:
        now = os.stat(path).st_size  # noqa: PTH116 - a signal handler makes as few objects as it can
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return f"{path} has {counted(now, 'byte')} and had {size:,}" if now < size else ""


def _end(_number: int) -> None:
    try:
        text = f"BusError: {why_bus_error()}"
        os.write(2, f"{text}\n".encode())
        record_reason(text)
    finally:
        os._exit(1)
