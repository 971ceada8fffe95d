"""The Triton kernels of `softmax_loss.py`. Importing this needs Triton. One program a token, looping over its row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gradient_", "partial_statistics"]

_BLOCK, _WARPS = 4096, 8


@triton.jit
def _tanh(x):
    # exp overflows to infinity for large x, which gives 1; and is 0 for very negative x, which gives -1.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _statistics(
    logits_ptr, labels_ptr, largest_ptr, sum_ptr, label_logit_ptr, peak_ptr, first_id, cap,
    columns: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start_ptr = logits_ptr + row * columns
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    peak = tl.zeros((), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(start_ptr + column, mask=inside, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(x), axis=0))
        if CAP:
            x = cap * _tanh(x / cap)
        x = tl.where(inside, x, float("-inf"))
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    label = tl.load(labels_ptr + row) - first_id
    here = (label >= 0) & (label < columns)
    x = tl.load(start_ptr + tl.where(here, label, 0)).to(tl.float32)
    if CAP:
        x = cap * _tanh(x / cap)
    tl.store(largest_ptr + row, largest)
    tl.store(sum_ptr + row, total)
    tl.store(label_logit_ptr + row, tl.where(here, x, 0.0))
    tl.store(peak_ptr + row, peak)


@triton.jit
def _gradient(
    logits_ptr, labels_ptr, log_partition_ptr, softmax_weight_ptr, label_weight_ptr, first_id, cap,
    columns: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start_ptr = logits_ptr + row * columns
    kind = logits_ptr.dtype.element_ty
    softmax_weight = tl.load(softmax_weight_ptr + row)
    label_weight = tl.load(label_weight_ptr + row)
    log_partition = tl.load(log_partition_ptr + row)
    label = tl.load(labels_ptr + row) - first_id
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(start_ptr + column, mask=inside, other=0.0).to(tl.float32)
        slope = 1.0
        if CAP:
            ratio = _tanh(x / cap)
            slope = 1.0 - ratio * ratio
            x = cap * ratio
        gradient = tl.exp(x - log_partition) * softmax_weight - tl.where(column == label, label_weight, 0.0)
        gradient = tl.where(softmax_weight == 0.0, 0.0, gradient * slope)
        tl.store(start_ptr + column, gradient.to(kind), mask=inside)


def partial_statistics(
    logits: Tensor, labels: Tensor, first_id: int, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `softmax_loss.partial_statistics`."""
    tokens, columns = logits.shape
    results = torch.empty((4, tokens), dtype=torch.float32, device=logits.device)
    largest, total, label_logits, peak = results.unbind(0)
    _statistics[(tokens,)](
        logits, labels, largest, total, label_logits, peak, first_id, cap,
        columns=columns, CAP=cap > 0, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return largest, total, label_logits, peak


def gradient_(
    logits: Tensor,
    labels: Tensor,
    first_id: int,
    cap: float,
    log_partition: Tensor,
    softmax_weight: Tensor,
    label_weight: Tensor,
) -> None:
    """See `softmax_loss.gradient_`."""
    tokens, columns = logits.shape
    _gradient[(tokens,)](
        logits, labels, log_partition, softmax_weight, label_weight, first_id, cap,
        columns=columns, CAP=cap > 0, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
