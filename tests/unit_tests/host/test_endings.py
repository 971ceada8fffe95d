"""A process that ends with an error ends within seconds, and nothing it started is left."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_kaiyuan.host.endings import record_reason
from tests.unit_tests.host.test_parent_death import is_alive

REPOSITORY = Path(__file__).parents[3]
STUBBORN = """
import multiprocessing, signal, threading, time
from megatron_kaiyuan.host.endings import end_helpers, end_process
def work():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
def fail():
    raise OSError("last words fail too")
helper = multiprocessing.get_context("fork").Process(target=work, daemon=True)
helper.start()
time.sleep(0.3)  # until it ignores SIGTERM
print(helper.pid, flush=True)
"""


def seconds_to_end(script: str) -> tuple[int, float, int]:
    """Exit code, seconds, and the helper's process number."""
    command = [sys.executable, "-c", STUBBORN + script]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        helper = int(process.stdout.readline())
        began = time.monotonic()
        code = process.wait(timeout=60)
        return code, time.monotonic() - began, helper


@pytest.mark.parametrize("last_words", ["", ", fail", ", lambda: print('said', flush=True)"])
def test_it_ends_beside_a_thread_that_never_does_and_a_helper_that_ignores_sigterm(last_words: str) -> None:
    script = f"threading.Thread(target=time.sleep, args=(600,)).start()\nend_process(7{last_words})"
    code, seconds, helper = seconds_to_end(script)
    assert code == 7
    assert seconds < 4
    assert not is_alive(helper, patience=5.0)


def test_last_words_that_do_not_return_are_cut_off() -> None:
    code, seconds, _ = seconds_to_end("end_process(7, lambda: time.sleep(600))")
    assert code != 0
    assert seconds < 9


def test_a_process_that_succeeds_does_not_wait_for_its_helpers_either() -> None:
    code, seconds, helper = seconds_to_end("end_helpers()")
    assert code == 0
    assert seconds < 4
    assert not is_alive(helper, patience=5.0)


def test_the_reason_is_left_where_torchrun_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failures = {}
    for rank, (reason, is_consequence) in enumerate([("lost another rank", True), ("PlanError: the cause", False)]):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        record_reason(reason, is_consequence=is_consequence)
        failures[rank] = ProcessFailure(rank, 1, 1, str(tmp_path / f"{rank}.json"))

    summary = ChildFailedError("pretrain", failures).format_msg()

    assert "PlanError: the cause" in summary.split("Root Cause")[1]
    assert "To enable traceback" not in summary
    assert json.loads((tmp_path / "1.json").read_text())["message"]["message"] == "PlanError: the cause"


def test_without_torchrun_there_is_nobody_to_leave_a_reason_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    record_reason("nobody reads this")


def test_a_process_without_a_stdout_still_says_its_last_words() -> None:
    """Python has none where it was closed; what other runs wait for is released all the same."""
    script = (
        "import os, sys; from megatron_kaiyuan.host.endings import end_process; sys.stdout = None\n"
        "end_process(3, lambda: os.write(2, b'released'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (3, b"released")
