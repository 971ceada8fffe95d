"""The launcher that waits: stop signals, exit codes and reasons, with small scripts for ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[3]

# Rank 0 notes each signal; a rank ends 1.5 s after its first one, as if it saved.
SAVING_RANK = """
import os, signal, sys, time
sys.path.insert(0, {repository!r})
from megatron_kaiyuan.host.parent_death import die_with_launcher
from megatron_kaiyuan.host.stop_signals import STOP_SIGNALS, StopRequests
die_with_launcher()
requests = StopRequests()
requests.listen(STOP_SIGNALS)
print("listening", flush=True)
while not requests.number:
    time.sleep(0.01)
time.sleep({seconds})
os.write(1, ("saved after " + signal.Signals(requests.number).name + "\\n").encode())  # whole: ranks share the pipe
"""
FAILING_RANK = """
import os, sys, time
sys.path.insert(0, {repository!r})
from megatron_kaiyuan.host.endings import record_reason
if os.environ["RANK"] == "1":
    record_reason("PlanError: the mix is empty")
    sys.exit(1)
time.sleep(60)
"""
DEAF_RANK = "import time; print('listening', flush=True); time.sleep(60)"


def launch(folder: Path, rank: str, *flags: str, seconds: float = 1.5) -> "subprocess.Popen[str]":
    script = folder / "rank.py"
    script.write_text(rank.format(repository=str(REPOSITORY), seconds=seconds))
    command = [sys.executable, "-m", "megatron_kaiyuan.host.torchrun", "--standalone", "--nproc-per-node=2", *flags]
    return subprocess.Popen(
        [*command, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until_listening(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for _ in range(2):
        while "listening" not in (line := process.stdout.readline()):
            assert line, "the launcher ended"


@pytest.mark.parametrize("to_group", [False, True], ids=["to the launcher", "to its process group"])
def test_ranks_that_save_end_the_launcher_with_0(tmp_path: Path, *, to_group: bool) -> None:
    with launch(tmp_path, SAVING_RANK) as process:
        wait_until_listening(process)
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert output.count("saved after SIGTERM") == 2
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_that_take_longer_than_torchrun_allows_are_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    with launch(tmp_path, SAVING_RANK, seconds=40) as process:
        wait_until_listening(process)
        process.send_signal(number)
        output = process.communicate(timeout=90)[0]
    assert process.returncode == 0, output
    assert output.count(f"saved after {number.name}") == 2


def test_ranks_without_anything_to_save_end_the_launcher_with_the_signal(tmp_path: Path) -> None:
    """Restarts that the flags allow are for faults; and it ends without a traceback."""
    with launch(tmp_path, DEAF_RANK, "--max-restarts=2") as process:
        wait_until_listening(process)
        process.send_signal(signal.SIGUSR1)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert "Traceback" not in output


def test_the_reason_of_the_rank_that_failed_is_the_last_line(tmp_path: Path) -> None:
    with launch(tmp_path, FAILING_RANK) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert output.splitlines()[-1] == "rank 1 failed first: PlanError: the mix is empty"
    assert "Traceback" not in output
    assert "To enable traceback" not in output


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    with launch(tmp_path, SAVING_RANK) as process:
        wait_until_listening(process)
        ranks = psutil.Process(process.pid).children()
        process.kill()
        began = time.monotonic()
        gone, alive = psutil.wait_procs(ranks, timeout=10)
    assert (len(gone), alive) == (2, [])
    assert time.monotonic() - began < 5
