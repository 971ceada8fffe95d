"""What a rank keeps in its GPU for the whole run, as a lower bound: weights, gradients and optimizer state.

Bytes a parameter: 2 for an FP16 or bf16 weight (4 in FP32), 4 for its gradient sum in FP32 (else that of the weight),
8 for Adam's moments and 4 for the FP32 master weight; the last two are spread over the data-parallel ranks by the
distributed optimizer. Activations come on top and depend on the batch, so a run that passes may still not fit.
"""

import argparse

from megatron_kaiyuan.host.devices import require_memory
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.model.config import kaiyuan_config_from_args
from megatron_kaiyuan.model.parameters import count_parameters

__all__ = ["check_memory", "least_bytes"]

_ELSEWHERE = ("use_megatron_fsdp", "use_torch_fsdp2", "fp8_param_gather", "fp4_param_gather", "num_experts")
"""With these a rank keeps less than all of its weights and gradients, or what it keeps is not counted here."""
_SMALLER_OPTIMIZER = ("optimizer_cpu_offload", "use_precision_aware_optimizer")


def check_memory(args: argparse.Namespace) -> None:
    """Refuse a model whose weights, gradients and optimizer state alone exceed the GPU.

    Raises:
        KaiyuanError: the GPU has less memory, or other processes have left less.
    """
    config = kaiyuan_config_from_args(args)
    if config.num_moe_experts or config.multi_latent_attention:
        return
    tied = not args.untie_embeddings_and_output_weights
    parameters = count_parameters(config, args.padded_vocab_size, tied_embeddings=tied).total
    parts = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    require_memory(
        least_bytes(args, parameters),
        f"weights, gradients and optimizer state of {counted(parameters, 'parameter')} in {parts} "
        f"part{'s' * (parts > 1)}",
        "use GPUs with more memory, more of them with --use-distributed-optimizer, or a larger "
        "--tensor-model-parallel-size or --pipeline-model-parallel-size",
    )


def least_bytes(args: argparse.Namespace, parameters: int) -> float:
    """Return the bytes that the average rank keeps of a model of so many parameters, 0 if not known."""
    if any(getattr(args, name, None) for name in _ELSEWHERE):
        return 0.0
    half = args.fp16 or args.bf16
    weight = 2 if half else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else weight
    optimizer = 0.0
    if args.optimizer == "adam" and not any(getattr(args, name, None) for name in _SMALLER_OPTIMIZER):
        optimizer = (12 if half else 8) / (args.data_parallel_size if args.use_distributed_optimizer else 1)
    parts = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    return float(parameters / parts * (weight + gradient + optimizer))
