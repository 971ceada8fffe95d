"""Signals that ask a training process to save and end: SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C."""

import os
import signal
from collections.abc import Iterable

__all__ = ["LAUNCHER_WAITS", "STOP_SIGNALS", "StopRequests", "end_at_interrupt", "ignore_stop_signals"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
LAUNCHER_WAITS = "KAIYUAN_LAUNCHER_WAITS"
"""Variable of a rank whose launcher waits, after a stop signal, until the rank has saved."""
_PATIENCE_OF_TORCHRUN = 20.0
"""Seconds, of the 30 that it has; the step comes before the save."""


class StopRequests:
    """Notes the first of these signals for the process that listens, and for no process that it forks."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self.number = 0
        """Of the first signal that came; 0: none has. It may change at any moment, and never back."""
        self.agreed = 0
        """Of the signal that all ranks know of; 0: none."""

    def listen(self, numbers: Iterable[int]) -> None:
        """Note these signals from now on. Under `nohup`, which ignores SIGHUP, SIGHUP stays ignored."""
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        if os.getpid() != self._owner:
            return  # a forked helper, which ends when its work or its parent does
        if number == signal.SIGINT:
            # A second Ctrl-C ends the process at once, even within a library that does not return to Python.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.number = self.number or number


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process silently until a handler is installed.

    By default Python would print a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def may_be_killed_after(seconds: float) -> bool:
    """Whether a launcher that is signalled kills this rank before so many seconds have passed, as torchrun does."""
    return "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHER_WAITS not in os.environ and seconds > _PATIENCE_OF_TORCHRUN


def ignore_stop_signals() -> None:
    """Ignore stop signals in a helper process, whose parent decides when to stop.

    A launcher signals the whole process group of a rank. A helper that ended would take the step or the checkpoint
    with it that the rank is about to finish.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
