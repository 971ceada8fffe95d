"""Files under construction: `<final name>.<writer>.partial`, invisible to every reader until they are renamed.

The name holds the host and the process, so two processes that build one shard at one time never write one file. Which
of them may remove and rename is decided by `Ownership`: the other one is refused. Where the file system has no locks,
both do the same work at worst, and the names go from one whole set of files to another with the same bytes. Nothing is
shared between the tasks of a job array but folders.
"""

import fcntl
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from megatron_kaiyuan.errors import ConfigError, ShardError
from megatron_kaiyuan.host.atomic import rename_durably
from megatron_kaiyuan.shards.manifest import FileRecord, Manifest, load_manifest, manifest_path

__all__ = [
    "HashedFile",
    "Ownership",
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

    def __init__(self, final: Path) -> None:
        self.final = final
        self.partial = partial_path(final)
        self._stream: BinaryIO = self.partial.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0
        self._discarded = False

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
            raise ConfigError(_refusal(str(self.final))) from error

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


class Ownership:
    """The right to remove and to rename files of the shard `prefix`, which one process has at a time.

    A lock on `<prefix>.owner.partial` gives it, from before the first look at what is there until after the last
    rename. The kernel takes it back when the process ends, however it ends. Workers that outlive a killed process for
    a moment still have it.

    Attributes:
        locked: False on a file system without locks. There the names of the partial files decide.

    Raises:
        ConfigError: another process has it, and keeps it longer than `patience` seconds.
    """

    locked = False

    def __init__(self, prefix: str, patience: float | None = None) -> None:
        self._path = Path(f"{prefix}.owner.partial")
        deadline = time.monotonic() + (_PATIENCE if patience is None else patience)
        while not self._take():
            if time.monotonic() >= deadline:
                raise ConfigError(_refusal(prefix))
            time.sleep(0.05)

    def _take(self) -> bool:
        self._stream = self._path.open("ab")  # NFS gives an exclusive lock to writers only
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            return False
        except OSError:
            self.release()
            return True
        self.locked = self._has_its_name()
        if not self.locked:  # the last owner has removed the file between our two calls
            self._stream.close()
        return self.locked

    def _has_its_name(self) -> bool:
        try:
            return self._path.stat().st_ino == os.fstat(self._stream.fileno()).st_ino
        except FileNotFoundError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others have it; the file goes while the lock is held."""
        self._path.unlink(missing_ok=True)
        self._stream.close()


def _refusal(prefix: str, path: Path | None = None) -> str:
    return f"output {prefix}: another process is writing {path or 'it'}; wait for it or choose another output"


def remove_dead_partials(prefix: str, owned: Ownership, *, torn: bool = False) -> None:
    """Remove what killed runs left of the shard `prefix`, which is `owned`.

    The partial manifest goes last: it says whose the other files are.

    Args:
        prefix: Of the shard.
        owned: The right to do so.
        torn: What has final names already goes too, unless another process may be giving them.

    Raises:
        ConfigError: the file system has no locks, and a process of this host that is alive writes one of the files.
    """
    dead: list[Path] = []
    deadline = time.monotonic() + _PATIENCE
    for path in list_partials(prefix):
        while (alive := not owned.locked and _is_alive(path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if alive:
            raise ConfigError(_refusal(prefix, path))
        if alive is None:
            torn = False
        else:
            dead.append(path)
    if torn:
        remove_existing(prefix)
    for path in sorted(dead, key=lambda path: ".manifest." in path.name):
        path.unlink(missing_ok=True)


def list_partials(prefix: str) -> list[Path]:
    """Partial files of the shard `prefix`, of whatever process."""
    name, folder = re.escape(Path(prefix).name), Path(prefix).parent
    pattern = re.compile(rf"{name}\.(bin|idx|lengths|documents|scores\..+|manifest)\.(.*\.)?partial")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []


def _is_alive(path: Path) -> bool | None:
    """Return whether the process that writes a partial file still runs, where there are no locks.

    None where that cannot be known yet: of another host, and written to not long ago.
    """
    writer = path.name.removesuffix(".partial").rpartition(".")[2]
    host, _, process = writer.rpartition("-")
    if host == _host() and process.isdigit():
        return Path("/proc", process).exists() and int(process) != os.getpid()
    try:
        return False if time.time() - path.stat().st_mtime > _SECONDS_ALIVE else None
    except FileNotFoundError:
        return False


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

    Other tasks may be at work on it meanwhile. Only its manifest is certain to go: without it the folder counts as
    unfinished. What else lies under its names is the owner's to replace, where somebody is that.
    """
    manifest = manifest_path(prefix)
    if not manifest.exists() or _is_kept(manifest, keep):
        return False
    try:
        owned = Ownership(prefix, patience=0)
    except ConfigError:
        return _withdraw(prefix, keep)
    with owned:
        busy = not owned.locked and bool(list_partials(prefix))
        withdrawn = _withdraw(prefix, keep)
        if withdrawn and not busy:
            remove_existing(prefix)
    return withdrawn


def _withdraw(prefix: str, keep: Callable[[Manifest], bool]) -> bool:
    """Remove the manifest unless it is to be kept. Return whether it is gone.

    It is moved before it is judged, so one that another task publishes at this moment is seen, and put back.
    """
    manifest = manifest_path(prefix)
    taken = partial_path(manifest)
    try:
        rename_durably(manifest, taken)
    except FileNotFoundError:  # another task was faster
        return False
    if _is_kept(taken, keep):
        rename_durably(taken, manifest)
        return False
    taken.unlink()
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
