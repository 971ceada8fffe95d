"""A rank that is killed after a checkpoint leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
RANK = """
import multiprocessing, time
{install}
from megatron.core.dist_checkpointing.strategies import filesystem_async
queue = filesystem_async.get_write_results_queue()
queue.put("still a queue")
assert queue.get() == "still a queue"
[helper] = multiprocessing.active_children()
print(helper.pid, flush=True)
time.sleep(60)
"""
INSTALL = "from megatron_kaiyuan.training import compat; compat.end_save_helper_with_its_rank()"


@pytest.mark.parametrize(("install", "left"), [(INSTALL, False), ("", True)], ids=["ours", "Megatron's own"])
def test_the_helper_of_saving_ends_with_a_killed_rank(*, install: str, left: bool) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RANK.format(install=install)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        helper = int(rank.stdout.readline())
        rank.kill()
        rank.wait()
        try:
            assert is_alive(helper, patience=1.0 if left else 10.0) == left
        finally:
            if left:
                os.kill(helper, signal.SIGKILL)


def is_alive(pid: int, patience: float) -> bool:
    """Whether the process still runs after so many seconds; returns as soon as it does not."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":  # ended, and nobody has collected it
            return False
        time.sleep(0.05)
    return True
