"""Files that are whole or absent under their final name, whenever a process dies or the power fails."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "atomic_file",
    "folder_appearing_whole",
    "publish_folder",
    "rename_durably",
    "sync_folder",
    "write_text_atomically",
]

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""Answers of file systems that keep names themselves and do not sync folders, such as some FUSE mounts."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that takes its final name when the block ends well.

    It lies in the same folder. The data is on disk before the name is, and the name is on disk at the end. Several
    writers of one path do not disturb each other: the last one stays.

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
    sync_folder(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a whole text file, its folder too where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(text.encode())


def rename_durably(source: Path, target: Path) -> Path:
    """Rename a file or a folder, force the new name to disk, and return `target`.

    Without this a power failure brings the old name back, even if the content is on disk. What is renamed must be on
    disk already: for a folder and its files see `publish_folder`.

    Raises:
        OSError: as `Path.replace`.
    """
    source.replace(target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)
    return target


@contextlib.contextmanager
def folder_appearing_whole(final: Path) -> Iterator[Path]:
    """Make a new folder beside a free name, which takes that name when the block ends well.

    Its own name is new as well, so nothing of anybody else is removed. What is below is on disk before the name is.

    Raises:
        FileExistsError: the name is taken, at the beginning or by then.
        OSError: as `Path.mkdir`; nothing is left behind then.
    """
    _refuse_taken(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".unfinished"))
    try:
        unfinished.chmod(0o755)
        yield unfinished
        _refuse_taken(final)
        publish_folder(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _refuse_taken(final: Path) -> None:
    if os.path.lexists(final):  # a link that leads nowhere too
        raise FileExistsError(errno.EEXIST, "exists; remove it or name another folder", str(final))


def publish_folder(unfinished: Path, final: Path) -> None:
    """Force a folder and all below it to disk, and give it its final name.

    The name must be free, and is forced to disk too.
    """
    for path in unfinished.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(unfinished)
    rename_durably(unfinished, final)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)
