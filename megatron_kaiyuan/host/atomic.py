"""Files that are whole or absent under their final name, whenever a process dies."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "write_text_atomically"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the same folder for writing; it takes the final name when the block ends well.

    The data is on disk before the name is. Several writers of one path do not disturb each other: the last one stays.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind then.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write a whole text file, its folder too where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(text.encode())
