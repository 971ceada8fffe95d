"""Progress of a long reading on stderr: a bar on a terminal, a plain line every few seconds in a log."""

import threading
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_kaiyuan.host.console import SafeConsole

__all__ = ["ConsoleMeter"]

_SECONDS_BETWEEN_LINES = 10.0


class ConsoleMeter:
    """Progress of one stretch of work after another, safe to use from many threads."""

    def __init__(self) -> None:
        self._console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._lock = threading.Lock()
        self._what, self._total, self._done = "", 0, 0
        self._began = self._last = time.monotonic()

    def start(self, what: str, total: int) -> None:
        """Begin a stretch, with `total` in the unit of `advance`."""
        self._what, self._total, self._done = what, total, 0
        self._began = self._last = time.monotonic()
        if self._console.is_terminal:
            self._stop()
            columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(what, total=total)
            self._bar.start()

    def advance(self, amount: int) -> None:
        """Move the bar, or print a line when one is due."""
        with self._lock:
            self._done += amount
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done)
            elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                share = self._done / max(self._total, 1)
                left = (self._last - self._began) * (1 / max(share, 1e-9) - 1)
                self._console.print(f"{self._what}: {share:.0%}, about {left:,.0f} s left", markup=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
