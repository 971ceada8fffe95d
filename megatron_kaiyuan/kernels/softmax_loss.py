"""Cross-entropy of soft-capped logits over a vocabulary that may be split: statistics, then the gradient in place.

    partial_statistics   max, sum of exponentials and label logit of this part of the vocabulary
    gradient_            overwrites logits with the loss's gradient, times a weight and a power of two

Between the two the parts of the vocabulary agree on the whole sums (`linear_cross_entropy.py`).

Overflow: everything is FP32 but the logits and their gradient. The gradient of an unscaled loss is softmax - one-hot,
    and 1 / 151 936 = 6.6e-6 has 7 significant bits left in FP16, a tenth of it 4, and 3e-8 and less is zero. Scaled by
    2^10 the normal range begins at 6e-8. The largest value is then 1 024 * weight, far below 65 504.
Cost: reads the logits twice and writes them once; no FP32 logits, no probabilities.
Upstream instead: Megatron's vocab-parallel cross-entropy (FP32 logits and softmax); liger-kernel's fused linear
    cross-entropy, which soft-caps, but writes unscaled FP16 gradients and knows no tensor parallelism.

Shapes: t = tokens, v = this rank's part of the vocabulary.
"""

import torch
from torch import Tensor

from megatron_kaiyuan.kernels.support import use_triton

__all__ = ["gradient_", "partial_statistics"]


def partial_statistics(
    logits: Tensor, labels: Tensor, first_id: int, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one part of the vocabulary contributes to the loss of each token.

    Args:
        logits: [t, v], before the cap.
        labels: int64 [t], ids of the whole vocabulary.
        first_id: Id of this part's first column.
        cap: Soft-cap in logit units; 0 = none.

    Returns:
        FP32 [t] each: max of the capped logits; sum of exp(capped - max); the capped label logit, 0 where the label is
        in another part; the largest |logit| before the cap.
    """
    if use_triton(logits):
        from megatron_kaiyuan.kernels import softmax_loss_triton as kernels

        return kernels.partial_statistics(logits, labels, first_id, cap)
    capped, _ = _capped(logits, cap)
    largest = capped.amax(dim=-1)
    here = (labels >= first_id) & (labels < first_id + logits.shape[-1])
    column = (labels - first_id).masked_fill(~here, 0).unsqueeze(-1)
    label_logits = capped.gather(-1, column).squeeze(-1).masked_fill(~here, 0.0)
    return (
        largest,
        torch.exp(capped - largest.unsqueeze(-1)).sum(dim=-1),
        label_logits,
        logits.abs().amax(dim=-1).to(capped.dtype),
    )


def gradient_(
    logits: Tensor,
    labels: Tensor,
    first_id: int,
    cap: float,
    log_partition: Tensor,
    softmax_weight: Tensor,
    label_weight: Tensor,
) -> None:
    """Overwrite `logits` with `softmax_weight * softmax - label_weight * one-hot`, times the slope of the cap.

    Args:
        logits: [t, v], before the cap.
        labels: int64 [t].
        first_id: Id of this part's first column.
        cap: As for the statistics.
        log_partition: FP32 [t], log of the sum of exponentials over the whole vocabulary.
        softmax_weight: FP32 [t]; a token of weight 0 gets exactly 0.
        label_weight: FP32 [t].
    """
    if use_triton(logits):
        from megatron_kaiyuan.kernels import softmax_loss_triton as kernels

        kernels.gradient_(logits, labels, first_id, cap, log_partition, softmax_weight, label_weight)
        return
    capped, slope = _capped(logits, cap)
    gradient = torch.exp(capped - log_partition.unsqueeze(-1)) * softmax_weight.unsqueeze(-1)
    here = (labels >= first_id) & (labels < first_id + logits.shape[-1])
    column = (labels - first_id).masked_fill(~here, 0).unsqueeze(-1)
    gradient.scatter_add_(-1, column, (-label_weight).masked_fill(~here, 0.0).unsqueeze(-1).to(gradient.dtype))
    logits.copy_(torch.where(softmax_weight.unsqueeze(-1) == 0, torch.zeros_like(gradient), gradient * slope))


def _capped(logits: Tensor, cap: float) -> tuple[Tensor, Tensor | float]:
    """`cap * tanh(logits / cap)` and its derivative, in FP32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap == 0:
        return wide, 1.0
    ratio = torch.tanh(wide / cap)
    return cap * ratio, 1.0 - ratio.square()
