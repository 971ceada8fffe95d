"""SwiGLU of a packed matrix product: `silu(gate) * up`, both halves of one tensor, without splitting or joining it.

Overflow: silu(gate) * up is computed in FP32 and rounded once; nothing bounds it (docs/model.md). A factor 2^-K before
    that rounding moves the end of FP16 by K bits, for it and for the matrix product that follows.
Cost: reads 2f and writes f values a token; backward reads 3f and writes 2f.
    Recomputed in the backward pass: 2f more read and f more written there, f less kept a token and layer.
Upstream instead: Megatron's `bias_swiglu_impl`, which torch.compile fuses, with a concatenation in its backward.

Shapes: r = rows, f = half the columns of the input.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_kaiyuan.kernels.support import use_triton

__all__ = ["recomputed", "swiglu"]


def swiglu(packed: Tensor, scale: float = 1.0) -> Tensor:
    """`silu(packed[..., :f]) * packed[..., f:] * scale`, [..., 2f] -> [..., f], in packed's dtype.

    Args:
        packed: [..., 2f], FP16, BF16, FP32 or FP64.
        scale: A power of two, applied in FP32 before the one rounding.
    """
    if not use_triton(packed):
        return _reference(packed, scale)
    out: Tensor = _SwiGLU.apply(packed, scale)  # type: ignore[no-untyped-call]
    return out


class _Recipe(NamedTuple):
    """How to make what was not kept."""

    packed: Tensor
    scale: float
    shape: torch.Size


def recomputed(activation: Tensor, packed: Tensor, scale: float = 1.0) -> AbstractContextManager[None]:
    """Inside, autograd does not keep `activation = swiglu(packed, scale)` or views of all of it, but makes it again.

    The backward pass calls the same kernel on the same values, so gradients are equal bit for bit. `packed`, which
    SwiGLU's own backward pass keeps anyway, must not be changed in between.
    """
    # Not the tensor itself: autograd holds both functions until the backward pass, and with them all they refer to.
    address, size = activation.data_ptr(), activation.numel()
    kept = packed.detach()

    def pack(tensor: Tensor) -> Tensor | _Recipe:
        same = tensor.data_ptr() == address and tensor.numel() == size and tensor.is_contiguous()
        return _Recipe(kept, scale, tensor.shape) if same else tensor

    def unpack(packed_or_other: Tensor | _Recipe) -> Tensor:
        if isinstance(packed_or_other, Tensor):
            return packed_or_other
        with torch.no_grad():
            return swiglu(packed_or_other.packed, packed_or_other.scale).view(packed_or_other.shape)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _reference(packed: Tensor, scale: float) -> Tensor:
    gate, up = torch.chunk(packed, 2, dim=-1)
    if scale == 1.0:
        return functional.silu(gate) * up  # bit for bit what Megatron's MLP does
    wide = torch.promote_types(packed.dtype, torch.float32)
    return (functional.silu(gate.to(wide)) * up.to(wide) * scale).to(packed.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, scale: float) -> Tensor:
        from megatron_kaiyuan.kernels import swiglu_triton as kernels

        rows = packed.contiguous().view(-1, packed.shape[-1])
        ctx.save_for_backward(rows)
        ctx.scale = scale
        return kernels.forward(rows, scale).view(*packed.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        from megatron_kaiyuan.kernels import swiglu_triton as kernels

        (rows,) = ctx.saved_tensors
        of_packed = kernels.backward(grads[0].contiguous().view(len(rows), -1), rows, ctx.scale)
        return of_packed.view(*grads[0].shape[:-1], -1), None
