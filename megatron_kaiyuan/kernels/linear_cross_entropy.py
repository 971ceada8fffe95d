"""Output matrix product, soft-cap, cross-entropy and z-loss in one, without the logits of all tokens.

The tokens go through in chunks: logits of a chunk (in the dtype of the hidden states), statistics, all-reduce over the
vocabulary's parts, gradient in place, and two matrix products for the gradients of hidden states and output matrix.
This all happens in the forward pass, when the logits are there; the backward multiplies by the gradient of the loss,
which is why the function returns the weighted sum over the tokens: its gradient is one number.

Overflow: the products read the FP16 gradient scaled by 2^10 (see `softmax_loss.py`) and write FP32, so neither the
    gradient of the hidden states nor that of the matrix can overflow or vanish before the loss scale is applied.
Cost: no product more than unfused, and a copy of a chunk's hidden states with masked tokens zeroed. Memory: a chunk of
    logits, an FP32 gradient of the output matrix (4 h v bytes) and one of the hidden states (4 t h), instead of 6 to 8
    bytes a logit of all tokens.
Upstream instead: FP32 logits of all tokens; liger-kernel (compared in docs/benchmarks.md).
Source: Cut your losses in large-vocabulary language models (arXiv 2411.09009) for the problem; liger-kernel
    (arXiv 2410.10989) for gradients in the forward pass.

Shapes: t = tokens, h = hidden, v = this rank's part of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_kaiyuan.kernels.softmax_loss import gradient_, partial_statistics

__all__ = ["LossOptions", "LossResult", "linear_cross_entropy"]

_GRADIENT_SCALE = 1024.0
"""Power of two, so that scaling and unscaling are exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """What the loss is, and how it is computed."""

    cap: float = 0.0
    """Soft-cap in logit units; 0 = none."""
    z_loss: float = 0.0
    """Weight of logsumexp(capped logits)^2 in the loss of each token."""
    chunk_bytes: int = 2 << 30
    """Size of the logits that exist at a time."""
    first_id: int = 0
    """Id of the first row of this rank's part of the output matrix."""
    tp_group: Any = None
    """Process group that the vocabulary is split over; None: not split."""


@dataclass(frozen=True, slots=True)
class LossResult:
    """Results of the fused loss."""

    total: Tensor
    """Weighted sum of the losses; FP32 scalar. The only differentiable result."""
    losses: Tensor
    """Loss of each token, unweighted; FP32 [t]."""
    peak_logit: Tensor
    """Largest |logit| before the cap on this rank; FP32 scalar."""


def linear_cross_entropy(
    hidden: Tensor, matrix: Tensor, labels: Tensor, weights: Tensor, options: LossOptions
) -> LossResult:
    """Loss of `softcap(hidden @ matrix.T)` at the labels.

    Under tensor parallelism the gradient of `hidden` is this rank's part of a sum over the ranks.

    Args:
        hidden: [t, h], FP16, BF16, FP32 or FP64.
        matrix: [v, h], the same dtype. With `matrix.main_grad` (Megatron's FP32 gradient buffer) the gradient is added
            there in FP32 if `matrix.adds_to_main_grad` is set.
        labels: int64 [t], ids of the whole vocabulary.
        weights: FP32 [t]: the loss mask. Tokens of weight 0 cost time but contribute nothing, whatever their logits.
        options: Cap, z-loss, chunking, parallelism.
    """
    total, losses, peak = _LinearCrossEntropy.apply(hidden, matrix, labels, weights, options)  # type: ignore[no-untyped-call]
    return LossResult(total, losses, peak)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, labels: Tensor, weights: Tensor, options: LossOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, labels = hidden.contiguous(), labels.contiguous()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(wide)
        differentiated = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        of_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if differentiated else None
        of_matrix = torch.empty(matrix.shape, dtype=wide, device=matrix.device) if differentiated else None
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        peaks = []
        for start, end in _chunks(len(hidden), matrix.shape[0] * hidden.element_size(), options.chunk_bytes):
            chunk = slice(start, end)
            logits = hidden[chunk] @ matrix.t()
            losses[chunk], log_partition, peak = _token_losses(logits, labels[chunk], options)
            peaks.append(peak)
            if of_hidden is None or of_matrix is None:
                continue
            scaled = weights[chunk] * _GRADIENT_SCALE
            masked = scaled == 0
            # The log-partition of a masked token may be infinite, and 0 * inf is NaN; so may its hidden states be.
            softmax_weight = (scaled * (1.0 + 2.0 * options.z_loss * log_partition)).masked_fill_(masked, 0.0)
            counted = hidden[chunk].masked_fill(masked.unsqueeze(-1), 0.0)
            gradient_(logits, labels[chunk], options.first_id, options.cap, log_partition, softmax_weight, scaled)
            _product(logits, matrix, of_hidden[chunk], accumulate=False)
            _product(logits.t(), counted, of_matrix, accumulate=start > 0)
        ctx.matrix = matrix
        ctx.save_for_backward(of_hidden, of_matrix)
        # A mask of 0 removes even an infinite loss.
        total = torch.where(weights == 0, torch.zeros_like(losses), losses * weights).sum()
        peak_logit = torch.stack(peaks).amax() if peaks else losses.new_zeros(())
        ctx.mark_non_differentiable(losses, peak_logit)
        return total, losses, peak_logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        of_hidden, of_matrix = ctx.saved_tensors
        factor = grads[0] / _GRADIENT_SCALE
        matrix = ctx.matrix
        if getattr(matrix, "adds_to_main_grad", False):
            matrix.main_grad.addcmul_(of_matrix, factor)
            matrix.grad_added_to_main_grad = True
            # Megatron's hook wants to see a gradient. It ignores the values, unless the matrix is the embedding too:
            # then it adds what autograd summed over both uses, and this use has nothing left to contribute.
            is_added = getattr(matrix, "zero_out_wgrad", False)
            gradient = torch.zeros_like(matrix) if is_added else torch.empty_like(matrix)
        else:
            gradient = of_matrix.mul_(factor).to(matrix.dtype)
        return of_hidden.mul_(factor).to(matrix.dtype), gradient, None, None, None


def _chunks(tokens: int, bytes_per_token: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """Return equal ranges of tokens, as few as fit.

    Each but the last is a multiple of 128 tokens.
    """
    fitting = max(1, chunk_bytes // bytes_per_token)
    number = -(-tokens // fitting)
    size = -(-tokens // max(1, number))
    size = -(-size // 128) * 128 if size > 128 else size
    return [(start, min(start + size, tokens)) for start in range(0, tokens, max(1, size))]


def _token_losses(logits: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-partition of each token, the same on all ranks, and this rank's largest |logit|."""
    largest, total, label_logits, peaks = partial_statistics(logits, labels, options.first_id, options.cap)
    if options.tp_group is not None and options.tp_group.size() > 1:
        common = largest.clone()
        torch.distributed.all_reduce(common, op=torch.distributed.ReduceOp.MAX, group=options.tp_group)
        sums = torch.stack((total * torch.exp(largest - common), label_logits))
        torch.distributed.all_reduce(sums, group=options.tp_group)
        largest, (total, label_logits) = common, sums
    log_partition = largest + total.log()
    return log_partition - label_logits + options.z_loss * log_partition.square(), log_partition, peaks.amax()


def _product(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """`out = left @ right`, or `out += left @ right`, accumulated and written in the dtype of `out`."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if accumulate else torch.mm(left, right, out=out)
    elif left.is_cuda:
        if accumulate:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:  # torch has products that widen their result on CUDA only
        _product(left.to(out.dtype), right.to(out.dtype), out, accumulate=accumulate)
