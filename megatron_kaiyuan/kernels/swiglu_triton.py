"""The Triton kernels of `swiglu.py`. Importing this needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

_BLOCK = 1024


@triton.jit
def _forward(packed_ptr, out_ptr, half, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < half
    gate = tl.load(packed_ptr + row * 2 * half + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(packed_ptr + row * 2 * half + half + column, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up * scale
    tl.store(out_ptr + row * half + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(of_out_ptr, packed_ptr, of_packed_ptr, half, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < half
    of_out = tl.load(of_out_ptr + row * half + column, mask=inside, other=0.0).to(tl.float32) * scale
    gate = tl.load(packed_ptr + row * 2 * half + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(packed_ptr + row * 2 * half + half + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    of_gate = of_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    of_up = of_out * gate * sigmoid
    kind = of_packed_ptr.dtype.element_ty
    tl.store(of_packed_ptr + row * 2 * half + column, of_gate.to(kind), mask=inside)
    tl.store(of_packed_ptr + row * 2 * half + half + column, of_up.to(kind), mask=inside)


def forward(packed: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Return SwiGLU of `[r, 2f]` as `[r, f]`, times `scale` before the rounding.

    Where `out` is given, it receives the result: r * f contiguous elements.
    """
    rows, half = packed.shape[0], packed.shape[1] // 2
    if out is None:
        out = torch.empty((rows, half), dtype=packed.dtype, device=packed.device)
    _forward[(rows, triton.cdiv(half, _BLOCK))](packed, out, half, scale, BLOCK=_BLOCK, num_warps=4)
    return out


def backward(of_out: Tensor, packed: Tensor, scale: float) -> Tensor:
    """Gradient of `packed`, [r, 2f]."""
    half = packed.shape[1] // 2
    of_packed = torch.empty_like(packed)
    _backward[(len(packed), triton.cdiv(half, _BLOCK))](
        of_out, packed, of_packed, half, scale, BLOCK=_BLOCK, num_warps=4
    )
    return of_packed
