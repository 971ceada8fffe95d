"""Opening files that others wrote: a pipe under the name of a file must not make the reader wait for ever."""

import errno
import os
import stat
from io import FileIO
from pathlib import Path

__all__ = ["is_read_only", "open_regular", "read_regular"]

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_read_only(error: OSError) -> bool:
    """Whether a folder cannot be written to, rather than a disk that is full or a path that is not there."""
    return error.errno in _READ_ONLY


def open_regular(path: str | os.PathLike[str]) -> FileIO:
    """Open a file for reading, unbuffered.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: as `open`.
        IsADirectoryError: a folder.
        OSError: a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer blocks otherwise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return FileIO(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "a pipe or a device, not a file", os.fspath(path))


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a whole file.

    Errors as `open_regular`.
    """
    with open_regular(Path(path)) as stream:
        return stream.readall()
