"""The process runner itself: a test that cannot fail would hide every distributed bug."""

import os
import subprocess
import sys
import time

import pytest

from tests.helpers import run_distributed


def _sum_of_ranks(rank: int, offset: int) -> tuple[int, float, str]:
    import torch

    value = torch.tensor([float(rank + offset)], device="cuda")
    torch.distributed.all_reduce(value)
    return rank, value.item(), os.environ["SAID_BY_THE_TEST"]


def _fail_on_rank_one(rank: int) -> None:
    import torch

    if rank == 1:
        raise ZeroDivisionError("the reason")
    torch.distributed.barrier()


def _die(rank: int) -> None:
    os._exit(7)


def _sleep(rank: int) -> None:
    time.sleep(60)


@pytest.mark.distributed
def test_every_rank_gets_the_arguments_and_environment_and_returns_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is that of the test, though the process was forked from one that is older."""
    for said in ("one", "two"):
        monkeypatch.setenv("SAID_BY_THE_TEST", said)
        assert run_distributed(_sum_of_ranks, 2, 10) == [(0, 21.0, said), (1, 21.0, said)]


@pytest.mark.distributed
def test_the_traceback_of_a_failing_rank_is_raised_while_the_other_ranks_wait_for_it() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed:.*_fail_on_rank_one.*ZeroDivisionError: the reason"):
        run_distributed(_fail_on_rank_one, 2)


@pytest.mark.distributed
def test_a_rank_that_dies_is_reported_with_its_exit_code() -> None:
    with pytest.raises(AssertionError, match="rank 0 died without a word; exit code 7"):
        run_distributed(_die, 1)


@pytest.mark.distributed
def test_a_rank_that_hangs_is_ended_after_the_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0\] did not finish within 4 s"):
        run_distributed(_sleep, 1, timeout=4)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("module", ["benchmarks.training_throughput", "benchmarks.scaling", "studies.order_study"])
def test_a_benchmark_that_borrows_from_the_tests_keeps_its_device(module: str) -> None:
    code = f"import os, {module}; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('KAIYUAN_DEVICE'))"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "KAIYUAN_DEVICE")
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["None", "None"]
