"""A rank or a launcher that is killed leaves no process behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PARENT = """
import multiprocessing, os, subprocess, sys, time
from megatron_kaiyuan.host.parent_death import become_helper, die_with_launcher
def work():
    {install}
    print(os.getpid(), flush=True)
    time.sleep(60)
if len(sys.argv) > 1:
    work()
elif {launched}:
    subprocess.run([sys.executable, "-c", sys.orig_argv[2], "child"])
else:
    multiprocessing.get_context("fork").Process(target=work).start()
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("install", "launched", "run_id", "left"),
    [
        ("become_helper()", False, "", False),
        ("pass", False, "", True),
        ("die_with_launcher()", True, "of torchrun", False),
        ("die_with_launcher()", True, "", True),
    ],
    ids=["helper", "other child", "rank of torchrun", "process without a launcher"],
)
def test_what_a_killed_process_leaves(
    install: str,
    launched: bool,  # noqa: FBT001
    run_id: str,
    left: bool,  # noqa: FBT001
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    environment |= {"TORCHELASTIC_RUN_ID": run_id} if run_id else {}
    command = [sys.executable, "-c", PARENT.format(install=install, launched=launched)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        try:
            assert is_alive(child, patience=1.0 if left else 10.0) == left
        finally:
            if left:
                os.kill(child, 9)


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
