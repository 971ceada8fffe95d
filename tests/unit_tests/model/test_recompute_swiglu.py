"""SwiGLU's output computed again in the backward pass: the same gradients to the bit, and nothing of it kept."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_kaiyuan.kernels.swiglu import recomputed, swiglu
from tests.helpers import run_distributed
from tests.unit_tests.model import tiny
from tests.unit_tests.model.reference import random_batch
from tests.unit_tests.model.test_branch_scale import FULL_RECOMPUTE, WGRAD, assert_identical
from tests.unit_tests.model.test_model import FUSED, KAIYUAN
from tests.unit_tests.model.tiny import Case, Outcome

ROWS, HALF = 6, 5


def case(name: str, **values: Any) -> Case:
    return Case(name=name, features=KAIYUAN, recompute_swiglu=True, **values)


def keeping(recomputing: Case) -> Case:
    """Its twin that keeps the output."""
    values = {name: getattr(recomputing, name) for name in Case.__dataclass_fields__}
    return Case(**(values | {"name": f"{recomputing.name}, kept", "recompute_swiglu": False}))


ALONE = [
    case("FP32"),
    case("FP32, scaled", branch_scale_bits=4),
    case("FP16, fused", half=True, fusions=FUSED, overrides=WGRAD),
    case("FP32, full recompute", fusions=FUSED, overrides=FULL_RECOMPUTE),
]
PARALLEL = [
    case("TP 2", tensor_parallel=2),
    case("FP16, TP 2, sequence parallel, scaled", half=True, tensor_parallel=2, fusions=FUSED, branch_scale_bits=4,
         overrides=WGRAD | {"sequence_parallel": True}),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    [result] = run_distributed(tiny.train_steps, 1, ALONE + [keeping(each) for each in ALONE])
    return tiny.outcomes_of(result)


@pytest.fixture(scope="module")
def parallel() -> list[dict[str, Outcome]]:
    cases = PARALLEL + [keeping(each) for each in PARALLEL]
    return [tiny.outcomes_of(each) for each in run_distributed(tiny.train_steps, 2, cases)]


@pytest.mark.distributed
@pytest.mark.parametrize("recomputing", ALONE, ids=lambda each: each.name)
def test_loss_and_gradients_are_equal_bit_for_bit(recomputing: Case, alone: dict[str, Outcome]) -> None:
    assert_identical(alone[recomputing.name], alone[keeping(recomputing).name])


@pytest.mark.distributed
@pytest.mark.parametrize("recomputing", PARALLEL, ids=lambda each: each.name)
def test_so_they_are_on_tensor_parallel_ranks(recomputing: Case, parallel: list[dict[str, Outcome]]) -> None:
    for outcomes in parallel:
        assert_identical(outcomes[recomputing.name], outcomes[keeping(recomputing).name])


@pytest.mark.distributed
def test_no_layer_of_the_model_keeps_it() -> None:
    [alive] = run_distributed(activations_alive, 1)
    assert alive == {"recomputed": 0, "kept": Case(name="").shape.layers}


def activations_alive(_rank: int) -> dict[str, int]:
    """How many inputs of `linear_fc2` a forward pass leaves in memory."""
    tiny.initialize_parallel(1, 1)
    recomputing = case("")
    return {"recomputed": _alive_after(recomputing), "kept": _alive_after(keeping(recomputing))}


def _alive_after(chosen: Case) -> int:
    model = tiny.build_stage(chosen)
    seen: list[weakref.ref[Tensor]] = []
    for layer in model.decoder.layers:
        layer.mlp.linear_fc2.register_forward_pre_hook(lambda _module, inputs: seen.append(weakref.ref(inputs[0])))
    tokens, _labels = random_batch(chosen.shape)
    output = model(tokens, torch.arange(chosen.shape.sequence).expand_as(tokens), None)
    gc.collect()
    assert output.requires_grad
    return sum(each() is not None for each in seen)


def linear_of(weight: Tensor, activation: Tensor) -> Tensor:
    return functional.linear(activation.view(-1, HALF), weight)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(2, ROWS // 2, 2 * HALF, generator=generator, requires_grad=True)
    return packed, torch.randn(3, HALF, generator=generator, requires_grad=True)


def test_a_view_of_it_is_made_again_and_other_tensors_are_kept() -> None:
    packed, weight = drawn(1)
    activation = swiglu(packed, 0.25)
    with recomputed(activation, packed, 0.25):
        output = linear_of(weight, activation)
    saved = output.grad_fn._saved_self  # type: ignore[union-attr]
    assert torch.equal(saved, activation.view(-1, HALF))
    assert saved.data_ptr() != activation.data_ptr()
    assert output.grad_fn._saved_mat2.data_ptr() == weight.data_ptr()  # type: ignore[union-attr]


def test_the_graph_does_not_hold_it() -> None:
    packed, weight = drawn(2)
    activation = swiglu(packed)
    with recomputed(activation, packed):
        output = linear_of(weight, activation.clone() * 0 + activation)
        output = output + linear_of(weight, activation)
    gone = weakref.ref(activation)
    del activation
    assert gone() is None
    output.sum().backward()
    assert packed.grad is not None


def test_part_of_it_is_kept_as_it_is() -> None:
    packed, weight = drawn(3)
    activation = swiglu(packed)
    with recomputed(activation, packed):
        output = functional.linear(activation[0], weight)
    assert output.grad_fn._saved_self.data_ptr() == activation.data_ptr()  # type: ignore[union-attr]
