"""The Triton kernels of `qk_norm_rope.py`. Importing this needs Triton.

A program handles all heads of a token at once, as two tiles [heads, d / 2]: the halves that a rotation mixes.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_kaiyuan.kernels.support import block_size

__all__ = ["backward", "forward"]


@triton.jit
def _forward_heads(
    packed_ptr, out_ptr, gain_ptr, cosine, sine, heads, per_group, first_in_group, group_width, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < heads) & (column < HALF)
    start = (head // per_group) * group_width + (first_in_group + head % per_group) * 2 * HALF
    first = tl.load(packed_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(packed_ptr + start + HALF + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        reciprocal = (1.0 / tl.sqrt(squares / (2 * HALF) + eps))[:, None]
        first *= reciprocal * tl.load(gain_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)
        second *= reciprocal * tl.load(gain_ptr + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    place = head * 2 * HALF + column
    tl.store(out_ptr + place, (first * cosine - second * sine).to(kind), mask=inside)
    tl.store(out_ptr + place + HALF, (second * cosine + first * sine).to(kind), mask=inside)


@triton.jit
def _forward(
    packed_ptr, query_ptr, key_ptr, query_gain_ptr, key_gain_ptr, cosine_ptr, sine_ptr, batch, groups, per_group, eps,
    NORM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF_BLOCK)[None, :]
    cosine = tl.load(cosine_ptr + (row // batch) * HALF + column, mask=column < HALF, other=0.0)
    sine = tl.load(sine_ptr + (row // batch) * HALF + column, mask=column < HALF, other=0.0)
    group_width = (per_group + 2) * 2 * HALF
    packed_row = packed_ptr + row * groups * group_width
    _forward_heads(
        packed_row, query_ptr + row * groups * per_group * 2 * HALF, query_gain_ptr, cosine, sine,
        groups * per_group, per_group, 0, group_width, eps, NORM, QUERIES, HALF, HALF_BLOCK,
    )  # fmt: skip
    _forward_heads(
        packed_row, key_ptr + row * groups * 2 * HALF, key_gain_ptr, cosine, sine,
        groups, 1, per_group, group_width, eps, NORM, KEYS, HALF, HALF_BLOCK,
    )  # fmt: skip


@triton.jit
def _backward_heads(
    of_out_ptr, head_stride, packed_ptr, of_packed_ptr, gain_ptr, cosine, sine, heads, per_group, first_in_group,
    group_width, eps, NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of these heads, and return both halves of the gain's gradient.

    The latter is summed over the heads.
    """
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < heads) & (column < HALF)
    start = (head // per_group) * group_width + (first_in_group + head % per_group) * 2 * HALF
    of_first = tl.load(of_out_ptr + head * head_stride + column, mask=inside, other=0.0).to(tl.float32)
    of_second = tl.load(of_out_ptr + head * head_stride + HALF + column, mask=inside, other=0.0).to(tl.float32)
    of_first, of_second = of_first * cosine + of_second * sine, of_second * cosine - of_first * sine
    of_first_gain = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    of_second_gain = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    if NORM:
        first = tl.load(packed_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(packed_ptr + start + HALF + column, mask=inside, other=0.0).to(tl.float32)
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        reciprocal = (1.0 / tl.sqrt(squares / (2 * HALF) + eps))[:, None]
        first *= reciprocal
        second *= reciprocal
        of_first_gain += tl.sum(of_first * first, axis=0)
        of_second_gain += tl.sum(of_second * second, axis=0)
        of_first *= tl.load(gain_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)
        of_second *= tl.load(gain_ptr + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
        along = ((tl.sum(of_first * first, axis=1) + tl.sum(of_second * second, axis=1)) / (2 * HALF))[:, None]
        of_first = reciprocal * (of_first - first * along)
        of_second = reciprocal * (of_second - second * along)
    kind = of_packed_ptr.dtype.element_ty
    tl.store(of_packed_ptr + start + column, of_first.to(kind), mask=inside)
    tl.store(of_packed_ptr + start + HALF + column, of_second.to(kind), mask=inside)
    return of_first_gain, of_second_gain


@triton.jit
def _copy_values(
    of_value_ptr, head_stride, of_packed_ptr, groups, per_group, group_width,
    KEYS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, KEYS)[:, None]
    column = tl.arange(0, 2 * HALF_BLOCK)[None, :]
    inside = (head < groups) & (column < 2 * HALF)
    value = tl.load(of_value_ptr + head * head_stride + column, mask=inside, other=0.0)
    tl.store(of_packed_ptr + head * group_width + (per_group + 1) * 2 * HALF + column, value, mask=inside)


@triton.jit
def _backward(
    of_query_ptr, of_key_ptr, of_value_ptr,
    query_s, query_b, query_n, key_s, key_b, key_n, value_s, value_b, value_n,
    packed_ptr, of_packed_ptr, query_gain_ptr, key_gain_ptr, cosine_ptr, sine_ptr, of_gains_ptr,
    rows, batch, groups, per_group, eps,
    ROWS_EACH: tl.constexpr,
    NORM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, HALF_BLOCK)
    group_width = (per_group + 2) * 2 * HALF
    query_first = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    query_second = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    key_first = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    key_second = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    for turn in range(ROWS_EACH):
        number = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        # Turns beyond the last row count no heads, so they load zeros and store nothing.
        present = tl.where(number < rows, groups, 0)
        position = number // batch
        member = number % batch
        angle = position * HALF + column[None, :]
        cosine = tl.load(cosine_ptr + angle, mask=(column[None, :] < HALF) & (number < rows), other=0.0)
        sine = tl.load(sine_ptr + angle, mask=(column[None, :] < HALF) & (number < rows), other=0.0)
        start = number * groups * group_width
        first, second = _backward_heads(
            of_query_ptr + position * query_s + member * query_b, query_n, packed_ptr + start, of_packed_ptr + start,
            query_gain_ptr, cosine, sine, present * per_group, per_group, 0, group_width, eps,
            NORM, QUERIES, HALF, HALF_BLOCK,
        )  # fmt: skip
        query_first += first
        query_second += second
        first, second = _backward_heads(
            of_key_ptr + position * key_s + member * key_b, key_n, packed_ptr + start, of_packed_ptr + start,
            key_gain_ptr, cosine, sine, present, 1, per_group, group_width, eps, NORM, KEYS, HALF, HALF_BLOCK,
        )  # fmt: skip
        key_first += first
        key_second += second
        _copy_values(
            of_value_ptr + position * value_s + member * value_b, value_n, of_packed_ptr + start,
            present, per_group, group_width, KEYS, HALF, HALF_BLOCK,
        )  # fmt: skip
    if NORM:
        sums = of_gains_ptr + tl.program_id(0) * 4 * HALF + column
        tl.store(sums, query_first, mask=column < HALF)
        tl.store(sums + HALF, query_second, mask=column < HALF)
        tl.store(sums + 2 * HALF, key_first, mask=column < HALF)
        tl.store(sums + 3 * HALF, key_second, mask=column < HALF)


def forward(
    packed: Tensor,
    cosine: Tensor,
    sine: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    per_group: int,
    head_size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Queries [s, b, g * q, d] and keys [s, b, g, d] of a contiguous [s, b, g, (q + 2) * d]."""
    length, batch, groups = packed.shape[:3]
    query = torch.empty((length, batch, groups * per_group, head_size), dtype=packed.dtype, device=packed.device)
    key = torch.empty((length, batch, groups, head_size), dtype=packed.dtype, device=packed.device)
    _forward[(length * batch,)](
        packed, query, key, query_gain, key_gain, cosine, sine, batch, groups, per_group, eps,
        NORM=query_gain is not None, QUERIES=block_size(groups * per_group), KEYS=block_size(groups),
        HALF=head_size // 2, HALF_BLOCK=block_size(head_size // 2), num_warps=4,
    )  # fmt: skip
    return query, key


def backward(
    grads: Sequence[Tensor],
    packed: Tensor,
    cosine: Tensor,
    sine: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    per_group: int,
    head_size: int,
    eps: float,
    programs: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the packed tensor and of both gains.

    Those of query, key and value may have any strides.
    """
    length, batch, groups = packed.shape[:3]
    of_query, of_key, of_value = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
    of_packed = torch.empty_like(packed)
    norm = query_gain is not None
    sums = torch.empty((programs, 4, head_size // 2), dtype=torch.float32, device=packed.device) if norm else None
    _backward[(programs,)](
        of_query, of_key, of_value,
        *of_query.stride()[:3], *of_key.stride()[:3], *of_value.stride()[:3],
        packed, of_packed, query_gain, key_gain, cosine, sine, sums, length * batch, batch, groups, per_group, eps,
        ROWS_EACH=triton.cdiv(length * batch, programs),
        NORM=norm, QUERIES=block_size(groups * per_group), KEYS=block_size(groups),
        HALF=head_size // 2, HALF_BLOCK=block_size(head_size // 2), num_warps=4,
    )  # fmt: skip
    if query_gain is None or key_gain is None or sums is None:
        return of_packed, None, None
    total = sums.sum(dim=0).view(2, head_size)
    return of_packed, total[0].to(query_gain.dtype), total[1].to(key_gain.dtype)
