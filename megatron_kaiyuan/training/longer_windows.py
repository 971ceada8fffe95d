"""Phases with longer windows: how the samples of one are put together again, and which flags allow it.

Everything that is counted, from the data loader to the checkpoints, is a sample of the plan's `seq_length`. A phase
with a longer one has windows of several samples, which follow one another. So each micro-batch holds whole windows
where its size and the phase's first sample are multiples of their number. A micro-batch then has the same tokens in
every phase, in fewer and longer sequences; so has a global batch. Shapes: m = micro-batch, s = `seq_length`, k =
samples of a window.
"""

import argparse
from collections.abc import Mapping
from math import gcd, lcm

import torch
from megatron.core import parallel_state
from megatron.training import training
from torch import Tensor

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.terminal import counted

__all__ = [
    "SAMPLES_OF_WINDOW",
    "agreed_samples",
    "check_longer_windows",
    "joined",
    "joined_counts",
    "samples_of_window",
]

SAMPLES_OF_WINDOW = "samples_of_window"
"""Key of a batch: k of each of its samples, int64 `[m]`. Only plans whose phases differ have it."""


def samples_of_window(batch: Mapping[str, Tensor | None]) -> int:
    """Samples that each window of a batch, as it was loaded, consists of."""
    each = batch.get(SAMPLES_OF_WINDOW)
    if each is None:
        return 1
    assert bool((each == each[0]).all()), "micro-batches end where phases do"
    return int(each[0])


def agreed_samples(own: int) -> int:
    """Return what the first of the tensor-parallel ranks says, who alone has loaded the batch."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return own
    group, source = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_src_rank(),
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    told = torch.tensor([own], device=device)
    torch.distributed.broadcast(told, source, group=group)
    return int(told)


def joined(batch: Mapping[str, Tensor | None], samples: int) -> dict[str, Tensor | None]:
    """Tensors `[m, s]` as `[m / k, k s]`: the samples of each window one after another."""
    return {key: None if some is None else some.reshape(-1, samples * some.shape[1]) for key, some in batch.items()}


def joined_counts(numbers: Tensor, counts: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Source numbers `[m]` and tokens by band `[m, bands]` of samples as those of their windows, `[m / k]` and more."""
    return numbers[::samples], counts.reshape(-1, samples, counts.shape[1]).sum(1)


def count_operations(samples: int, micro_batch_size: int, seq_length: int) -> None:
    """Tell Megatron's count of operations how long the windows of a micro-batch are.

    Args:
        samples: of each window.
        micro_batch_size: samples of the micro-batch.
        seq_length: of a sample.
    """
    ends = torch.arange(0, micro_batch_size + 1, samples) * seq_length
    training.update_seqlen_stats_from_cu_seqlens(ends)


def check_longer_windows(args: argparse.Namespace, plan: Plan) -> None:
    """Refuse flags under which a micro-batch could hold part of a window, or two lengths.

    Args:
        args: Megatron's validated arguments.
        plan: The plan of the run.

    Raises:
        ConfigError: names the flag and a value that works.
    """
    if plan.longest == plan.seq_length:
        return
    if args.max_position_embeddings < plan.longest:
        raise ConfigError(
            f"--max-position-embeddings {args.max_position_embeddings}, but the plan has windows of "
            f"{counted(plan.longest, 'token')}; give at least as many"
        )
    _check_micro_batch(args.micro_batch_size, plan)
    unfit = {
        f"--cuda-graph-impl {args.cuda_graph_impl}": args.cuda_graph_impl != "none",
        "--create-attention-mask-in-dataloader": args.create_attention_mask_in_dataloader,
        "--pipeline-model-parallel-size above 1": args.pipeline_model_parallel_size > 1,
    }
    for flag, is_on in unfit.items():
        if is_on:
            raise ConfigError(
                f"{flag} needs sequences of one length, and phases of the plan differ in seq_length; leave it out, or "
                "make the phases two plans: --finetune starts the second from the weights of the first"
            )


def _check_micro_batch(size: int, plan: Plan) -> None:
    each = [phase.samples_per_window for phase in plan.phases]
    if size % lcm(*each):
        raise ConfigError(
            f"--micro-batch-size {size} counts samples of {counted(plan.seq_length, 'token')}, and the plan has "
            f"windows of up to {plan.longest}; give a multiple of {lcm(*each)}, which are as many tokens in every phase"
        )
    for before, phase in zip(plan.phases, plan.phases[1:], strict=False):
        over = phase.first_sample % size
        if before.samples_per_window != phase.samples_per_window and over:
            step = lcm(size, before.samples_per_window)
            kept = before.num_samples - _excess(phase.first_sample, before.samples_per_window, size)
            raise ConfigError(
                f"--micro-batch-size {size}: phase {phase.name!r} has windows of another length and begins at sample "
                f"{phase.first_sample:,}, inside of a micro-batch; give phase {before.name!r} tokens: "
                f"{kept * plan.seq_length} or {(kept + step) * plan.seq_length}"
            )


def _excess(end: int, each: int, size: int) -> int:
    """Samples, whole windows of `each`, after which `end` is a multiple of `size`."""
    return next(each * count for count in range(size // gcd(each, size) + 1) if (end - each * count) % size == 0)
