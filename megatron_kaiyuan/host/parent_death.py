"""Helper processes that end when the process that started them does, however it ended."""

import ctypes
import multiprocessing
import os
import signal

__all__ = ["die_with_parent"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have Linux send this process SIGKILL when its parent is gone; to be called in the child, as an initializer.

    A parent that gets SIGKILL, or leaves by `os._exit`, cannot end its children itself. It counts as gone when the
    thread that started the child ends.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before the request
        os._exit(1)
