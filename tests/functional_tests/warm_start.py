"""Run modules and scripts of ours as `python` would, in processes that have done their imports (`tests/warm.py`)."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.warm import as_torchrun_sets, fresh_processes, take_environment

__all__ = ["run_warm"]

_PATIENCE = 20
"""Seconds that the other ranks have after one has failed."""


def run_warm(
    program: str, arguments: Sequence[str], folder: Path, *, ranks: int = 1, timeout: float = 240
) -> tuple[int, str]:
    """Run a module or a script in `folder` to its end, as so many ranks of one group.

    Returns:
        The first exit code that is not 0, or 0; and what was printed on both streams.
    """
    from torch.distributed import TCPStore

    output = folder / "printed.txt"
    output.write_text("")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
    running: list[BaseProcess] = []
    for rank in range(ranks):
        group = {} if store is None else as_torchrun_sets(rank, ranks, store.port)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **group}
        process = fresh_processes().Process(
            target=_become, args=([program, *arguments], str(folder), environment, str(output))
        )
        process.start()
        running.append(process)
    return _wait(running, time.monotonic() + timeout), output.read_text()


def _wait(running: list[BaseProcess], deadline: float) -> int:
    """Wait until all have ended; what is left at the deadline, or by another rank's failure, is killed."""
    failed = 0
    while running and time.monotonic() < deadline:
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode and not failed:
                failed, deadline = process.exitcode, time.monotonic() + _PATIENCE
        time.sleep(0.01)
    for process in running:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return failed or (-signal.SIGKILL if running else 0)


def _become(argv: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Run the program as the interpreter would, and leave as it would."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the fork server's is inherited otherwise, by loaders too
    nothing, printed = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_APPEND)
    for ours, theirs in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(ours, theirs)
    os.chdir(folder)
    take_environment(environment)
    sys.argv = argv
    code = _run(argv[0])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(program: str) -> int:
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
