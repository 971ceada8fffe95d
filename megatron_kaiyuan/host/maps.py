"""How many files a process keeps memory-mapped at once.

A map costs a file descriptor (often 1,024 a process) and an entry of the kernel's list of maps (65,530 on a stock
Linux, `vm.max_map_count`). A source of 40,000 shards would need 80,000 of each, so the maps opened longest ago are
given up and opened again when they are needed: about 30 microseconds, the page cache still holds their data.
"""

import mmap
import os
import resource
import weakref
from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.host.cut_files import note_size

__all__ = ["OpenMaps", "advise_random", "look_up", "map_array", "open_maps"]

_FEWEST = 64
_MOST = 1 << 14
_RAW = {size: np.dtype(f"V{size}") for size in (1, 2, 4, 8, 16)}
_FEW_PAGES = 64  # of an array; asking for them ahead would cost as much as it saves


def map_array(
    path: str | os.PathLike[str], dtype: np.dtype[Any], count: int, offset: int, *, random: bool
) -> NDArray[Any]:
    """Map `count` numbers of a file from byte `offset` on, read-only.

    Args:
        path: the file.
        dtype: of the numbers, in the file's byte order.
        count: how many.
        offset: in bytes; need not be aligned.
        random: places far from each other will be read, as in an index; see `advise_random`.
    """
    if count == 0:
        return np.empty(0, dtype=dtype)
    note_size(path, offset + count * dtype.itemsize)
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
    if random:
        advise_random(mapped)
    # a plain ndarray view: indexing np.memmap itself costs a subclass construction each time
    return mapped.view(np.ndarray)


def advise_random(mapped: "np.memmap[Any, Any]") -> None:
    """Ask the kernel not to read ahead, so that a look-up costs one page and not megabytes.

    The kernel notices by itself after a hundred misses, but opening a plan looks up fewer places than that in each
    file, and some machines are set to read 8 MiB around each of them.
    """
    mapping = getattr(mapped, "_mmap", None)
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)


def look_up(numbers: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """`numbers[places]` of a mapped array, for many places or from several threads.

    Other threads run while pages are read from disk. Where most pages of the array will be needed the kernel is asked
    for all of them first, since it reads a whole file much faster than one page after another.

    Args:
        numbers: as `map_array` gives them, `[N]`; need not be aligned.
        places: int64 `[n]`, `0 <= place < N`.
    """
    pages = numbers.nbytes // mmap.PAGESIZE
    if len(places) > pages // 4 and pages > _FEW_PAGES:
        _read_ahead(numbers)
    # without a type numpy need not align: indexing copies the whole array for that, and holds the interpreter's lock
    return numbers.view(_RAW[numbers.itemsize]).take(places).view(numbers.dtype)


def _read_ahead(numbers: NDArray[Any]) -> None:
    owner: Any = numbers
    first = numbers
    while isinstance(owner, np.ndarray):
        first, owner = owner, owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        # the first array begins within the first page of the map
        skipped = numbers.__array_interface__["data"][0] - first.__array_interface__["data"][0]
        begin = max(0, skipped // mmap.PAGESIZE * mmap.PAGESIZE)
        owner.madvise(mmap.MADV_WILLNEED, begin, min(len(owner) - begin, numbers.nbytes + 2 * mmap.PAGESIZE))


class OpenMaps:
    """Attributes that hold maps, oldest first, with a limit on their number.

    Beyond the limit the oldest is deleted from its owner. An array that somebody still uses stays valid: deleting the
    attribute only drops one reference to its map.

    Args:
        limit: attributes to keep.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: deque[tuple[weakref.ref[object], str]] = deque()  # appending and popping are atomic

    def keep[Value](self, owner: object, attribute: str, value: Value) -> Value:
        """Store what holds a map under `attribute` of `owner.__dict__`, and return it."""
        owner.__dict__[attribute] = value  # before it is noted: what is noted can be given up by another thread
        self._kept.append((weakref.ref(owner), attribute))
        while len(self._kept) > self.limit:
            try:
                oldest, name = self._kept.popleft()
            except IndexError:  # another thread was faster
                break
            alive = oldest()
            if alive is not None:
                alive.__dict__.pop(name, None)
        return value


@lru_cache(maxsize=1)
def open_maps() -> OpenMaps:
    """The maps of this process: half of its file descriptors, at most 16,384."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST if soft == resource.RLIM_INFINITY else soft // 2
    return OpenMaps(max(_FEWEST, min(allowed, _MOST)))
