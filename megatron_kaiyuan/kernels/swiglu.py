"""SwiGLU of a packed matrix product: `silu(gate) * up`, both halves of one tensor, without splitting or joining it.

Overflow: silu(gate) * up is computed in FP32 and rounded once; nothing bounds it (docs/model.md). A factor 2^-K before
    that rounding moves the end of FP16 by K bits, for it and for the matrix product that follows.
Cost: reads 2f and writes f values a token; backward reads 3f and writes 2f.
    Recomputed in the backward pass: 2f more read and f more written there, f less kept a token and layer.
Upstream instead: Megatron's `bias_swiglu_impl`, which torch.compile fuses, with a concatenation in its backward.

Shapes: r = rows, f = half the columns of the input.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_kaiyuan.kernels.support import use_triton

__all__ = ["free_until_backward", "swiglu"]


def swiglu(packed: Tensor, scale: float = 1.0, *, fused: bool = True) -> Tensor:
    """`silu(packed[..., :f]) * packed[..., f:] * scale`, [..., 2f] -> [..., f], in packed's dtype.

    Args:
        packed: [..., 2f], FP16, BF16, FP32 or FP64.
        scale: A power of two, applied in FP32 before the one rounding.
        fused: Whether the kernel may be used where there is one; torch's operations otherwise.
    """
    if not fused or not use_triton(packed):
        return _reference(packed, scale)
    out: Tensor = _SwiGLU.apply(packed, scale)  # type: ignore[no-untyped-call]
    return out


def free_until_backward(
    activation: Tensor, packed: Tensor, scale: float, product: Tensor, *, fused: bool = True
) -> None:
    """Free the memory of `activation = swiglu(packed, scale)` until the gradient of `product` is known.

    To be called when `product` has been computed from `activation` and nothing else in the forward pass will read it.
    The same kernel runs again on the same values, so gradients are equal bit for bit. The memory is freed under the
    tensor, as Megatron's `CheckpointWithoutOutput` does. Hooks on saved tensors would do for autograd, but they hand
    Megatron's linear layers a weight without its marks, and the fused weight gradient needs those.

    Args:
        activation: Its memory must be its own; views of it follow.
        packed: Kept, as SwiGLU's own backward pass keeps it; must not be changed in between.
        scale: That of the first call, as `fused`.
        fused: Whether the kernel made `activation`.
        product: If it has no gradient, nothing is freed: autograd keeps nothing then.
    """
    if not product.requires_grad:
        return
    storage, kept = activation.untyped_storage(), packed.detach()
    target, size = activation.data, storage.nbytes()  # writing to .data leaves autograd's version counter alone

    def fill(_gradient: Tensor) -> None:
        storage.resize_(size)
        if fused and use_triton(kept):
            from megatron_kaiyuan.kernels import swiglu_triton as kernels

            kernels.forward(kept.contiguous().view(-1, kept.shape[-1]), scale, out=target)
        else:
            target.copy_(_reference(kept, scale))

    product.register_hook(fill)  # type: ignore[no-untyped-call]
    storage.resize_(0)


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
