"""Causal attention inside documents: a token sees the earlier tokens of its own document, and no other's.

A window of training tokens holds pieces of several documents. Megatron's `--reset-attention-mask` keeps them apart by a
mask of s * s bytes a sample, which rules out the fast kernels. Here the mask is the list of places where documents
start, in the flattened batch, and goes where Megatron passes a mask, through all layers, recomputation included.

Cost: on CUDA torch's attention for sequences of varying length (FlashAttention-2), which does only the work inside the
    documents: less than without a mask. It wants the tokens of a sample side by side, so queries, keys, values and
    output are copied once each where a micro-batch has more than one sample. The number of documents is not known
    before, so the host waits for the device once a micro-batch. On the CPU, and for dtypes that the kernel lacks, a
    boolean mask [b, 1, s, s] is made inside.
Upstream instead: the dense mask, or packed sequences with Transformer Engine.
Source: FlashAttention-2 (arXiv 2307.08691); torch.nn.attention.varlen.

Shapes: s = sequence, b = batch, n = query heads, g = key/value heads, d = head size.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attend_within_documents", "document_boundaries", "holds_boundaries"]


def document_boundaries(position_ids: Tensor) -> Tensor:
    """Where documents start, and the end of the last, counted over the samples one behind the other.

    Args:
        position_ids: int64 [b, s], starting at 0 in each document (`--reset-position-ids`).

    Returns:
        int32 [documents + 1], ascending, from 0 to b * s; every sample starts a document.
    """
    starts = position_ids == 0
    starts[:, 0] = True
    places = starts.flatten().nonzero().flatten()
    return functional.pad(places, (0, 1), value=position_ids.numel()).to(torch.int32)


def holds_boundaries(attention_mask: Tensor | None) -> bool:
    """Return whether what was passed as a mask comes from `document_boundaries`.

    Masks are boolean.
    """
    return attention_mask is not None and attention_mask.dtype == torch.int32


def attend_within_documents(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> Tensor:
    """Attend.

    Args:
        query: [s, b, n, d].
        key: [s, b, g, d], g dividing n.
        value: [s, b, g, d].
        boundaries: From `document_boundaries`.
        scale: Factor on the scores.

    Returns:
        [s, b, n * d], in the dtype of `query`.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _by_lengths(query, key, value, boundaries, scale)
    return _by_mask(query, key, value, boundaries, scale)


def _by_lengths(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    length, batch = query.shape[:2]
    query, key, value = (part.transpose(0, 1).reshape(-1, *part.shape[2:]) for part in (query, key, value))
    # No document is longer than a sample, and the kernel needs no closer bound.
    context = varlen_attn(
        query, key, value, boundaries, boundaries, length, length, scale=scale, window_size=(-1, 0)
    )  # causal, in each by itself
    assert isinstance(context, Tensor)  # a pair only where more is asked for
    return context.view(batch, length, -1).transpose(0, 1).contiguous()


def _by_mask(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> Tensor:
    context = functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=_visible(boundaries, query.size(1), query.size(0)),
        scale=scale,
        enable_gqa=key.size(2) != query.size(2),
    )
    return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def _visible(boundaries: Tensor, batch: int, length: int) -> Tensor:
    """Boolean [b, 1, s, s], true where the query may see the key."""
    places = torch.arange(batch * length, device=boundaries.device, dtype=boundaries.dtype)
    document = torch.bucketize(places, boundaries, right=True).view(batch, 1, length)
    return (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
