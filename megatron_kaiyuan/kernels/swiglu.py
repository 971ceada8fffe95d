"""SwiGLU of a packed matrix product: `silu(gate) * up`, both halves of one tensor, without splitting or joining it.

Overflow: silu(gate) * up is computed in FP32 and rounded once; nothing bounds it (docs/model.md).
Cost: reads 2f and writes f values a token; backward reads 3f and writes 2f.
Upstream instead: Megatron's `bias_swiglu_impl`, which torch.compile fuses, with a concatenation in its backward.

Shapes: r = rows, f = half the columns of the input.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_kaiyuan.kernels.support import use_triton

__all__ = ["swiglu"]


def swiglu(packed: Tensor) -> Tensor:
    """`silu(packed[..., :f]) * packed[..., f:]`, [..., 2f] -> [..., f]."""
    if not use_triton(packed):
        gate, up = torch.chunk(packed, 2, dim=-1)
        return functional.silu(gate) * up
    out: Tensor = _SwiGLU.apply(packed)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        from megatron_kaiyuan.kernels import swiglu_triton as kernels

        rows = packed.contiguous().view(-1, packed.shape[-1])
        ctx.save_for_backward(rows)
        return kernels.forward(rows).view(*packed.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        from megatron_kaiyuan.kernels import swiglu_triton as kernels

        (rows,) = ctx.saved_tensors
        of_packed = kernels.backward(grads[0].contiguous().view(len(rows), -1), rows)
        return of_packed.view(*grads[0].shape[:-1], -1)
