"""One rule for what a run reports to files: refused before the start where it cannot be written, lost during the run.

A full disk of logs ends no training. Nothing that was written is torn: an append that fails is undone.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import MetricsError

__all__ = ["AppendedFile", "append_or_lose", "check_place", "keep_event_file", "last_byte"]

_lossy: set[Path] = set()
"""Files whose last piece could not be written."""


def check_place(path: Path, remedy: str) -> None:
    """Check before the start that something can be appended to a file.

    Makes its folder, and leaves the file as it was.

    Args:
        path: The file.
        remedy: What else the user can do than mend the place.

    Raises:
        MetricsError: nothing can.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                file.write(b"\n")
            finally:
                file.truncate(size)
        if not size:
            path.unlink()
    except OSError as error:
        raise MetricsError(f"{path} cannot be written ({error.strerror}); {remedy}, or mend the place") from error


def append_or_lose(path: Path, content: bytes, what: str) -> None:
    """Append to a file, all of it or nothing.

    What cannot be written is lost, with one warning until something can be written again.

    Args:
        path: The file; made with its folder if it is not there.
        content: To be appended.
        what: Is lost, for the warning.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            _append(file.fileno(), content)
    except OSError as error:
        if path not in _lossy:
            told = f"{path} cannot be written ({error.strerror}); the run goes on, {what} are lost until there is space"
            print(f"\nWARNING: {told}\n", file=sys.stderr)
        _lossy.add(path)
    else:
        _lossy.discard(path)


def _append(file: int, content: bytes) -> None:
    size, left = os.lseek(file, 0, os.SEEK_END), memoryview(content)
    try:
        while left:
            left = left[os.write(file, left) :]
    except OSError:
        if len(left) < len(content):
            os.ftruncate(file, size)
        raise


def last_byte(path: Path) -> bytes:
    """Return the last byte of a file.

    No bytes where it is empty, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            return file.read(1)
    except OSError:
        return b""


class AppendedFile:
    """A file for a writer that goes on where it cannot be written: what it wrote since the last flush is lost then."""

    closed = False

    def __init__(self, path: Path, what: str) -> None:
        """Append to this file.

        `what` is named in the warning.
        """
        self._path, self._what = path, what
        self._held, self._lock = bytearray(), threading.Lock()

    def write(self, content: bytes) -> None:
        """Hold it until the next flush."""
        with self._lock:
            self._held += content

    def flush(self) -> None:
        """Append what is held."""
        with self._lock:  # until it is written: whoever flushes in another thread wants it on disk too
            if self._held:
                append_or_lose(self._path, bytes(self._held), self._what)
            self._held.clear()

    def close(self) -> None:
        """Append what is held, for the last time."""
        self.flush()
        self.closed = True


def keep_event_file(writer: Any) -> None:
    """Let a TensorBoard writer go on where its file cannot be written.

    Its thread ends with the error, in a traceback, and whoever adds the next value gets it too.

    Args:
        writer: A `SummaryWriter` of torch that has just been made; one that writes elsewhere than to files is left.
    """
    events = writer.file_writer.event_writer
    path = Path(events._file_name)
    if path.is_file():
        events._async_writer._writer._writer = AppendedFile(path, "its events")
