"""QK-norm and rotary positions in one pass, from the packed query-key-value product to what attention reads.

Overflow: norm, gain and rotation are computed in FP32 and rounded once; |q| <= sqrt(d) max|gain|. Cosine and sine stay
    in FP32 (Megatron's unfused path rounds both to FP16 first).
Cost: reads and writes queries and keys once; the backward writes the gradient of the packed tensor directly. Values are
    a view and cost nothing forward. Unfused, splitting, two norms, two rotations and the joining of five gradients
    are passes of their own.
Upstream instead: separate norms and `apply_rotary_pos_emb`; its fused forms need Transformer Engine or apex and take
no norm. Source: RoFormer (arXiv 2104.09864), the half-split convention of GPT-NeoX and Llama.

Shapes: s = sequence, b = batch, g = key/value groups, q = query heads in each group, d = head size, n = g * q.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_kaiyuan.kernels.support import num_programs, use_triton

__all__ = ["qk_norm_rope"]


def qk_norm_rope(
    packed: Tensor,
    angles: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    *,
    queries_per_group: int,
    head_size: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split, normalise and rotate.

    Args:
        packed: [s, b, g, (q + 2) * d]: in each group its queries, its key, its value.
        angles: [s, d], FP32, radians; the two halves are equal.
        query_gain: [d]; None leaves the queries unnormalised.
        key_gain: [d]; None exactly where `query_gain` is.
        queries_per_group: q.
        head_size: d, even.
        eps: Added to the mean of squares.

    Returns:
        Queries [s, b, n, d], keys [s, b, g, d], values [s, b, g, d] (a view of `packed`), in packed's dtype.
    """
    cosine, sine = angles[:, : head_size // 2].cos().contiguous(), angles[:, : head_size // 2].sin().contiguous()
    if not use_triton(packed):
        return _reference(packed, cosine, sine, query_gain, key_gain, queries_per_group, head_size, eps)
    query, key, value = _QKNormRope.apply(  # type: ignore[no-untyped-call]
        packed, cosine, sine, query_gain, key_gain, queries_per_group, head_size, eps
    )
    return query, key, value


def _reference(
    packed: Tensor,
    cosine: Tensor,
    sine: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    queries_per_group: int,
    head_size: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.split(packed, [queries_per_group * head_size, head_size, head_size], dim=-1)
    query = query.reshape(*packed.shape[:2], -1, head_size)
    return (
        _normed_and_rotated(query, cosine, sine, query_gain, eps),
        _normed_and_rotated(key, cosine, sine, key_gain, eps),
        value,
    )


def _normed_and_rotated(heads: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    if gain is not None:
        wide = functional.rms_norm(wide, gain.shape, gain.to(wide.dtype), eps)
    first, second = wide.chunk(2, dim=-1)
    cosine, sine = cosine[:, None, None].to(wide.dtype), sine[:, None, None].to(wide.dtype)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return rotated.to(heads.dtype)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        cosine: Tensor,
        sine: Tensor,
        query_gain: Tensor | None,
        key_gain: Tensor | None,
        queries_per_group: int,
        head_size: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from megatron_kaiyuan.kernels import qk_norm_rope_triton as kernels

        packed = packed.contiguous()
        query, key = kernels.forward(packed, cosine, sine, query_gain, key_gain, queries_per_group, head_size, eps)
        ctx.save_for_backward(packed, cosine, sine, query_gain, key_gain)
        ctx.queries_per_group, ctx.head_size, ctx.eps = queries_per_group, head_size, eps
        return query, key, packed[..., -head_size:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_kaiyuan.kernels import qk_norm_rope_triton as kernels

        packed, cosine, sine, query_gain, key_gain = ctx.saved_tensors
        programs = num_programs(packed.shape[0] * packed.shape[1], packed.device)
        of_packed, of_query_gain, of_key_gain = kernels.backward(
            grads, packed, cosine, sine, query_gain, key_gain, ctx.queries_per_group, ctx.head_size, ctx.eps, programs
        )
        return of_packed, None, None, of_query_gain, of_key_gain, None, None, None
