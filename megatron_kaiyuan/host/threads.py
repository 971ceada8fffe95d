"""Waiting for many files at once: a network file system answers each question slowly, but many at a time.

Threads live for one call only. Threads that stayed would be there when a data loader forks its workers.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["side_by_side"]

_THREADS = 16
_MOST_AT_ONCE = 8  # items a thread takes at a time: warm files are read faster than a thread is handed its next item

_own = threading.local()


def side_by_side[Item, Result](
    work: Callable[[Item], Result], items: Sequence[Item], most: int = _THREADS
) -> list[Result]:
    """Return `[work(item) for item in items]`, computed several at a time.

    The error raised is that of the first item that has one. Called from within `work` it starts no further threads, so
    that nested calls stay at 16 threads in all.

    Args:
        work: called once for each item.
        items: as `work` takes them.
        most: how many at a time, if fewer than 16; 1: one after the other, in this thread.
    """
    if len(items) < 2 or most < 2 or getattr(_own, "busy", False):
        return [work(item) for item in items]
    size = max(1, min(_MOST_AT_ONCE, len(items) // _THREADS))
    pieces = [items[first : first + size] for first in range(0, len(items), size)]
    with ThreadPoolExecutor(min(most, _THREADS, len(pieces)), initializer=_mark_busy) as pool:
        done = pool.map(lambda piece: [work(item) for item in piece], pieces)
        return [result for piece in done for result in piece]


def _mark_busy() -> None:
    _own.busy = True
