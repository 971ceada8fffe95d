"""What checksums cost a save, and how fast a start compares them.

`python -m benchmarks.checkpoint_checksums --gigabytes 3 --processes 2 --folder DIR` from the repository root. Each
process saves its share of random FP32 tensors through Megatron's own `torch_dist` writer, in turn with and without
checksums, so that the disk's moods fall on both. The first pair, in which the disk's cache fills, is not counted. On a
machine that others use the pairs say little; what a save waited for its sums is measured inside it.
"""

import argparse
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.helpers import run_distributed

TENSORS = 16


def save_in_turn(rank: int, gigabytes: float, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each save with and without checksums, and of one comparison, on this rank."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from megatron_kaiyuan.checkpoints.checksums import find_difference, read_checksums
    from megatron_kaiyuan.checkpoints.megatron_files import write_checkpoints_to_stay
    from megatron_kaiyuan.training import compat

    world = torch.distributed.get_world_size()
    values = int(gigabytes * 1e9 / 4 / TENSORS) // world
    tensors = [torch.randn(values) for _ in range(TENSORS)]
    name = "_get_save_and_finalize_callbacks"
    plain = getattr(TorchDistSaveShardedStrategy, name)
    compat.write_checkpoints(asynchronous=False)
    write_checkpoints_to_stay(argparse.Namespace(enable_msc=False))
    summed = getattr(TorchDistSaveShardedStrategy, name)

    seconds: dict[str, Any] = {"with": [], "without": [], "waited": []}
    waited = watch_waiting()
    for number in range(2 * rounds + 2):
        kind = "without" if number % 2 else "with"
        setattr(TorchDistSaveShardedStrategy, name, summed if kind == "with" else plain)
        filesystem_async.open = open  # the layout in which the plain writer gets it
        target = folder / f"iter_{number:07d}"
        if rank == 0:
            target.mkdir(parents=True)
        torch.distributed.barrier()
        state = {
            f"w{place}": ShardedTensor.from_rank_offsets(f"w{place}", tensor, (0, rank, world))
            for place, tensor in enumerate(tensors)
        }
        waited.clear()
        began = time.perf_counter()
        dist_checkpointing.save(state, str(target))
        torch.distributed.barrier()
        if number > 1:
            seconds[kind].append(time.perf_counter() - began)
            if kind == "with":
                seconds["waited"].append(sum(waited))
        if rank == 0 and number == 2 * rounds:  # the last one with checksums
            sums = read_checksums(target)
            assert sums is not None, "it was saved with checksums"
            began = time.perf_counter()
            assert find_difference(target, sums) is None, "it is as it was saved"
            seconds["compare"] = time.perf_counter() - began
        if rank == 0:
            shutil.rmtree(target)
        torch.distributed.barrier()
    return seconds


def watch_waiting() -> list[float]:
    """Return a list that receives the seconds of each time that a save waits for its sums, or collects them."""
    from megatron_kaiyuan.checkpoints import checksums, megatron_files

    found: list[float] = []

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                found.append(time.perf_counter() - began)

        return call

    class TimedPool(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            future = super().submit(*args, **kwargs)
            future.result = timed(future.result)
            return future

    checksums.ThreadPoolExecutor = TimedPool
    megatron_files._finish = timed(megatron_files._finish)
    return found


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the whole checkpoint")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk in question; must not exist")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"--folder {options.folder} exists; name a new one")
    try:
        ranks = run_distributed(
            save_in_turn, options.processes, options.gigabytes, options.folder, options.rounds, timeout=1800
        )
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    told = ranks[0]
    pairs = list(zip(told["with"], told["without"], strict=True))
    for with_sums, without in pairs:
        print(f"  {with_sums:.2f} s with checksums, {without:.2f} s without")
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    extra = statistics.median(with_sums / without - 1 for with_sums, without in pairs)
    waits = statistics.median(wait / whole for wait, whole in zip(told["waited"], told["with"], strict=True))
    print(
        f"{options.gigabytes:g} GB, {options.processes} processes: {medians[0]:.2f} s with checksums, "
        f"{medians[1]:.2f} s without; median of the pairs {extra:+.1%}; waited for sums {waits:.2%} of the save; "
        f"comparing takes {told['compare']:.2f} s in one process ({options.gigabytes / told['compare']:.1f} GB/s)"
    )


if __name__ == "__main__":
    main()
