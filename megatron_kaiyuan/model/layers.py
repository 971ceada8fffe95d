"""RMSNorm with FP32 inside, and the transformer layer with a norm on both sides of each branch (sandwich norm).

Overflow: FP16 ends at 65 504. The square of any value above 255.9 is beyond that, so a mean of squares taken in FP16 is
    infinite long before the activations are. In a stock pre-norm layer nothing bounds what a branch adds to the
    residual stream: attention's `linear_proj` and the MLP's `linear_fc2` grow with training, and it sums 2L of them.
Bound: after the output norm each element of a branch is at most sqrt(h) * |gain|, its RMS at most |gain|. The stream's
    RMS is thus at most RMS(embedding) + 2 L max|gain|: 57 for 28 layers at gain 1, and about sqrt(2L) = 7.5 when the
    branches are uncorrelated. What is left unbounded are the products y before the norm (`linear_fc2` of
    silu(gate) * up, `linear_proj`). The norm makes their scale free: a gradient never holds it back, each step adds
    a part orthogonal to the weights, and so it grows, the faster the higher the learning rate.
Remedy: normalise `f(norm(x))` before it enters the stream, with squares, mean, reciprocal root and gain in FP32 and one
    rounding at the end. For y, `branch_scale_bits` K: RMSNorm(2^-K y; 4^-K eps) = RMSNorm(y; eps) exactly, so y can
    be computed 2^-K as large. The factor enters at the inputs of the two last products: inside SwiGLU, in FP32 before
    its rounding, where it costs nothing and holds silu(gate) * up too; and on attention's values. The products, their
    reduction over tensor-parallel ranks and their weight gradients then need nothing of their own, with any linear
    layer (Megatron's, Transformer Engine's). Weights stay as they are: K may change between two runs of a checkpoint.
    The gradients of y, of SwiGLU's output and of the values are 2^K as large, all others unchanged: while these are
    the largest ones, the loss scale settles up to K bits lower. They shrink again as y grows, being proportional to
    1 / |y|. Values below 2^(K - 14) become subnormal, with an error of at most 2^(K - 25): nothing beside the rounding
    of values near 1.
Cost: two more RMSNorms a layer, 2 h parameters a layer (114 688 for Kaiyuan-2B), read + write of 2 [s, b, h] a layer.
Upstream instead: Megatron-Core 0.19 has no output norms, and its `WrappedTorchNorm` refuses sequence parallelism.
Source: PCMind-2.1-Kaiyuan-2B (arXiv 2512.07612); Gemma 2 (arXiv 2408.00118); Pangu Ultra (arXiv 2504.07866).

Shapes: s = sequence (divided by TP under sequence parallelism), b = batch, h = hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.kernels.rms_norm import add_rms_norm, residual_rms_norm
from megatron_kaiyuan.kernels.swiglu import free_until_backward, swiglu
from megatron_kaiyuan.model.fused_attention import ScaledValueSelfAttention
from megatron_kaiyuan.model.hooks import weight_for_kernel

__all__ = ["FusedSwiGLUMLP", "KaiyuanLayerSubmodules", "KaiyuanTransformerLayer", "ResidualRMSNorm", "StableRMSNorm"]


class StableRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension: FP32 inside, output in the dtype of the gain.

    For inputs in the gain's dtype it is bit-identical to `torch.nn.RMSNorm`. Two things differ: an FP32 residual stream
    (`--fp32-residual-connection`) leaves it in the parameters' dtype, and the gain is marked for sequence parallelism,
    so that Megatron sums its gradient over the tensor-parallel ranks, each of which sees a part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (Megatron's parameter mark)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape [..., hidden_size].

        The output has the same shape and the gain's dtype.
        """
        if x.dtype == self.weight.dtype:
            # torch computes half inputs in FP32 and rounds once, on the CPU and on CUDA (tested near 65 504).
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        gain = self.weight.to(torch.promote_types(x.dtype, torch.float32))
        return functional.rms_norm(x.to(gain.dtype), gain.shape, gain, self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon, for `print(model)`."""
        return f"{self.weight.numel()}, eps={self.eps}"


class ResidualRMSNorm(StableRMSNorm):
    """The norm before a branch, which hands the residual stream on so that one kernel adds both gradients of it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # Megatron's layer takes either
        """Return `(norm(x), x)`.

        Where x has another dtype than the gain (an FP32 residual stream) it takes the unfused way.
        """
        if x.dtype != self.weight.dtype:
            return super().forward(x), x
        return residual_rms_norm(x, self.weight, self.eps)


class FusedSwiGLUMLP(MLP):
    """Megatron's dense MLP with SwiGLU as one kernel each way.

    With `branch_scale_bits` = K its output is scaled with 2^-K. With `recompute_swiglu` the backward pass of the second
    product makes SwiGLU's output again.
    """

    branch_scale: float = 1.0
    """2^-K, set by the layer, whose output norm takes it back."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h] and the bias of the second product."""
        config = self.config
        plain = config.gated_linear_unit and config.activation_func is functional.silu and not config.add_bias_linear
        special = (
            config.activation_func_clamp_value is not None or config.glu_linear_offset or config.use_te_activation_func
        )
        if not plain or special or per_token_scale is not None:
            unfused: tuple[Tensor, Tensor | None] = super().forward(hidden_states, per_token_scale, **kwargs)
            return unfused
        packed, _bias = self.linear_fc1(hidden_states)
        scale, fused = self.branch_scale, config.kaiyuan.fuses("swiglu")
        activation = swiglu(packed, scale, fused=fused)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(activation)
        if config.kaiyuan.recompute_swiglu:
            free_until_backward(activation, packed, scale, output[0], fused=fused)
        return output


@dataclass
class KaiyuanLayerSubmodules(TransformerLayerSubmodules):
    """Megatron's layer submodules and the two output norms."""

    post_self_attn_layernorm: LayerNormBuilder = IdentityOp
    """Norm of the attention output, bias included, before dropout and the residual addition."""
    post_mlp_layernorm: LayerNormBuilder = IdentityOp
    """The same for the MLP."""


class KaiyuanTransformerLayer(TransformerLayer):
    """Megatron's layer with `x += norm_post(f(norm_pre(x)))` for attention and MLP.

    The norms are applied by forward hooks on `self_attention` and `mlp`, and not in the bias-dropout-add step, because
    - the row-parallel outputs are already reduced (or reduce-scattered) there, so the norm sees the full sum;
    - bias-dropout-add runs under `enable_grad`, which would keep activations alive inside a recomputed layer;
    - recomputing "mlp" alone then covers the norm too.
    They are bound methods, so a deep copy of the layer uses the copy's norms. With the fusion `norm` and without hidden
    dropout, norm and residual addition are one kernel instead, in the place of the bias-dropout-add step; under
    recomputation of the MLP its output is then kept.
    """

    def __init__(
        self, config: TransformerConfig, submodules: KaiyuanLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        _require_scaled_branches(config, self.self_attention, self.mlp)
        size_and_eps = {"hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = submodules.post_self_attn_layernorm(config=config, **size_and_eps)
        self.post_mlp_layernorm = submodules.post_mlp_layernorm(config=config, **size_and_eps)
        gain = config.kaiyuan.post_norm_gain(config.num_layers)
        for norm in (self.post_self_attn_layernorm, self.post_mlp_layernorm):
            torch.nn.init.constant_(norm.weight, gain)
        self.set_branch_scale(config.kaiyuan.branch_scale)
        if config.kaiyuan.fuses("norm") and config.hidden_dropout == 0.0:
            self.self_attn_bda = self._add_normed_attention
            self.mlp_bda = self._add_normed_mlp
        else:
            self.self_attention.register_forward_hook(self._norm_attention_output)
            self.mlp.register_forward_hook(self._norm_mlp_output)

    def set_branch_scale(self, scale: float) -> None:
        """From the next forward pass on, compute the branches `scale` = 2^-K times as large.

        Not between a forward and its backward pass. RMSNorm(2^-K y; 4^-K eps) = RMSNorm(y; eps), exactly: every factor
        is a power of two.
        """
        if not self.config.kaiyuan.scales_branches:
            return
        self.self_attention.branch_scale = self.mlp.branch_scale = scale
        for norm in (self.post_self_attn_layernorm, self.post_mlp_layernorm):
            norm.eps = self.config.layernorm_epsilon * scale**2

    def _add_normed_attention(self, _training: bool, _fused: bool) -> Callable[..., Tensor]:  # noqa: FBT001
        return partial(_add_normed_branch, self.post_self_attn_layernorm)

    def _add_normed_mlp(self, _training: bool, _fused: bool) -> Callable[..., Tensor]:  # noqa: FBT001 (Megatron's call)
        return partial(_add_normed_branch, self.post_mlp_layernorm)

    def _norm_attention_output(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, None]:
        return _normed_branch(self.post_self_attn_layernorm, output)

    def _norm_mlp_output(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, None]:
        return _normed_branch(self.post_mlp_layernorm, output)


def _require_scaled_branches(config: TransformerConfig, attention: torch.nn.Module, mlp: torch.nn.Module) -> None:
    """Refuse a spec whose attention or MLP ignores the scale that the output norms are about to take back."""
    scaled = isinstance(attention, ScaledValueSelfAttention) and isinstance(mlp, FusedSwiGLUMLP)
    if config.kaiyuan.scales_branches and not scaled:
        raise ConfigError(
            f"--kaiyuan-branch-scale-bits {config.kaiyuan.branch_scale_bits} with a layer spec whose modules do not "
            "scale; make the spec by get_kaiyuan_decoder_spec from the same config"
        )


def _normed_branch(norm: torch.nn.Module, output_with_bias: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
    """Norm a branch's `(output, bias)`, [s, b, h] and [h].

    The bias belongs to the branch, so it is added first.
    """
    output, bias = output_with_bias
    return cast(Tensor, norm(output if bias is None else output + bias)), None


def _add_normed_branch(
    norm: Any, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _dropout: float
) -> Tensor:
    output, bias = output_with_bias
    return add_rms_norm(residual, output if bias is None else output + bias, weight_for_kernel(norm), norm.eps)
