"""One micro-batch through the model: the batch on every rank that needs it, and the loss in Megatron's convention.

Shapes: b = micro-batch, s = sequence on this context-parallel rank.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_kaiyuan.model.document_attention import document_boundaries
from megatron_kaiyuan.model.stages import predicts_further_tokens, sees_data
from megatron_kaiyuan.monitoring.diagnosis import why_loss_is_not_finite
from megatron_kaiyuan.monitoring.held_out_losses import HeldOutLosses
from megatron_kaiyuan.monitoring.monitor import RunMonitor
from megatron_kaiyuan.training.longer_windows import (
    agreed_samples,
    count_operations,
    joined,
    joined_counts,
    samples_of_window,
)

__all__ = ["ForwardStep", "fused_language_model_loss", "language_model_loss"]

_MODEL_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
_MONITOR_KEYS = ("dataset_id", "band_tokens", "token_bands")
_SPIKE = 10.0
"""Times the largest of the first hundred losses: where `--check-for-spiky-loss` repeats a step, as in Megatron-LM."""

_stragglers = StragglerDetector()
"""The one of this process, which `--log-straggler` switches on: it times the loading and the forward pass."""


@dataclass(slots=True)
class ForwardStep:
    """What Megatron calls for each micro-batch."""

    monitor: RunMonitor | None = None
    """Receives every training micro-batch. None: nobody does."""
    held_out: HeldOutLosses | None = None
    """Counts the losses of every validation micro-batch; None: nobody does."""
    several_lengths: bool = False
    """Whether phases of the plan differ in `seq_length`."""
    _explained: bool = False
    """A loss that was not finite has been explained; those that follow have the same reason."""

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]] | None, model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """Run one micro-batch, and return its output with the function that makes the loss of it.

        The output is that of the last stage.
        """
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        args = get_args()
        monitor = self.monitor if model.training else None
        micro_batch_size = args.micro_batch_size if model.training else args.eval_micro_batch_size
        with _timed(_stragglers(bdata=True)):
            several = self.several_lengths and model.training
            vp_stage = get_attr_wrapped_model(model, "vp_stage")
            batch = _batch_on_this_rank(data_iterator, vp_stage, micro_batch_size, several_lengths=several)
        timers("batch-generator").stop()
        if monitor is not None:
            monitor.observe(model)
        forward = partial(_forward, model, batch)
        with _timed(_stragglers):
            output = forward()
        count = partial(self._count, batch, is_training=model.training)
        why_not_finite = partial(self._why_not_finite, model, forward)
        if isinstance(output, tuple):
            total, losses, peak_logit = output
            count(losses, peak_logit)
            return total, partial(fused_language_model_loss, batch["loss_mask"], why_not_finite=why_not_finite)
        return output, partial(_counted_loss, count, why_not_finite, batch)

    def _why_not_finite(self, model: Any, forward: Callable[[], Any]) -> str | None:
        if self._explained or not _can_repeat_alone():
            return None
        self._explained = True
        return why_loss_is_not_finite(model, forward)

    def _count(
        self, batch: dict[str, Tensor | None], losses: Tensor, peak_logit: Tensor | None, *, is_training: bool
    ) -> None:
        if is_training:
            if self.monitor is not None and get_rerun_state_machine().state is not RerunState.RERUNNING_IN_PLACE:
                self.monitor.count(batch, losses, peak_logit)
            return
        source_ids, bands, mask = batch.get("dataset_id"), batch.get("token_bands"), batch["loss_mask"]
        if self.held_out is not None and source_ids is not None and bands is not None and mask is not None:
            self.held_out.add(source_ids, bands, losses, mask)


@contextmanager
def _timed(detector: StragglerDetector) -> Iterator[None]:
    """Time what is done here. The detector's own context, on or off, logs a traceback of every error that passes."""
    detector.start()
    try:
        yield
    finally:
        detector.stop()


def _forward(model: Any, batch: dict[str, Tensor | None]) -> Any:
    return model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        **_fused_loss(model),
    )


def _can_repeat_alone() -> bool:
    """Whether all ranks that a forward pass communicates with see the same loss, so that they would repeat it together.

    Those of one tensor-parallel group do. Context parallelism splits the sequence, experts take tokens of other ranks,
    and FSDP gathers weights from ranks with other data. A CUDA graph cannot be metered.
    """
    args = get_args()
    split = args.context_parallel_size > 1 or args.expert_model_parallel_size > 1
    return not (split or args.use_megatron_fsdp or args.use_torch_fsdp2 or args.cuda_graph_impl != "none")


def _counted_loss(
    count: Callable[[Tensor, None], None],
    why_not_finite: Callable[[], str | None],
    batch: dict[str, Tensor | None],
    losses: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    count(losses, None)
    return language_model_loss(batch["loss_mask"], losses, why_not_finite)


def _fused_loss(model: Any) -> dict[str, Any]:
    """Return the output processor of a stage that has one.

    Middle stages and unfused heads have none.
    """
    while hasattr(model, "module"):
        model = model.module
    fused = getattr(model, "fused_loss", None)
    return {} if fused is None else {"output_processor": fused}


def _batch_on_this_rank(
    data_iterator: Iterator[dict[str, Tensor]] | None,
    vp_stage: int | None,
    micro_batch_size: int,
    *,
    several_lengths: bool,
) -> dict[str, Tensor | None]:
    """Return the tensors [b, s] that this rank's stage uses.

    None for the others, and for all of them on a middle stage.
    """
    args = get_args()
    if not sees_data(args, vp_stage):
        return dict.fromkeys(_MODEL_KEYS)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    loaded, samples = _next_batch(data_iterator) if tensor_rank == 0 else ({}, 1)
    batch = {key: loaded[key] for key in _MODEL_KEYS} if loaded else {}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tensor_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_further_tokens(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    if several_lengths:
        samples = agreed_samples(samples)
        count_operations(samples, micro_batch_size, args.seq_length)
        batch = joined(batch, samples)
    cp_group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        batch["attention_mask"] = document_boundaries(batch["position_ids"])
    return {key: batch[key] for key in _MODEL_KEYS} | _monitored(loaded, samples)


def _monitored(loaded: dict[str, Tensor | None], samples: int) -> dict[str, Tensor | None]:
    """Return what losses and tokens are counted by.

    The first of the ranks that share a sample counts its tokens.
    """
    bands, token_bands = loaded.get("band_tokens"), loaded.get("token_bands")
    if bands is not None:
        first = parallel_state.get_context_parallel_rank() == 0
        numbers = loaded["dataset_id"]
        if samples > 1 and numbers is not None:
            numbers, bands = joined_counts(numbers, bands, samples)
        return {"dataset_id": numbers, "band_tokens": bands if first else torch.zeros_like(bands)}
    if token_bands is not None:
        group = parallel_state.get_context_parallel_group()
        own = get_batch_on_this_cp_rank({"token_bands": token_bands}, is_hybrid_cp=False, cp_group=group)
        return {"dataset_id": loaded["dataset_id"], **own}
    return {}  # Megatron's own blends have a dataset_id too, which numbers other things


def _next_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> tuple[dict[str, Tensor | None], int]:
    """The tensors of a micro-batch on the device, and how many samples each window of it consists of."""
    assert data_iterator is not None, "the first tensor-parallel rank of an outer stage has the data"
    loaded = next(data_iterator)
    keys = _MODEL_KEYS + _MONITOR_KEYS
    there = {key: loaded[key].cuda(non_blocking=True) if key in loaded else None for key in keys}
    return there, samples_of_window(loaded)


def language_model_loss(
    loss_mask: Tensor | None, losses: Tensor, why_not_finite: Callable[[], str | None] = lambda: None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the sum of the token losses that count, how many these are, and both again for the log.

    Megatron divides the sum by the number, over all micro-batches and ranks together, so every token weighs the same.

    Args:
        loss_mask: 1 for tokens that count, else 0; float [b, s]. None on the stages before the last, which compute no
            loss.
        losses: Loss of each token; [b, s].
        why_not_finite: Says where a loss that is not finite comes from, if it can.

    Returns:
        Loss (scalar, FP32), number of tokens (scalar, int32), and `{"lm loss": [sum, number]}`.
    """
    assert loss_mask is not None, "the last stage has the mask"
    loss = torch.sum(losses.view(-1).float() * loss_mask.view(-1).float())
    return fused_language_model_loss(loss_mask, loss, why_not_finite)


def fused_language_model_loss(
    loss_mask: Tensor | None, loss: Tensor, why_not_finite: Callable[[], str | None] = lambda: None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same from the masked sum of the losses, FP32 scalar."""
    assert loss_mask is not None, "the last stage has the mask"
    num_tokens = loss_mask.float().sum().detach().to(torch.int)
    _check_finite(loss, why_not_finite)
    _check_spiky(loss)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def _check_finite(loss: Tensor, why_not_finite: Callable[[], str | None]) -> None:
    """Stop at a NaN or infinite loss before it is averaged over the ranks.

    Off under dynamic loss scaling.
    """
    if not get_args().check_for_nan_in_loss_and_grad:
        return
    if not torch.isfinite(loss) and (why := why_not_finite()) is not None:
        # Not in the message below, by which Megatron recognises the same check when it repeats the step.
        rank = torch.distributed.get_rank()
        print(f" the loss on rank {rank} is {loss.item():g}: {why}", file=sys.stderr, flush=True)
    for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=is_bad,
            message=f"{name} in the loss of this rank",
            tolerance=0.0,  # the forward pass repeats exactly
            fatal=True,
        )


def _check_spiky(loss: Tensor) -> None:
    """Repeat a step whose loss is far above the earlier ones, to see if the machine computed it wrongly."""
    if not get_args().check_for_spiky_loss:
        return
    machine = get_rerun_state_machine()
    machine.validate_result(
        result=loss,
        rejection_func=partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss"),
        message="Spiky loss",
        tolerance=0.0,  # the forward pass repeats exactly
        fatal=False,
    )
