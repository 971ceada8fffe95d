"""How fast the processes of a node exchange data: `torchrun --nproc-per-node N -m megatron_kaiyuan.host.bandwidth`."""

import json
import os
import sys
import time
from datetime import timedelta

import torch
from torch import distributed

from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.host.cli import run_tool
from megatron_kaiyuan.host.devices import start_device

__all__ = ["main"]

_ROUNDS = 5
_GPU_BYTES, _CPU_BYTES = 2**28, 2**22


def main() -> None:
    """Print the bus bandwidth of an all-reduce over all ranks in bytes a second, as JSON, on rank 0.

    Bus bandwidth as nccl-tests defines it: the bytes of the tensor times 2 (n - 1) / n, divided by the seconds.
    """
    start_device()
    on_cpu = cpu_platform.is_installed()
    device = torch.device("cpu" if on_cpu else f"cuda:{os.environ['LOCAL_RANK']}")
    if not on_cpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("gloo" if on_cpu else "nccl", timeout=timedelta(seconds=60))
    size, ranks = _CPU_BYTES if on_cpu else _GPU_BYTES, distributed.get_world_size()
    values = torch.zeros(size // 4, dtype=torch.float32, device=device)
    distributed.all_reduce(values)  # connects the ranks
    seconds = []
    for _ in range(_ROUNDS):
        _wait(on_cpu)
        begin = time.perf_counter()
        distributed.all_reduce(values)
        _wait(on_cpu)
        seconds.append(time.perf_counter() - begin)
    if distributed.get_rank() == 0:
        moved = size * 2 * (ranks - 1) / ranks
        print(json.dumps({"ranks": ranks, "bytes_a_second": moved / sorted(seconds)[_ROUNDS // 2]}))
    distributed.destroy_process_group()


def _wait(on_cpu: bool) -> None:  # noqa: FBT001
    distributed.barrier()
    if not on_cpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(run_tool(main))
