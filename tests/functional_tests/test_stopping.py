"""Runs that are stopped, or started twice, end as they should; what takes minutes is in benchmarks/faults.py."""

import re
import signal
from pathlib import Path

import pytest

from megatron_kaiyuan.checkpoints.hold import HOLD_NAME
from tests.functional_tests.kill_and_resume import flags_of, lengthen, saved_step
from tests.functional_tests.stopped_run import running
from tests.functional_tests.training_run import write_corpus


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so many steps that no run here comes to its end."""
    plan = write_corpus(tmp_path_factory.mktemp("corpus"))
    lengthen(plan, 600)
    return plan


def reached_step(output: str) -> int:
    """The last step that a run has logged."""
    return int(re.findall(r"\] iteration +(\d+)/", output)[-1])


def test_a_second_start_is_refused_and_an_interrupt_saves_the_first(plan: Path, tmp_path: Path) -> None:
    """One process with a loader worker, after two earlier saves."""
    flags = [*flags_of(plan, 2), "--num-workers", "1"]
    with running(tmp_path, *flags) as first:
        first.wait_for("successfully saved", times=2)
        with running(tmp_path, *flags) as second:
            code, _ = second.end(timeout=120)
        assert code == 1
        assert (
            f"ResumeError: --save {tmp_path}/saved is in use by another run: process {first.process.pid} on"
            in second.output
        )
        assert "Traceback" not in second.output
        first.process.send_signal(signal.SIGINT)
        code, seconds = first.end(timeout=60)
    assert code == 0, first.output[-3000:]
    assert seconds < 30
    assert "exiting program after receiving SIGINT" in first.output
    assert "Traceback" not in first.output
    assert saved_step(tmp_path) == reached_step(first.output) > 4
    assert not (tmp_path / "saved" / HOLD_NAME).exists()
