"""The process that writes checkpoints beside the training (`--async-save`), which no rank waits for in vain."""

import contextlib
import functools
import queue
import sys
import time
from typing import Any

from megatron_kaiyuan.errors import SaveError
from megatron_kaiyuan.host.parent_death import become_helper

# Nothing above imports Megatron: the helper imports this module first, and the CPU platform comes before Megatron.

__all__ = ["serve_saves", "watch_save_helper"]

_POLL = 0.1
_LAST_WORDS = 1.0
"""Seconds in which what a helper has sent before its end must have arrived."""


def serve_saves(*args: Any) -> None:
    """Run in the helper: write what the rank sends, until the rank says that it is done or ends."""
    from megatron_kaiyuan.host import cpu_platform

    become_helper()
    cpu_platform.install()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    try:
        PersistentAsyncCaller.async_loop(*args)
    except Exception as error:  # the rank learns that this process has ended, and not why
        print(f"the process that writes checkpoints: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def watch_save_helper() -> None:
    """End a rank in a sentence where the process that writes its checkpoints is gone.

    Megatron waits for it for ever.

    It also starts that process with a count of GPUs to divide by, which is zero on the CPU. A second call changes
    nothing.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller as Caller

    if Caller.async_loop is serve_saves:
        return
    schedule, is_done, get_process = Caller.schedule_async_call, Caller.is_current_async_call_done, Caller._get_process

    def started(*args: Any, **kwargs: Any) -> Any:
        process = get_process(*args, **kwargs)
        preloaded: Any = Caller._persistent_preload_q
        preloaded.join = functools.partial(_join, preloaded, process)
        return process

    @functools.wraps(schedule)
    def scheduled(self: Any, request: Any) -> None:
        _require_alive(self.process)
        schedule(self, request)

    @functools.wraps(is_done)
    def done(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:  # noqa: FBT001
        while not (is_over := bool(is_done(self, blocking=False, no_dist=no_dist))) and blocking:
            _require_result(self)
            time.sleep(_POLL)
        if not is_over:
            _require_result(self)
        return is_over

    Caller.async_loop = staticmethod(serve_saves)
    Caller._get_process = staticmethod(started)
    Caller.schedule_async_call = scheduled
    Caller.is_current_async_call_done = done


def _join(tasks: Any, process: Any) -> None:
    """`JoinableQueue.join` as long as somebody works on its tasks."""
    with tasks._cond:
        while not tasks._unfinished_tasks._semlock._is_zero():
            tasks._cond.wait(_POLL)
            _require_alive(process)


def _require_result(caller: Any) -> None:
    """Refuse to wait for a save of this rank that nobody works on, unless its result has come."""
    if caller.process is None or caller.cur_item is not None or caller.process.is_alive():
        return
    with contextlib.suppress(queue.Empty):
        caller.cur_item = caller._persistent_comp_q.get(timeout=_LAST_WORDS)
        return
    _require_alive(caller.process)


def _require_alive(process: Any) -> None:
    if process is None or process.is_alive():
        return
    how = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else f"ended with {process.exitcode}"
    raise SaveError(
        f"the process that writes checkpoints (--async-save; process {process.pid}) {how}: if no line above says why, "
        "the machine most likely ran out of memory; ask for more, or leave --async-save out, and start again",
        of_one_rank=True,
    )
