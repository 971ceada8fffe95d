"""A rank does not wait for a process that writes its checkpoints once that is gone."""

import multiprocessing
import queue
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_kaiyuan.checkpoints.save_helper import _join, _require_alive, _require_result
from megatron_kaiyuan.errors import SaveError

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def helper() -> Iterator[BaseProcess]:
    process = SPAWN.Process(target=time.sleep, args=(60,))
    process.start()
    yield process
    process.kill()
    process.join()


def test_a_task_of_a_killed_helper_is_not_waited_for(helper: BaseProcess) -> None:
    tasks: Any = SPAWN.JoinableQueue()
    _join(tasks, helper)  # nothing to wait for
    tasks.put(0)
    _require_alive(helper)
    helper.kill()
    began = time.monotonic()
    with pytest.raises(SaveError, match=r"process \d+\) was killed by signal 9: .* ran out of memory") as raised:
        _join(tasks, helper)
    assert time.monotonic() - began < 5
    assert raised.value.of_one_rank


def test_a_result_that_came_before_the_helper_ended_counts(helper: BaseProcess) -> None:
    results: queue.Queue[int] = queue.Queue()
    caller = SimpleNamespace(process=helper, cur_item=None, _persistent_comp_q=results)
    _require_result(caller)
    results.put(7)
    helper.kill()
    helper.join()
    _require_result(caller)
    assert caller.cur_item == 7
    caller.cur_item = None
    with pytest.raises(SaveError, match="leave --async-save out"):
        _require_result(caller)
