"""Several processes in one test, `run_distributed(function, world_size, *args)`, and a disk that is full."""

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tests.warm import as_torchrun_sets, fresh_processes, take_environment


def run_distributed(function: Callable[..., Any], world_size: int, *args: object, timeout: float = 120.0) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` fresh processes that form one group: gloo, or NCCL if GPUs are seen.

    Each process has one thread and a GPU of its own, or the CPU platform with Megatron imported (`tests/warm.py`).
    `function` must be defined at the top level of a module, and its arguments and results must pickle.

    Args:
        function: Called in every process with its rank first.
        world_size: Number of processes.
        *args: Handed on to `function`.
        timeout: Seconds for all processes together.

    Returns:
        What `function` returned on ranks 0, 1, ...

    Raises:
        AssertionError: A rank failed (the text holds its traceback), died, or the time ran out. No process is left.
    """
    from torch.distributed import TCPStore

    # Listens from here on, as torchrun's does: a port that is only looked up may be another's when rank 0 wants it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = fresh_processes()
    workers: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(theirs, dict(os.environ), rank, world_size, store.port, function, args)
            )
            process.start()
            theirs.close()
            workers.append((process, ours))
        return _collect(workers, time.monotonic() + timeout, timeout)
    finally:
        for process, connection in workers:
            assert process.pid is not None
            process.kill()
            with suppress(ProcessLookupError):  # what the rank has started and left, as Megatron's saves do
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            process.close()
            connection.close()


def _collect(workers: list[tuple[BaseProcess, Connection]], deadline: float, timeout: float) -> list[Any]:
    """Results by rank; the first failure is raised at once, for the other ranks may wait for the failed one forever."""
    results: dict[int, Any] = {}
    rank_of = {connection: rank for rank, (_, connection) in enumerate(workers)}
    while len(results) < len(workers):
        pending = [connection for connection, rank in rank_of.items() if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {[rank_of[c] for c in pending]} did not finish within {timeout:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            results[rank_of[connection]] = _receive(connection, rank_of[connection], workers)
    return [results[rank] for rank in range(len(workers))]


def _receive(connection: Connection, rank: int, workers: list[tuple[BaseProcess, Connection]]) -> Any:
    try:
        succeeded, value = connection.recv()
    except EOFError:
        process = workers[rank][0]
        process.join(timeout=5)
        raise AssertionError(f"rank {rank} died without a word; exit code {process.exitcode}") from None
    if not succeeded:
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value


def _run_rank(
    connection: Connection,
    environment: dict[str, str],
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[object, ...],
) -> None:
    """The life of one process: report `(True, result)` or `(False, traceback)`, then leave the group.

    In this order: leaving first would make the waiting ranks fail before the rank with the reason has spoken.
    """
    os.setsid()
    try:
        take_environment(environment)
        os.environ.update(
            as_torchrun_sets(rank, world_size, port), OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1"
        )
        _join_group()
        connection.send((True, function(rank, *args)))
    except BaseException:  # SystemExit too: Megatron leaves through sys.exit
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
        _leave_group()


def _join_group() -> None:
    import torch

    from megatron_kaiyuan.host import cpu_platform

    torch.set_num_threads(1)
    if cpu_platform.install():
        torch.distributed.init_process_group("gloo")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device)


def _leave_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes, as a full disk or a quota does (EFBIG)."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
