"""SwiGLU's output computed again in the backward pass: the same gradients to the bit, and nothing of it kept."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_kaiyuan.kernels.swiglu import free_until_backward, swiglu
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
    """How many inputs of `linear_fc2` have memory after a forward pass."""
    tiny.initialize_parallel(1, 1)
    recomputing = case("")
    return {"recomputed": _alive_after(recomputing), "kept": _alive_after(keeping(recomputing))}


def _alive_after(chosen: Case) -> int:
    model = tiny.build_stage(chosen)
    seen: list[Tensor] = []
    for layer in model.decoder.layers:
        layer.mlp.linear_fc2.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    tokens, _labels = random_batch(chosen.shape)
    output = model(tokens, torch.arange(chosen.shape.sequence).expand_as(tokens), None)
    assert output.requires_grad
    return sum(each.untyped_storage().nbytes() > 0 for each in seen)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(2, ROWS // 2, 2 * HALF, generator=generator, requires_grad=True)
    return packed, torch.randn(3, HALF, generator=generator, requires_grad=True)


def gradients(packed: Tensor, weight: Tensor, *, free: bool) -> tuple[Tensor, ...]:
    activation = swiglu(packed, 0.25)
    product = functional.linear(activation.view(-1, HALF), weight)
    if free:
        free_until_backward(activation, packed, 0.25, product)
        assert activation.untyped_storage().nbytes() == 0
    return torch.autograd.grad(product.square().sum(), (packed, weight))


def test_memory_is_free_in_between_and_gradients_are_those_of_the_kept_one() -> None:
    for freed, kept in zip(gradients(*drawn(1), free=True), gradients(*drawn(1), free=False), strict=True):
        assert torch.equal(freed, kept)


@pytest.mark.distributed
@pytest.mark.parametrize("fusions", ["none", "norm,rotary,loss"])
def test_without_the_fusion_the_kernel_is_not_used(fusions: str) -> None:
    """Scaled branches need our MLP in any case; whether it calls the kernel is the fusion's to say."""
    [asked] = run_distributed(uses_of_the_kernel, 1, fusions)
    assert asked == [False] * Case(name="").shape.layers


def uses_of_the_kernel(_rank: int, fusions: str) -> list[bool]:
    """What `swiglu` is told by the layers of a model with scaled branches."""
    from megatron_kaiyuan.model import layers

    asked: list[bool] = []

    def seen(packed: Tensor, scale: float = 1.0, *, fused: bool = True) -> Tensor:
        asked.append(fused)
        return swiglu(packed, scale, fused=fused)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "swiglu", seen)
        tiny.initialize_parallel(1, 1)
        chosen = case("", branch_scale_bits=4, fusions=fusions)
        tokens, _labels = random_batch(chosen.shape)
        positions = torch.arange(chosen.shape.sequence).expand_as(tokens)
        tiny.build_stage(chosen)(tokens, positions, None).sum().backward()
    return asked


def test_the_kernel_is_not_used_where_the_fusion_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_kaiyuan.kernels.swiglu.use_triton", lambda _packed: pytest.fail("it is off"))
    packed, weight = drawn(4)
    activation = swiglu(packed, fused=False)
    product = functional.linear(activation, weight)
    free_until_backward(activation, packed, 1.0, product, fused=False)
    product.sum().backward()
    assert packed.grad is not None


def test_without_gradients_nothing_is_freed() -> None:
    packed, weight = drawn(2)
    with torch.no_grad():
        activation = swiglu(packed)
        product = functional.linear(activation, weight)
    free_until_backward(activation, packed, 1.0, product)
    assert torch.equal(functional.linear(activation, weight), product)


def test_a_second_backward_pass_of_a_kept_graph_fills_it_again() -> None:
    packed, weight = drawn(3)
    activation = swiglu(packed)
    product = functional.linear(activation, weight)
    free_until_backward(activation, packed, 1.0, product)
    [first] = torch.autograd.grad(product.sum(), weight, retain_graph=True)
    [second] = torch.autograd.grad(product.sum(), weight)
    assert torch.equal(first, second)
