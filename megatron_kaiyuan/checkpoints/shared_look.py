"""Rank 0 decides something about checkpoints, and all ranks read for it: each a share of the files.

It is done before there is a process group, through the store that the group will use: checking a checkpoint takes as
long as reading it, which one rank alone should not do.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from megatron_kaiyuan.checkpoints.checksums import CHECKSUMS_NAME, FileSum, find_difference, read_checksums
from megatron_kaiyuan.checkpoints.damage import Verified, damage
from megatron_kaiyuan.errors import ResumeError

__all__ = ["Looker", "look_together"]

_WAIT = timedelta(hours=1)
"""Longer than the largest checkpoint takes on the slowest disk; a rank that dies ends the others anyway."""
_stores: list[Store] = []
"""Kept open: rank 0 may host the store that the process group uses afterwards."""


class Looker:
    """Rank 0's check of a checkpoint, made with the help of the other ranks."""

    summary = ""
    """What was looked at last and was intact."""

    def __init__(self, store: Store | None, world_size: int) -> None:
        self._store = store
        self._world_size = world_size
        self._asked = 0

    def __call__(self, folder: Path) -> str | None:
        """Return what is wrong with a checkpoint, None if all its files are as they were saved.

        Raises:
            ResumeError: another host reads other bytes than this one.
        """
        began = time.monotonic()
        reason = damage(folder)
        sums = None if reason else read_checksums(folder)
        if sums is None:
            self.summary = "" if reason else f"{folder.name} is {Verified(None)}"
            return reason
        self._ask({"folder": str(folder.absolute())})
        own = find_difference(folder, _share(sums, 0, self._world_size))
        others = [self._answer(rank) for rank in range(1, self._world_size)]
        if own:
            return own[1]
        for name, wrong, host in filter(None, others):
            if name not in sums or find_difference(folder, {name: sums[name]}) is None:
                raise ResumeError(
                    f"{folder} {wrong}, read on host {host}, and is as it was saved, read on host {platform.node()}: "
                    "mount the same file system on both, or wait until its copy is complete"
                )
            return str(wrong)
        read = Verified(None, len(sums), sum(expected.bytes for expected in sums.values()))
        self.summary = f"{folder.name} is {read} ({time.monotonic() - began:.1f} s)"
        return None

    def finish(self, decision: str) -> None:
        """Send the decision to all ranks."""
        self._ask({"decision": decision})

    def _ask(self, task: dict[str, str]) -> None:
        self._asked += 1
        if self._store is not None:
            self._store.set(_key("task", self._asked), json.dumps(task))

    def _answer(self, rank: int) -> tuple[str, str, str] | None:
        assert self._store is not None, "there are other ranks"
        answer = json.loads(self._store.get(_key("answer", self._asked, rank)))
        return None if answer is None else (answer[0], answer[1], answer[2])


def look_together(decide: Callable[[Looker], str]) -> str:
    """Return what `decide` says on rank 0, on all ranks.

    The other ranks read for it meanwhile.

    Args:
        decide: Called on rank 0 alone.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return decide(Looker(None, 1))
    store, rank, _ = next(rendezvous("env://", timeout=_WAIT))
    store.set_timeout(_WAIT)
    _stores.append(store)
    if rank != 0:
        return _help(store, rank, world_size)
    looker = Looker(store, world_size)
    decision = decide(looker)
    looker.finish(decision)
    return decision


def _help(store: Store, rank: int, world_size: int) -> str:
    number = 0
    while True:
        number += 1
        task = json.loads(store.get(_key("task", number)))
        if "decision" in task:
            return str(task["decision"])
        store.set(_key("answer", number, rank), json.dumps(_read_share(Path(task["folder"]), rank, world_size)))


def _read_share(folder: Path, rank: int, world_size: int) -> tuple[str, str, str] | None:
    """Return the name of a file, what is wrong with it and the host that reads it so, None if all is well."""
    host = platform.node()
    try:
        sums = read_checksums(folder)
        difference = None if sums is None else find_difference(folder, _share(sums, rank, world_size))
    except (OSError, ValueError) as error:
        return CHECKSUMS_NAME, str(error), host
    if sums is None:
        return CHECKSUMS_NAME, f"has no {CHECKSUMS_NAME}", host
    return None if difference is None else (*difference, host)


def _share(sums: dict[str, FileSum], rank: int, world_size: int) -> dict[str, FileSum]:
    """Return the files that one rank reads.

    Every file is read by one rank. The largest are spread first.
    """
    names = sorted(sums, key=lambda name: (-sums[name].bytes, name))
    return {name: sums[name] for name in names[rank::world_size]}


def _key(*parts: object) -> str:
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return "/".join(map(str, ("megatron_kaiyuan", restart, "start", *parts)))
