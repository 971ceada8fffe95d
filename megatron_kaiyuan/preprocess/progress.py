"""Progress of a long run on stderr: a bar on a terminal, plain lines in a log."""

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.preprocess.pipeline import Progress as Done

__all__ = ["ConsoleReporter"]

_SECONDS_BETWEEN_LINES = 10.0


class ConsoleReporter:
    """Reports documents, megabytes of input a second, and the time left.

    Args:
        log_interval: documents between two lines where stderr is no terminal; None: a line every 10 seconds.
    """

    def __init__(self, log_interval: int | None = None) -> None:
        self._console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)
        self._log_interval = log_interval
        self._bar: Progress | None = None
        self._total = 0
        self._began = self._last_time = time.monotonic()
        self._last_documents = 0

    def start(self, total_bytes: int) -> None:
        """Begin to count time."""
        self._total = total_bytes
        self._began = self._last_time = time.monotonic()
        if self._console.is_terminal and total_bytes:
            columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("tokenizing", total=total_bytes, rate="")
            self._bar.start()

    def note(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, markup=False)

    def update(self, progress: Done) -> None:
        """Move the bar, or print a line when one is due."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=progress.input_bytes, rate=self._rate(progress))
        elif self._is_due(progress):
            self._last_time, self._last_documents = time.monotonic(), progress.documents
            elapsed = time.monotonic() - self._began
            done = f"{counted(progress.documents, 'document')}, {progress.input_bytes / 1e6:,.1f}"
            if self._total:
                left = elapsed * (self._total / max(progress.input_bytes, 1) - 1)
                self.note(f"tokenizing: {done} of {self._total / 1e6:,.1f} MB, {self._rate(progress)}, {_left(left)}")
            else:  # standard input
                self.note(f"tokenizing: {done} MB, {self._rate(progress)}")

    def _is_due(self, progress: Done) -> bool:
        if self._log_interval is not None:
            return progress.documents - self._last_documents >= self._log_interval
        return time.monotonic() - self._last_time >= _SECONDS_BETWEEN_LINES

    def _rate(self, progress: Done) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        return f"{progress.documents / elapsed:,.0f} documents/s, {progress.input_bytes / 1e6 / elapsed:,.2f} MB/s"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _left(seconds: float) -> str:
    return f"about {max(seconds, 0):,.0f} s left"
