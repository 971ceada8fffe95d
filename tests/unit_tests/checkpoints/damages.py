"""Damage done to files on purpose: what disks, copies, kills and strangers do to them."""

import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = np.random.SeedSequence(16)


def truncate(path: Path) -> None:
    """What a full disk or a copy that was broken off leaves: half of the file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    """What some file systems leave after a power failure: the size, and nothing in it."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path, generator: np.random.Generator) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    bit = int(generator.integers(len(content) * 8))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def scramble(path: Path) -> None:
    """Random bytes of the same size."""
    path.write_bytes(np.random.default_rng(SEED).bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "truncated": truncate,
    "empty": empty,
    "all zero": zero,
    "one bit": lambda path: flip(path, np.random.default_rng(SEED)),
    "random bytes": scramble,
}


class Command:
    """Unpickles to a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def hostile_pickle(mark: Path) -> bytes:
    """A pickle that makes a file when somebody opens it."""
    return pickle.dumps(Command(f"touch {mark}"))


def hostile_object(mark: Path) -> bytes:
    """What `torch.save` makes of a common state that makes a file when somebody loads it."""
    stream = io.BytesIO()
    torch.save([{"args": Command(f"touch {mark}"), "iteration": 1}], stream)
    return stream.getvalue()


def files_of(folder: Path) -> Iterator[str]:
    """Names of the files of a checkpoint, in order."""
    yield from sorted(path.name for path in folder.iterdir())
