"""Soft-capped output logits and z-loss, installed on a stock language model.

Overflow: the output matrix product writes FP16. |logit_v| <= |x|_2 |w_v|_2 <= sqrt(h) max|gain| |w_v|_2, x being the
    output of the final norm: at Kaiyuan's shape (h = 2048, init std 0.02) at most 41, a factor 1 600 below 65 504.
    It is reached when the rows of the output matrix grow, as they do at high learning rates: nothing in the
    cross-entropy holds their common part back. The product accumulates in FP32 (partial sums too: `products.py`);
    only its rounding overflows, to +-inf.
Bound: |c tanh(logit / c)| <= c, so log-partition <= c + ln V and loss <= 2c + ln V. The derivative 1 - tanh^2 vanishes
    as a logit grows: nothing rewards growing it further. An overflowed logit (+-inf) gives +-c and gradient 0, not NaN.
Remedy: the cap in FP32, from the FP16 product, before the loss. Vocabulary-parallel as it stands: it is elementwise.
Cost: where logits are wanted (generation, evaluation outside the loop, the fusion `loss` off), the FP16 logits are
    kept for the backward pass beside the loss's FP32 softmax (6 bytes a logit instead of 4), and one elementwise pass
    each way. In training `FusedLoss` computes loss and gradients without them
(`megatron_kaiyuan/kernels/linear_cross_entropy.py`). Upstream instead: Megatron-Core 0.19 has neither soft-cap nor a
dense z-loss. Source: Gemma 2 (arXiv 2408.00118) for the cap; PaLM (arXiv 2204.02311) for the z-loss.

The z-loss acts on the capped logits: theirs is the partition function that normalises the predictions. Its gradient
reaches the weights through the cap, so tokens that are already capped are not pushed.

Shapes: s = sequence, b = batch, V = vocabulary, v = V / tensor-parallel size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor

from megatron_kaiyuan.kernels.linear_cross_entropy import LossOptions, LossResult, linear_cross_entropy
from megatron_kaiyuan.model.config import KaiyuanModelOptions
from megatron_kaiyuan.model.hooks import weight_for_kernel

__all__ = ["FusedLoss", "install_output_head", "softcap", "vocab_parallel_cross_entropy_with_z_loss"]


class _SoftCap(torch.autograd.Function):
    """`c * tanh(x / c)` in FP32 that keeps only x, in its own dtype, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.cap = cap
        return _tanh_of_ratio(logits, cap).mul_(cap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        slope = _tanh_of_ratio(logits, ctx.cap).square_().neg_().add_(1.0)
        return slope.mul_(grads[0]).to(logits.dtype), None


def _tanh_of_ratio(logits: Tensor, cap: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).div_(cap).tanh_()


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Bound logits to (-cap, cap).

    Args:
        logits: Any shape; FP16, BF16, FP32 or FP64; infinities allowed.
        cap: c > 0, in logit units.

    Returns:
        `cap * tanh(logits / cap)`, same shape, FP32 (FP64 for FP64). The gradient has the dtype of `logits`.
    """
    capped: Tensor = _SoftCap.apply(logits, cap)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return capped


class _CrossEntropyWithZLoss(torch.autograd.Function):
    """Cross-entropy + weight * logsumexp^2 of each token over a vocabulary split between the ranks of `tp_group`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weight: float, tp_group: Any) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = logits.amax(dim=-1)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=tp_group)
        probabilities = torch.exp(logits - largest.unsqueeze(-1))  # not yet divided by the partition function
        first, end = VocabUtility.vocab_range_from_per_partition_vocab_size(
            logits.size(-1), tp_group.rank(), tp_group.size()
        )
        elsewhere = (labels < first) | (labels >= end)
        local_labels = (labels - first).masked_fill(elsewhere, 0).unsqueeze(-1)
        label_logits = logits.gather(-1, local_labels).squeeze(-1).masked_fill(elsewhere, 0.0)
        sums = torch.stack((label_logits, probabilities.sum(dim=-1)))
        torch.distributed.all_reduce(sums, group=tp_group)
        label_logits, partition = sums
        log_partition = partition.log() + largest
        ctx.weight = weight
        probabilities.div_(partition.unsqueeze(-1))
        ctx.save_for_backward(probabilities, local_labels, elsewhere, log_partition)
        loss: Tensor = log_partition - label_logits + weight * log_partition.square()
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local_labels, elsewhere, log_partition = ctx.saved_tensors
        gradient = probabilities * (1.0 + 2.0 * ctx.weight * log_partition).unsqueeze(-1)
        label_part = elsewhere.logical_not().to(gradient.dtype).neg_().unsqueeze(-1)
        gradient.scatter_add_(-1, local_labels, label_part)
        return gradient.mul_(grads[0].unsqueeze(-1)), None, None, None


def vocab_parallel_cross_entropy_with_z_loss(logits: Tensor, labels: Tensor, weight: float, tp_group: Any) -> Tensor:
    """Cross-entropy plus `weight * logsumexp(logits)^2`, per token.

    Args:
        logits: [s, b, v], this rank's part of the vocabulary.
        labels: int64 [s, b], token ids of the whole vocabulary.
        weight: z-loss weight, >= 0.
        tp_group: The tensor-parallel process group.

    Returns:
        [s, b], FP32, equal on all ranks of `tp_group`.
    """
    loss: Tensor = _CrossEntropyWithZLoss.apply(logits, labels, weight, tp_group)  # type: ignore[no-untyped-call]
    return loss


class _SoftCapHook:
    """Forward hook of an output layer, which returns `(logits, bias)`: caps the logits for loss and inference alike."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def __call__(self, _module: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        return softcap(logits, self.cap), bias


class _ZLoss:
    """Stands in for `compute_language_model_loss` of one model: z-loss in training, the model's own loss otherwise."""

    def __init__(self, model: LanguageModule, weight: float) -> None:
        self.model = model
        self.weight = weight

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of each token, [b, s] -> [b, s]."""
        if not self.model.training:
            stock = cast(Callable[[Any, Tensor, Tensor], Tensor], type(self.model).compute_language_model_loss)
            return stock(self.model, labels, logits)
        sequence_first = labels.transpose(0, 1).contiguous()
        loss = vocab_parallel_cross_entropy_with_z_loss(logits, sequence_first, self.weight, self.model.tp_group)
        return loss.transpose(0, 1).contiguous()


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """Megatron's `output_processor`: final hidden states to the masked sum of the losses, no logits in between.

    Pass it to the model's forward together with labels and loss mask. Tensor, sequence and context parallelism and tied
    embeddings are as with the model's own loss.
    """

    model: LanguageModule
    """The stage it belongs to; it has the output layer."""
    options: KaiyuanModelOptions
    """Soft-cap and z-loss; the latter acts in training only."""

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
        **_unused: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of a micro-batch.

        Args:
            hidden_states: [s, b, h]; the rank's part of the sequence under sequence parallelism.
            output_layer: Megatron's `ColumnParallelLinear`.
            output_weight: [v, h], where embeddings are tied; None: the layer's own.
            labels: int64 [b, s].
            loss_mask: [b, s], 1 for tokens that count.

        Returns:
            Masked sum of the losses (FP32 scalar, differentiable), loss of each token (FP32 [b, s]) and the largest
            |logit| before the cap on this rank (FP32 scalar).
        """
        group = self.model.tp_group
        matrix: Any = weight_for_kernel(output_layer, output_weight)
        matrix.adds_to_main_grad = output_layer.gradient_accumulation_fusion and hasattr(matrix, "main_grad")
        if output_layer.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        elif group.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        length, batch, width = hidden_states.shape
        result: LossResult = linear_cross_entropy(
            hidden_states.view(-1, width),
            matrix,
            labels.transpose(0, 1).reshape(-1),
            loss_mask.transpose(0, 1).reshape(-1),
            LossOptions(
                cap=self.options.logit_softcap,
                z_loss=self.options.z_loss if self.model.training else 0.0,
                first_id=group.rank() * matrix.shape[0],
                tp_group=group,
            ),
        )
        return result.total, result.losses.view(length, batch).transpose(0, 1), result.peak_logit


def install_output_head(model: LanguageModule, options: KaiyuanModelOptions) -> None:
    """Give a stage's output layer the soft-cap and its training loss the z-loss, where the options ask for them.

    With the fusion `loss` the model also gets the attribute `fused_loss`, for `forward_step` to pass as output
    processor.

    Stages without an output layer, and options that are off, leave the model untouched. A hook and not a subclass,
    because Megatron's models build their own output layer; weights, their names and initial values stay as they are.
    """
    if not getattr(model, "post_process", False):
        return
    if options.logit_softcap > 0:
        model.output_layer.register_forward_hook(_SoftCapHook(options.logit_softcap))
    if options.z_loss > 0:
        model.compute_language_model_loss = _ZLoss(model, options.z_loss)
    if options.fuses("loss") and not _needs_logits(model.config):
        model.fused_loss = FusedLoss(model, options)


def _needs_logits(config: Any) -> bool:
    """Whether something else in the config works on the logits, or on the output layer's gradient."""
    others = config.mtp_num_layers or config.use_mup or config.defer_embedding_wgrad_compute
    return bool(others or config.cross_entropy_loss_fusion)  # the command line asked for Megatron's fused loss
