"""The Triton kernels of `rms_norm.py`. Importing this needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_kaiyuan.kernels.support import block_size

__all__ = ["backward", "forward"]


@triton.jit
def _forward(
    x_ptr, gain_ptr, residual_ptr, out_ptr, reciprocal_ptr, columns, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    reciprocal = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / columns + eps)
    out = x * reciprocal * gain
    if ADD:
        out += tl.load(residual_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(reciprocal_ptr + row, reciprocal)
    tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    of_out_ptr, of_residual_ptr, x_ptr, gain_ptr, reciprocal_ptr, of_x_ptr, of_gain_ptr, rows, columns,
    ROWS_EACH: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < columns
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    of_gain = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in range(ROWS_EACH):
        row = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        here = inside & (row < rows)
        of_out = tl.load(of_out_ptr + row * columns + column, mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * columns + column, mask=here, other=0.0).to(tl.float32)
        reciprocal = tl.load(reciprocal_ptr + row, mask=row < rows, other=0.0)
        normed = x * reciprocal
        scaled = of_out * gain
        of_x = reciprocal * (scaled - normed * (tl.sum(normed * scaled, axis=0) / columns))
        if ADD:
            of_x += tl.load(of_residual_ptr + row * columns + column, mask=here, other=0.0).to(tl.float32)
        tl.store(of_x_ptr + row * columns + column, of_x.to(of_x_ptr.dtype.element_ty), mask=here)
        of_gain += of_out * normed
    tl.store(of_gain_ptr + tl.program_id(0) * columns + column, of_gain, mask=inside)


def _warps(columns: int) -> int:
    return min(16, max(1, block_size(columns) // 512))


def forward(x: Tensor, gain: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return `norm(x) * gain`, [r, h], and 1 / RMS of each row, FP32 [r].

    The residual is added if there is one.
    """
    rows, columns = x.shape
    out = torch.empty_like(x if residual is None else residual)
    reciprocal = torch.empty(rows, dtype=torch.float32, device=x.device)
    _forward[(rows,)](
        x, gain, residual, out, reciprocal, columns, eps,
        ADD=residual is not None, BLOCK=block_size(columns), num_warps=_warps(columns),
    )  # fmt: skip
    return out, reciprocal


def backward(
    of_out: Tensor, of_residual: Tensor | None, x: Tensor, gain: Tensor, reciprocal: Tensor, programs: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x, [r, h], with that of the residual added if there is one, and of the gain, [h]."""
    rows, columns = x.shape
    of_x = torch.empty_like(x)
    partial = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        of_out, of_residual, x, gain, reciprocal, of_x, partial, rows, columns,
        ROWS_EACH=triton.cdiv(rows, programs), ADD=of_residual is not None,
        BLOCK=block_size(columns), num_warps=_warps(columns),
    )  # fmt: skip
    return of_x, partial.sum(dim=0).to(gain.dtype)
