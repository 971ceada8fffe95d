"""RMSNorm fused with the residual stream on both of its sides.

    residual_rms_norm   y = norm(x), and x goes on as the residual: the backward adds both gradients of x in one pass
    add_rms_norm        y = residual + norm(branch), one rounding

Overflow: squares are summed in FP32: 65 504^2 times 2^14 columns is 7e13.
Cost: each reads and writes every tensor once. Unfused, the sum of the two gradients and the residual addition are
    passes of their own: 3 + 3 instead of 4 + 3 tensors for the first, 5 + 3 instead of 3 + 3 for the second.
Upstream instead: `torch.nn.functional.rms_norm`; Transformer Engine fuses the first, nobody the second.

Shapes: r = rows (all leading dimensions), h = columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_kaiyuan.kernels.support import num_programs, use_triton

__all__ = ["add_rms_norm", "residual_rms_norm"]


def residual_rms_norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise a residual stream and hand the stream on.

    Args:
        x: [..., h], FP16, BF16 or FP32.
        gain: [h], the dtype of `x`.
        eps: Added to the mean of squares.

    Returns:
        `(norm(x) * gain, x)`, both of x's shape and dtype.
    """
    if not use_triton(x):
        return functional.rms_norm(x, gain.shape, gain, eps), x
    normed, residual = _ResidualRMSNorm.apply(x, gain, eps)  # type: ignore[no-untyped-call]
    return normed, residual


def add_rms_norm(residual: Tensor, branch: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`residual + norm(branch) * gain`, computed in FP32 and rounded once.

    Args:
        residual: [..., h].
        branch: [..., h], what attention or MLP computed.
        gain: [h].
        eps: Added to the mean of squares.
    """
    if not use_triton(residual):
        wide = torch.promote_types(branch.dtype, torch.float32)
        normed = functional.rms_norm(branch.to(wide), gain.shape, gain.to(wide), eps)
        return (residual.to(wide) + normed).to(residual.dtype)
    total: Tensor = _AddRMSNorm.apply(residual, branch, gain, eps)  # type: ignore[no-untyped-call]
    return total


class _ResidualRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from megatron_kaiyuan.kernels import rms_norm_triton as kernels

        rows = x.contiguous().view(-1, x.shape[-1])
        normed, reciprocal = kernels.forward(rows, gain, None, eps)
        ctx.save_for_backward(rows, gain, reciprocal)
        return normed.view(x.shape), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        from megatron_kaiyuan.kernels import rms_norm_triton as kernels

        rows, gain, reciprocal = ctx.saved_tensors
        of_normed, of_residual = (grad.contiguous().view(rows.shape) for grad in grads)
        of_x, of_gain = kernels.backward(
            of_normed, of_residual, rows, gain, reciprocal, num_programs(len(rows), rows.device)
        )
        return of_x.view(grads[0].shape), of_gain, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, branch: Tensor, gain: Tensor, eps: float) -> Tensor:
        from megatron_kaiyuan.kernels import rms_norm_triton as kernels

        rows = branch.contiguous().view(-1, branch.shape[-1])
        total, reciprocal = kernels.forward(rows, gain, residual.contiguous().view(rows.shape), eps)
        ctx.save_for_backward(rows, gain, reciprocal)
        return total.view(residual.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from megatron_kaiyuan.kernels import rms_norm_triton as kernels

        rows, gain, reciprocal = ctx.saved_tensors
        of_total = grads[0].contiguous().view(rows.shape)
        of_branch, of_gain = kernels.backward(
            of_total, None, rows, gain, reciprocal, num_programs(len(rows), rows.device)
        )
        return grads[0], of_branch.view(grads[0].shape), of_gain, None
