"""What a process does at a signal that asks it to stop. Each runs in a process of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
LISTEN = """
import os, signal, sys, time
for number in (signal.SIGHUP, signal.SIGINT):  # ignored where the tests run under nohup
    signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
from megatron_kaiyuan.host.stop_signals import STOP_SIGNALS, StopRequests, end_at_interrupt, ignore_stop_signals
end_at_interrupt()
requests = StopRequests()
def wait(condition):
    for _ in range(400):
        if condition(): return True
        time.sleep(0.01)
    return False
"""


def run(script: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LISTEN + script],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_stop_signal_is_noted_and_the_process_goes_on(number: signal.Signals) -> None:
    script = (
        "requests.listen(STOP_SIGNALS); print(1, flush=True); wait(lambda: requests.number); print(requests.number)"
    )
    with run(script) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        assert process.stdout.read().split() == [str(int(number))]
    assert process.returncode == 0


def test_the_second_interrupt_ends_the_process_at_once_and_silently() -> None:
    script = """
requests.listen(STOP_SIGNALS); print(1, flush=True); wait(lambda: requests.number); print(2, flush=True)
time.sleep(60)
"""
    with run(script) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
        assert process.stdout.read() == ""


def test_an_interrupt_before_anybody_listens_ends_the_process_silently() -> None:
    with run("print(1, flush=True); time.sleep(60)") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
        assert process.stdout.read() == ""


def test_a_repeated_termination_is_one_request_and_the_first_signal_is_named() -> None:
    script = """
requests.listen(STOP_SIGNALS)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
    os.kill(os.getpid(), number)
print(requests.number)
"""
    with run(script) as process:
        assert process.communicate(timeout=10)[0].split() == [str(int(signal.SIGUSR1))]


def test_a_hangup_stays_ignored_under_nohup() -> None:
    script = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
requests.listen(STOP_SIGNALS)
os.kill(os.getpid(), signal.SIGHUP)
print(requests.number)
"""
    with run(script) as process:
        assert process.communicate(timeout=10)[0].split() == ["0"]


def test_a_forked_helper_does_not_take_a_signal_for_its_own() -> None:
    """A signal to the process group is noted once, by the process that listens; a helper that ignores them lives."""
    script = """
requests.listen(STOP_SIGNALS)
noted, ready = os.pipe(), os.pipe()
if not os.fork():
    os.write(ready[1], b"r")
    time.sleep(0.5)
    os.write(noted[1], bytes([requests.number]))
    os._exit(0)
if not os.fork():
    ignore_stop_signals()
    os.write(ready[1], b"r")
    time.sleep(0.5)
    os._exit(0)
os.read(ready[0], 1), os.read(ready[0], 1)
os.killpg(0, signal.SIGTERM)
os.killpg(0, signal.SIGINT)
print(requests.number, os.read(noted[0], 1)[0], os.wait()[1], os.wait()[1])
"""
    with run(script) as process:
        assert process.communicate(timeout=10)[0].split() == [str(int(signal.SIGTERM)), "0", "0", "0"]
