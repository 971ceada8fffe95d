"""How a training process ends: within seconds, with its exit code, and with nothing left running."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

__all__ = ["end_helpers", "end_process", "record_reason"]

_SECONDS = 5
"""For the last words of a process that ends with an error."""


def end_helpers() -> None:
    """Kill the processes that this one started through `multiprocessing`: loader workers and whatever writes for it.

    Python joins them when it exits, and waits for ever for one that ignores SIGTERM.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports a killed worker as a failure
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(timeout=1.0)


def end_process(code: int, *last_words: Callable[[], object]) -> NoReturn:
    """End this process now, whatever libraries, threads and helpers it still has.

    Python's own exit waits for them: for a collective of a rank that is gone, for a thread that writes to a full disk.

    Args:
        code: Exit code.
        *last_words: Called one after the other, for five seconds in all; what they raise is dropped.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS)  # the kernel ends the process where a call does not return
    for say in (*last_words, end_helpers, _flush_output):
        with contextlib.suppress(Exception):
            say()
    os._exit(code)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):  # None where it was closed before the start
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def record_reason(reason: str, *, is_consequence: bool = False) -> None:
    """Leave the reason of a failure where `torchrun` looks for it, which reports the earliest of all ranks.

    Args:
        reason: One sentence, or a traceback.
        is_consequence: Another rank failed before and knows the reason.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    when = int(time.time()) + (60 if is_consequence else 0)
    message = {"message": reason, "extraInfo": {"py_callstack": reason, "timestamp": str(when)}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": message}))
