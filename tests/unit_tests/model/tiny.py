"""Tiny Megatron models for the tests, built and run inside the processes of `run_distributed`.

Megatron and our model are imported inside the functions: the test process itself must stay free of the CPU platform.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.unit_tests.model.reference import Features, Shape, random_batch, random_weights

LOSS_SCALE = 1024.0
"""Gradients are scaled by this and unscaled in FP64, as a loss scaler does, to keep FP16 ones from underflowing."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and how it is split."""

    name: str
    shape: Shape = field(default_factory=Shape)
    features: Features = field(default_factory=Features)
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    half: bool = False
    bf16: bool = False
    implementation: str = "local"
    attention: str = "auto"
    fusions: str = "none"
    branch_scale_bits: int = 0
    raised_to: int | None = None
    """The branch scale of the step, in a model that was built for one that may rise."""
    recompute_swiglu: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    """More fields of the transformer config."""
    factors: dict[str, float] = field(default_factory=dict)
    """Factors on the weights whose names contain the key, as far as FP16 can hold them."""

    def weights(self) -> dict[str, Tensor]:
        """The full weights, float64."""
        weights = random_weights(self.shape, self.features)
        if self.bf16:
            weights = {name: value.bfloat16().double() for name, value in weights.items()}
        for name, value in weights.items():
            for part, factor in self.factors.items():
                if part in name:
                    weights[name] = (value * factor).clamp(-65504, 65504).half().double()
        return weights

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.float16 if self.half else torch.bfloat16 if self.bf16 else torch.float32


@dataclass
class Outcome:
    """What one rank saw."""

    loss: Tensor | None
    """[b, s], on the last pipeline stage."""
    gradients: dict[str, Tensor]
    """This rank's shards under the whole model's names."""
    split: dict[str, int]
    """The dimension along which a weight is split over the tensor-parallel ranks; -1 = replicated."""
    tensor_rank: int


def portable(value: Any) -> Any:
    """The same with arrays for tensors: a tensor would travel as a handle that dies with the process that sent it."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {key: portable(entry) for key, entry in value.items()}
    return [portable(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def unpacked(value: Any) -> Any:
    """Undo `portable`, but for tuples, which stay lists."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: unpacked(entry) for key, entry in value.items()}
    return [unpacked(entry) for entry in value] if isinstance(value, list) else value


def initialize_parallel(tensor_parallel: int, pipeline_parallel: int) -> None:
    """Make Megatron's process groups, unless they are there, and its random state anew."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    there = parallel_state.model_parallel_is_initialized() and (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if there != (tensor_parallel, pipeline_parallel):  # each set of groups keeps its communicators, and GPU memory
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
    model_parallel_cuda_manual_seed(1234)


def build_config(case: Case) -> Any:
    """The case's transformer config."""
    from megatron_kaiyuan.model.config import KaiyuanModelOptions, KaiyuanTransformerConfig

    shape, features = case.shape, case.features
    values: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_size,
        "ffn_hidden_size": shape.ffn,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.epsilon,
        "qk_layernorm": features.qk_norm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "transformer_impl": case.implementation,
        "tensor_model_parallel_size": case.tensor_parallel,
        "pipeline_model_parallel_size": case.pipeline_parallel,
        "fp16": case.half,
        "bf16": case.bf16,
        "params_dtype": case.dtype,
        "pipeline_dtype": case.dtype,
        "kaiyuan": KaiyuanModelOptions(
            sandwich_norm=features.sandwich,
            branch_scale_bits=case.branch_scale_bits,
            raise_branch_scale_below=0.0 if case.raised_to is None else 8.0,
            recompute_swiglu=case.recompute_swiglu,
            logit_softcap=features.softcap,
            z_loss=features.z_loss,
            attention=case.attention,
            fusions=case.fusions,
        ),
    }
    return KaiyuanTransformerConfig(**(values | case.overrides))


def builder_arguments(shape: Shape) -> argparse.Namespace:
    """What the builder reads from Megatron's arguments beside the config."""
    return argparse.Namespace(
        yaml_cfg=None,
        spec=None,
        fp16_lm_cross_entropy=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=shape.rotary_base,
        make_vocab_size_divisible_by=1,
        use_rope_scaling=False,
        rotary_seq_len_interpolation_factor=None,
        max_position_embeddings=shape.sequence,
        untie_embeddings_and_output_weights=True,
        padded_vocab_size=shape.vocab,
        vocab_size=None,
    )


def build_stage(case: Case) -> Any:
    """This rank's stage, with Megatron's initial weights, in the case's precision, not wrapped."""
    from megatron.core import parallel_state

    from megatron_kaiyuan.model.builder import kaiyuan_builder

    model = kaiyuan_builder(
        builder_arguments(case.shape),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        config=build_config(case),
    )
    if case.raised_to is not None:
        for layer in model.decoder.layers:
            layer.set_branch_scale(2.0**-case.raised_to)
    return model.to("cuda", case.dtype)  # the CPU platform's, where there is no other


def split_dimension(parameter: Any) -> int:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1


def shard(name: str, full: Tensor, dimension: int, rank: int, size: int) -> Tensor:
    """One tensor-parallel rank's part of a full weight; gate and up of the MLP are split each by itself."""
    if dimension < 0 or size == 1:
        return full
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size, dimension)[rank] for half in full.chunk(2, dimension)], dimension)
    return full.chunk(size, dimension)[rank]


def reference_name(name: str) -> str:
    """The reference's name of a weight; Transformer Engine keeps the norm before a matrix product in its module."""
    fused = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    }
    for theirs, ours in fused.items():
        name = name.replace(theirs, ours)
    return name


def load_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Copy this rank's parts of the full weights into the model, all of them and nothing else."""
    from megatron.core import parallel_state

    from megatron_kaiyuan.monitoring.diagnosis import global_name

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for local, parameter in model.named_parameters():
            name = reference_name(global_name(model, local))
            parameter.copy_(shard(name, weights[name], split_dimension(parameter), rank, size))


def train_step(case: Case) -> Outcome:
    """One forward and backward pass of one batch through Megatron's own schedule and gradient finalisation."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_kaiyuan.monitoring.diagnosis import global_name
    from megatron_kaiyuan.training.compat import fuse_weight_gradients_without_apex

    fuse_weight_gradients_without_apex()
    model = build_stage(case)
    load_weights(model, case.weights())
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(overlap_grad_reduce=True), model)
    wrapped.config.grad_scale_func = lambda loss: loss * LOSS_SCALE
    wrapped.config.finalize_model_grads_func = finalize_model_grads
    tokens, labels = (part.cuda() for part in random_batch(case.shape))
    kept: list[Tensor] = []

    def forward_step(_iterator: Any, stage: Any) -> Any:
        positions = torch.arange(case.shape.sequence, device="cuda").expand_as(tokens)
        fused = getattr(model, "fused_loss", None)
        extra = {} if fused is None else {"output_processor": fused}
        output = stage(
            tokens, positions, None, labels=labels, loss_mask=torch.ones(labels.shape, device="cuda"), **extra
        )

        def mean_loss(loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            kept.append(loss.detach().double())
            return loss.float().mean(), {}

        def mean_of_fused(total: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            kept.append(output[1].double())
            return total / labels.numel(), {}

        return (output[0], mean_of_fused) if isinstance(output, tuple) else (output, mean_loss)

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[wrapped],
        num_microbatches=1,
        seq_length=case.shape.sequence,
        micro_batch_size=case.shape.batch,
        forward_only=False,
    )
    named = [(reference_name(global_name(model, name)), parameter) for name, parameter in model.named_parameters()]
    return Outcome(
        loss=kept[0] if kept else None,
        gradients={name: parameter.main_grad.double() / LOSS_SCALE for name, parameter in named},
        split={name: split_dimension(parameter) for name, parameter in named},
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
    )


def train_steps(_rank: int, cases: list[Case]) -> dict[str, Any]:
    """Entry of `run_distributed`: every case in turn, by name; `outcomes_of` restores the outcomes."""
    results = {}
    for case in cases:
        initialize_parallel(case.tensor_parallel, case.pipeline_parallel)
        results[case.name] = portable(vars(train_step(case)))
    return results


def outcomes_of(results: dict[str, Any]) -> dict[str, Outcome]:
    """What `train_steps` returned on one rank."""
    return {name: Outcome(**unpacked(entries)) for name, entries in results.items()}


def count_parameters_both_ways(_rank: int, cases: list[Case]) -> dict[str, tuple[int, int]]:
    """Entry of `run_distributed`: parameters of the built model and by the formula, by case."""
    from megatron_kaiyuan.model.parameters import count_parameters

    initialize_parallel(1, 1)
    counts = {}
    for case in cases:
        model = build_stage(case)
        built = sum(parameter.numel() for parameter in model.parameters())
        counts[case.name] = (built, count_parameters(model.config, case.shape.vocab).total)
    return counts
