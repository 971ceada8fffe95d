"""Files under construction: `<final name>.<writer>.partial`, invisible to every reader until they are renamed.

The name holds the host and the process, so two processes that build one shard at one time never write one file: at
worst both do the same work, and the names go from one whole set of files to another with the same bytes. Where the file
system has locks the second one is refused instead. Nothing is shared between the tasks of a job array but folders.
"""

import fcntl
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from megatron_kaiyuan.errors import ConfigError, ShardError
from megatron_kaiyuan.host.atomic import rename_durably
from megatron_kaiyuan.shards.manifest import FileRecord, Manifest, load_manifest, manifest_path

__all__ = [
    "HashedFile",
    "Spool",
    "is_complete",
    "is_of_build",
    "list_partials",
    "partial_path",
    "refuse_existing",
    "remove_dead_partials",
    "remove_existing",
    "retire",
]

_SECONDS_ALIVE = 600.0
"""A run appends to its files far more often than that."""
_PATIENCE = 5.0
"""Seconds for the workers of a run that was killed a moment ago to end."""
_SPOOL_CHUNK = 1 << 18


def partial_path(final: Path) -> Path:
    """Where this process builds the file that will be called `final`."""
    return Path(f"{final}.{_host()}-{os.getpid()}.partial")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())


class HashedFile:
    """A partial file that counts and hashes what passes through it.

    What is written after `discard` goes nowhere.
    """

    closed = False

    def __init__(self, final: Path, *, locked: bool = False) -> None:
        self.final = final
        self.partial = partial_path(final)
        self._stream: BinaryIO = self.partial.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0
        self._discarded = False
        if locked:
            _lock(self._stream)

    def write(self, data: bytes | memoryview) -> int:
        """Append."""
        if self._discarded:
            return len(data)
        self._stream.write(data)
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if not self._discarded:
            self._stream.flush()

    def sync(self) -> FileRecord:
        """Force everything to disk, and say what it is."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return FileRecord(name=self.final.name, bytes=self._size, sha256=self._digest.hexdigest())

    def publish(self) -> None:
        """Give the file its final name, on disk too.

        Raises:
            ConfigError: another process, which builds the same shard, has removed the file.
        """
        try:
            rename_durably(self.partial, self.final)
        except FileNotFoundError as error:
            raise ConfigError(
                f"output {self.final}: another process is writing it; wait for it or choose another output"
            ) from error

    def discard(self) -> None:
        """Close it, and remove it unless it was published."""
        self._discarded = True
        self.partial.unlink(missing_ok=True)
        self._stream.close()


class Spool:
    """A column of numbers on disk: appended block by block, read back in chunks of a fixed size."""

    def __init__(self, path: Path, dtype: type[np.int32] | type[np.float64]) -> None:
        self.count = 0
        self._partial = partial_path(path)
        self._dtype = np.dtype(dtype)
        self._stream = self._partial.open("w+b")

    def append(self, values: NDArray[np.generic]) -> None:
        """Add numbers at the end."""
        self._stream.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.count += len(values)

    def chunks(self) -> Iterator[NDArray[np.number]]:
        """All numbers from the first on."""
        self._stream.flush()
        self._stream.seek(0)
        while data := self._stream.read(_SPOOL_CHUNK * self._dtype.itemsize):
            yield np.frombuffer(data, dtype=self._dtype)

    def discard(self) -> None:
        """Close and remove it."""
        self._partial.unlink(missing_ok=True)
        self._stream.close()


def _lock(stream: BinaryIO) -> None:
    """Mark the file as in use, until the process ends.

    A file system without locks does without.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return


def remove_dead_partials(prefix: str) -> None:
    """Remove what killed runs left of the shard `prefix`.

    The partial manifest goes last.

    Raises:
        ConfigError: a process that is alive holds one of the files.
    """
    dead: list[Path] = []
    deadline = time.monotonic() + _PATIENCE
    for path in list_partials(prefix):
        while (alive := _is_alive(path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if alive:
            raise ConfigError(
                f"output {prefix}: another process is writing {path}; wait for it or choose another output"
            )
        if alive is not None:
            dead.append(path)
    for path in sorted(dead, key=lambda path: ".manifest." in path.name):
        path.unlink(missing_ok=True)


def list_partials(prefix: str) -> list[Path]:
    """Partial files of the shard `prefix`, of whatever process."""
    name, folder = re.escape(Path(prefix).name), Path(prefix).parent
    pattern = re.compile(rf"{name}\.(bin|idx|lengths|documents|scores\..+|manifest)\.(.*\.)?partial")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []


def _is_alive(path: Path) -> bool | None:
    """Return whether the process that writes a partial file still runs.

    None where that cannot be known yet. The file's lock decides. Without locks the process does, if it is of this host,
    and else whether the file has long not grown.
    """
    try:
        with path.open("r+b") as stream:  # NFS gives an exclusive lock to writers only
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:  # a file system without locks
        return _is_alive_without_locks(path)
    return False


def _is_alive_without_locks(path: Path) -> bool | None:
    writer = path.name.removesuffix(".partial").rpartition(".")[2]
    host, _, process = writer.rpartition("-")
    if host == _host() and process.isdigit():
        return Path("/proc", process).exists() and int(process) != os.getpid()
    return False if time.time() - path.stat().st_mtime > _SECONDS_ALIVE else None


def is_of_build(prefix: str, build: str | None) -> bool:
    """Return whether this very command put what lies under the final names of `prefix`.

    The manifest shows it. Where a kill came between two renames, the partial manifest that was written before them
    does.
    """
    if build is None:
        return False
    if manifest_path(prefix).exists():
        try:
            return load_manifest(prefix).build == build
        except ShardError:
            return False
    for path in list_partials(prefix):
        if ".manifest." in path.name:
            try:
                if Manifest.model_validate_json(path.read_bytes()).build == build:
                    return True
            except (ValidationError, FileNotFoundError):  # torn while it was written: nothing was renamed yet
                continue
    return False


def is_complete(prefix: str, build: str) -> bool:
    """Return whether the shard of this build is complete: its manifest, and every file with its recorded size."""
    try:
        manifest = load_manifest(prefix)
    except ShardError:
        return False
    folder = manifest_path(prefix).parent
    return manifest.build == build and all(
        (path := folder / file.name).is_file() and path.stat().st_size == file.bytes for file in manifest.files.values()
    )


def refuse_existing(prefix: str, score_keys: Sequence[str] = ()) -> None:
    """Raise ConfigError if any final file of the shard `prefix` exists."""
    names = [f"{prefix}.bin", f"{prefix}.idx", *(f"{prefix}.scores.{key}.npy" for key in score_keys)]
    for path in [*map(Path, names), manifest_path(prefix)]:
        if path.exists():
            whole = "" if manifest_path(prefix).exists() else " (without a manifest: interrupted, or another tool's)"
            raise ConfigError(
                f"output: {path} exists{whole} and comes from other input, other flags or another tool; give "
                "--overwrite to replace this shard, or another output"
            )


def retire(prefix: str, keep: Callable[[Manifest], bool]) -> bool:
    """Withdraw a complete shard unless `keep(manifest)` is true. Return whether it was withdrawn.

    Other tasks may be at work on it meanwhile.

    Only its manifest is certain to go: without it the folder counts as unfinished. The manifest is moved before it is
    judged, so one that another task publishes at this moment is seen, and put back. Where somebody has partial files
    of the shard, what else lies under its names is theirs to replace.
    """
    manifest = manifest_path(prefix)
    if not manifest.exists() or _is_kept(manifest, keep):
        return False
    busy = bool(list_partials(prefix))
    taken = partial_path(manifest)
    try:
        rename_durably(manifest, taken)
    except FileNotFoundError:  # another task was faster
        return False
    if _is_kept(taken, keep):
        rename_durably(taken, manifest)
        return False
    taken.unlink()
    if not busy:
        remove_existing(prefix)
    return True


def _is_kept(manifest: Path, keep: Callable[[Manifest], bool]) -> bool:
    """Return whether a manifest's shard is to be kept, False where the manifest is damaged.

    A manifest that has just gone counts as kept, because nobody has to remove it.
    """
    try:
        return keep(Manifest.model_validate_json(manifest.read_bytes()))
    except FileNotFoundError:
        return True
    except ValidationError:
        return False


def remove_existing(prefix: str) -> None:
    """Remove a shard.

    Manifest and index go first, so that no reader can open a mixture of the old and the new one.
    """
    manifest_path(prefix).unlink(missing_ok=True)
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    name = re.escape(Path(prefix).name)
    for path in Path(prefix).parent.iterdir():
        # a score key or an id key of the earlier run may not be written again
        if re.fullmatch(rf"{name}\.(bin|documents\.parquet|scores\..+\.npy)", path.name):
            path.unlink(missing_ok=True)
