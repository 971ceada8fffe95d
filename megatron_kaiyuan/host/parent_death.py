"""Processes that end when the process that started them does, however it ended."""

import ctypes
import multiprocessing
import os
import signal

from megatron_kaiyuan.host.stop_signals import ignore_stop_signals

__all__ = ["become_helper", "die_with_launcher", "die_with_parent"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have Linux send this process SIGKILL when its parent is gone.

    To be called in the child, as an initializer. A parent that gets SIGKILL, or leaves by `os._exit`, cannot end its
    children itself. It counts as gone when the thread that started the child ends.
    """
    _ask_for_death()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before the request
        os._exit(1)


def become_helper() -> None:
    """Make this process a helper of the rank that started it: it ends with the rank, and a stop signal is not its."""
    ignore_stop_signals()
    die_with_parent()


def die_with_launcher() -> None:
    """End this rank when its `torchrun` ends.

    A process that no launcher of torch started goes on as it is. A launcher that gets SIGKILL cannot end its ranks,
    which would train on with nobody to stop them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _ask_for_death()


def _ask_for_death() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
