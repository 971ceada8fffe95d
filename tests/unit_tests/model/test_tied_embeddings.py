"""Embeddings tied to the output layer: the fused loss has the gradients of Megatron's own, through Megatron's DDP."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import run_distributed
from tests.unit_tests.model import tiny
from tests.unit_tests.model.reference import Features, random_batch
from tests.unit_tests.model.tiny import Case

HEAD = Features(softcap=5.0, z_loss=1e-2)


def tied_gradients(_rank: int) -> dict[str, dict[str, Any]]:
    """Entry of `run_distributed`: the DDP buffer after a step in FP16, without and with the fused loss."""
    from megatron_kaiyuan.training.compat import fuse_weight_gradients_without_apex

    fuse_weight_gradients_without_apex()
    tiny.initialize_parallel(1, 1)
    # What the allocator hands out is often zero by chance; no result may depend on it.
    torch.empty_like = lambda like, **options: torch.full_like(like, float("nan"), **options)
    return {fusions: tiny.portable(_step(fusions)) for fusions in ("none", "loss")}


def _step(fusions: str) -> dict[str, Tensor]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_kaiyuan.model.builder import kaiyuan_builder

    overrides = {"gradient_accumulation_fusion": True}
    case = Case(name="tied", features=HEAD, half=True, fusions=fusions, overrides=overrides)
    arguments = tiny.builder_arguments(case.shape)
    arguments.untie_embeddings_and_output_weights = False
    torch.manual_seed(5)
    model = kaiyuan_builder(arguments, pre_process=True, post_process=True, config=tiny.build_config(case)).half()
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    tokens, labels = random_batch(case.shape)
    positions = torch.arange(case.shape.sequence).expand_as(tokens)
    processor = {"output_processor": model.fused_loss} if fusions == "loss" else {}
    output = wrapped(tokens, positions, None, labels=labels, loss_mask=torch.ones(labels.shape), **processor)
    total = output[0] if isinstance(output, tuple) else output.float().sum()
    (total / labels.numel() * tiny.LOSS_SCALE).backward()
    return {name: parameter.main_grad / tiny.LOSS_SCALE for name, parameter in model.named_parameters()}


@pytest.mark.distributed
def test_the_gradient_of_a_tied_matrix_is_that_of_the_unfused_loss() -> None:
    """Megatron's hook adds the gradient of a tied matrix to the buffer, also where the kernel has done so already."""
    [gradients] = run_distributed(tied_gradients, 1)
    unfused, fused = tiny.unpacked(gradients["none"]), tiny.unpacked(gradients["loss"])
    assert "output_layer.weight" not in fused
    assert fused.keys() == unfused.keys()
    for name, gradient in fused.items():
        # Both round the same few dozen values to FP16 on their way.
        assert (gradient - unfused[name]).abs().max() <= 32 * 2.0**-11 * unfused[name].abs().max(), name


class _OnlyRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_the_hooks_of_the_output_layer_run_where_a_tied_matrix_is_given() -> None:
    """On the last of several pipeline stages the hook waits for the all-gather of the very matrix that is given."""
    from megatron_kaiyuan.model.config import KaiyuanModelOptions  # not above: the ranks of the first test start here
    from megatron_kaiyuan.model.output_head import FusedLoss

    layer: Any = torch.nn.Linear(2, 3, bias=False)
    layer.gradient_accumulation_fusion = layer.sequence_parallel = False
    gathered = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])

    def wait(_module: torch.nn.Module, _inputs: Any) -> None:
        layer.weight.data.copy_(gathered)

    layer.register_forward_pre_hook(wait)
    torch.nn.init.zeros_(layer.weight)
    model: Any = SimpleNamespace(tp_group=_OnlyRank(), training=True)
    _, _, peak_logit = FusedLoss(model, KaiyuanModelOptions())(
        hidden_states=torch.ones(1, 1, 2),
        output_layer=layer,
        output_weight=layer.weight,
        labels=torch.tensor([[0]]),
        loss_mask=torch.ones(1, 1),
    )
    assert float(peak_logit) == 4.0
