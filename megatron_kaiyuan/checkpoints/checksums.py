"""Checksums of every file of a checkpoint, written with it: `checksums.json`.

XXH3 with 128 bits detects damage, by disks, networks and copies, at the speed of memory: a changed file passes with a
chance of 2^-128. It is no signature: who may write the files may write their checksums too.

Each rank sums up what it writes while it writes it, in a thread of its own: a large write to a disk takes longer than
its sum, so it costs no time, and no file is read again. The result waits beside the file, also where a helper process
wrote it, until rank 0 collects all before `metadata.json` and the tracker say that the checkpoint is whole.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_kaiyuan.errors import CheckpointError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import counted

__all__ = [
    "CHECKSUMS_ARGUMENT",
    "CHECKSUMS_NAME",
    "FileSum",
    "SummedFile",
    "collect_sums",
    "content_fingerprint",
    "find_difference",
    "read_checksums",
    "sum_bytes",
    "sum_file",
    "write_checksums",
]

CHECKSUMS_NAME = "checksums.json"
"""File of a checkpoint that says what the others hold; a checkpoint of stock Megatron has none."""
CHECKSUMS_ARGUMENT = "kaiyuan_checksums"
"""Argument of a run, true where its checkpoints are written with checksums: without them such a one is damaged."""
_BUFFER = 1 << 20
_THREADS = 4
"""Files read at a time; reading and summing up release Python's lock."""


class FileSum(BaseModel):
    """What a file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: int
    xxh3_128: str


class _Checksums(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["megatron_kaiyuan.checksums/1"] = "megatron_kaiyuan.checksums/1"
    files: dict[str, FileSum]
    own_xxh3_128: str
    """Of `files` as written here, so that damage to this file is not taken for damage to another."""


def _own_sum(files: Mapping[str, FileSum]) -> str:
    text = json.dumps({name: [found.bytes, found.xxh3_128] for name, found in sorted(files.items())})
    return xxhash.xxh3_128_hexdigest(text.encode())


def sum_bytes(content: bytes) -> FileSum:
    """Sum up a file that holds `content`."""
    return FileSum(bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))


def sum_file(path: Path, progress: Callable[[int], None] = lambda _bytes: None) -> FileSum:
    """Read a file and sum it up.

    Args:
        path: The file.
        progress: Called with the bytes of each step.

    Raises:
        OSError: it cannot be read.
    """
    total, state = 0, xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            state.update(buffer[:count])
            total += count
            progress(count)
    return FileSum(bytes=total, xxh3_128=state.hexdigest())


def write_checksums(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Write `checksums.json` into a checkpoint.

    Args:
        folder: Of the checkpoint.
        sums: By file name; all files that loading reads.
    """
    content = _Checksums(files=dict(sorted(sums.items())), own_xxh3_128=_own_sum(sums))
    write_text_atomically(folder / CHECKSUMS_NAME, content.model_dump_json() + "\n")


def read_checksums(folder: Path) -> dict[str, FileSum] | None:
    """Return the checksums of a checkpoint by file name, None where it has none.

    Raises:
        CheckpointError: they are damaged.
        OSError: they cannot be read.
    """
    path = folder / CHECKSUMS_NAME
    try:
        content = _Checksums.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise CheckpointError(f"has a {CHECKSUMS_NAME} that is unreadable ({reason})") from error
    if content.own_xxh3_128 != _own_sum(content.files):
        raise CheckpointError(f"has a {CHECKSUMS_NAME} with other bytes than were saved (its own checksum)")
    return content.files


def content_fingerprint(folder: Path) -> str:
    """Return what two checkpoints share exactly when their files hold the same bytes, wherever they lie.

    Files of a checkpoint without checksums are read for it.

    Args:
        folder: Of the checkpoint.

    Raises:
        CheckpointError: its checksums are damaged.
        OSError: a file cannot be read.
    """
    sums = read_checksums(folder)
    if sums is None:
        sums = {path.name: sum_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    return _own_sum(sums)


def find_difference(
    folder: Path, sums: Mapping[str, FileSum], progress: Callable[[int], None] = lambda _bytes: None
) -> tuple[str, str] | None:
    """Compare files with their checksums and return the first difference.

    Args:
        folder: Of the checkpoint.
        sums: The files to read: sum by file name.
        progress: Called with the bytes of each step, from several threads.

    Returns:
        Name of a file and what is wrong with it, beginning with "has"; None where all are as they were saved.
    """
    for name, expected in sums.items():  # sizes first: a short file is detected at once
        if wrong := _wrong_size(folder / name, expected):
            return name, wrong
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        wrongs = pool.map(lambda item: _wrong_content(folder / item[0], item[1], progress), sums.items())
        return next(((name, wrong) for name, wrong in zip(sums, wrongs, strict=True) if wrong), None)


def _wrong_size(path: Path, expected: FileSum) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"has no {path.name}"
    except OSError as error:
        return f"has a {path.name} that cannot be read ({error.strerror})"
    return (
        None if size == expected.bytes else f"has {size:,} instead of {counted(expected.bytes, 'byte')} in {path.name}"
    )


def _wrong_content(path: Path, expected: FileSum, progress: Callable[[int], None]) -> str | None:
    try:
        found = sum_file(path, progress)
    except OSError as error:
        return f"has a {path.name} that cannot be read ({error.strerror})"
    return None if found == expected else f"has other bytes in {path.name} than were saved (checksum)"


class SummedFile:
    """A new file to write that is summed up meanwhile.

    When it is closed the sum is left for `collect_sums`. Like a file of `open(path, "wb")`, as far as `torch.save` and
    Megatron's writer use it.
    """

    def __init__(self, path: Path) -> None:
        """Open the file for writing, replacing an older one.

        Raises:
            OSError: as `open`.
        """
        self._path = path
        _left_beside(path).unlink(missing_ok=True)
        self._stream = path.open("wb")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksum")
        self._state = xxhash.xxh3_128()
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append."""
        if memoryview(data).nbytes < _BUFFER:
            self._state.update(data)
            written = self._stream.write(data)
        else:
            summing = self._thread.submit(self._state.update, data)
            try:
                written = self._stream.write(data)  # neither holds Python's lock
            finally:
                summing.result()  # the memory is the caller's again afterwards
        self._size += written
        return written

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._stream.flush()

    def fileno(self) -> int:
        """Descriptor of the file, which then has all that was written: who syncs it forgets to flush."""
        self._stream.flush()
        return self._stream.fileno()

    def close(self) -> None:
        """Close it, and leave its sum."""
        if not self._stream.closed:
            self._stream.close()
            self._thread.shutdown()
            found = FileSum(bytes=self._size, xxh3_128=self._state.hexdigest())
            _left_beside(self._path).write_text(found.model_dump_json())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # whoever failed says so; half a file has no sum
            with contextlib.suppress(OSError):
                self._stream.close()
            self._thread.shutdown()


def collect_sums(paths: Iterable[Path]) -> dict[str, FileSum]:
    """Return the checksum of each file by its name, as left by `SummedFile`, or else by reading it."""
    found = {}
    for path in paths:
        left = _left_beside(path)
        try:
            found[path.name] = FileSum.model_validate_json(left.read_bytes())
        except (OSError, ValidationError):  # another writer than ours, such as that of nvidia-resiliency-ext
            found[path.name] = sum_file(path)
        left.unlink(missing_ok=True)
    return found


def _left_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.sum")
