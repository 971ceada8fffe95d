"""A model from a checkpoint alone, in one process: for evaluation, generation and conversion.

The checkpoint carries the arguments of its run, and `torch_dist` tensors know no parallel layout, so nothing else is
needed: the model is built by the run's own builder and filled through Megatron's `dist_checkpointing`. No global
argument namespace is set. Import this after `cpu_platform.install()`.
"""

import argparse
from copy import copy
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.transformer.module import Float16Module
from torch._C._distributed_c10d import HashStore  # torch.distributed re-exports it without saying so

from megatron_kaiyuan.arguments import defaults_without_optional_kernels
from megatron_kaiyuan.checkpoints.fitting import misfit, stored_shapes, wanted_shapes
from megatron_kaiyuan.checkpoints.megatron_files import open_checkpoints_as_data
from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.model.builder import kaiyuan_builder
from megatron_kaiyuan.model.config import kaiyuan_config_from_args
from megatron_kaiyuan.model.products import keep_partial_sums_in_fp32

__all__ = [
    "bare_model",
    "build_untrained",
    "load_model",
    "load_weights",
    "read_weights",
    "single_process_arguments",
    "start_single_process",
]

_ONE_RANK: dict[str, object] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "data_parallel_size": 1,
    "world_size": 1,
    "rank": 0,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
}
"""Arguments of a run on many ranks that a single process changes; none changes the function that the model computes."""


def start_single_process() -> None:
    """Make this process a group of one, which Megatron's layers ask for.

    A second call changes nothing.
    """
    if not torch.distributed.is_initialized():
        backend = "gloo" if cpu_platform.is_installed() else "nccl"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def single_process_arguments(saved: argparse.Namespace) -> argparse.Namespace:
    """Arguments of a checkpoint, changed where one process on this machine needs other values."""
    arguments = copy(saved)
    changes = dict(_ONE_RANK)
    changes.update(defaults_without_optional_kernels())
    # Nothing is trained here, and which kernels compute it is this machine's affair, not the checkpoint's.
    changes.update(gradient_accumulation_fusion=False, kaiyuan_fusions="auto")
    if cpu_platform.is_installed():
        changes.update(cpu_platform.CPU_ARGUMENT_DEFAULTS)
    for name, value in changes.items():
        setattr(arguments, name, value)
    return arguments


def build_untrained(arguments: argparse.Namespace) -> Any:
    """Build the model with untrained weights.

    They are of the distribution of the run's initial weights and repeat exactly, but they are another draw: what the
    training loop does before it builds its model uses the random state too.

    Args:
        arguments: From `single_process_arguments`; `start_single_process` was called.

    Returns:
        The model in evaluation mode, in the precision of its run.
    """
    torch.manual_seed(arguments.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(arguments.seed)
    if arguments.fp16:
        keep_partial_sums_in_fp32()
    model = kaiyuan_builder(arguments, pre_process=True, post_process=True).cuda()
    if arguments.fp16 or arguments.bf16:
        model = Float16Module(kaiyuan_config_from_args(arguments), model)
    model.eval()
    return model


def load_weights(model: Any, checkpoint: Checkpoint) -> None:
    """Fill a model, or one rank's part of it, with the weights of a checkpoint.

    All ranks call it together.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    bare_model(model).load_state_dict(read_weights(model, checkpoint))


def read_weights(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a model, or one rank's part of it, would be filled with, keyed with tensor names.

    All ranks call it together. Its tensors may be those of the model itself, filled in place.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    wanted = bare_model(model).sharded_state_dict()
    if difference := misfit(wanted_shapes(wanted), stored_shapes(checkpoint)):
        raise ConfigError(f"{checkpoint.folder}: {difference}; it is of another model than its arguments say")
    open_checkpoints_as_data()
    state = dist_checkpointing.load(wanted, str(Path(checkpoint.folder)))
    return {name: state[name] for name in wanted}


def bare_model(model: Any) -> Any:
    """The model without what half precision and data parallelism wrap around it."""
    while hasattr(model, "module"):
        model = model.module
    return model


def load_model(checkpoint: Checkpoint) -> tuple[Any, int]:
    """The model of a checkpoint in evaluation mode, and the longest context it takes, in tokens.

    Raises:
        ConfigError: the checkpoint holds no arguments of a run, or is of another model than they say.
    """
    start_single_process()
    arguments = single_process_arguments(checkpoint.arguments)
    model = build_untrained(arguments)
    load_weights(model, checkpoint)
    return model, int(arguments.max_position_embeddings)
