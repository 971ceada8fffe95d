"""Processes that have imported torch and Megatron already.

A start takes five seconds of CPU for its imports, of which the suite would pay for hundreds. Here one process imports
them, and each start is a fork of it. What a launcher, a signal or the imports themselves do is tested with cold starts.
"""

import importlib
import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext, SpawnContext

__all__ = ["as_torchrun_sets", "fresh_processes", "take_environment"]

_PRELOADED = "tests.warm_imports"


def fresh_processes() -> ForkServerContext | SpawnContext:
    """Return the context whose processes start warm; where tests see GPUs, which no fork can share, cold ones."""
    if os.environ.get("KAIYUAN_DEVICE") != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    return context


def take_environment(environment: Mapping[str, str]) -> None:
    """Give this process the environment of a test, and what the imports have added to theirs."""
    added = dict(importlib.import_module(_PRELOADED).ADDED) if os.environ.get("KAIYUAN_DEVICE") == "cpu" else {}
    os.environ.clear()
    os.environ.update(added | dict(environment))


def as_torchrun_sets(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for a rank of one host, whose store listens at `port`."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {
        **{name: str(number) for name, number in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
