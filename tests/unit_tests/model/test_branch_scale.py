"""Scaled branches: the same function to the bit where nothing underflows, and finite where FP16 is too small for it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.numerics import ActivationPeak, first_non_finite
from tests.helpers import run_distributed
from tests.unit_tests.model import tiny
from tests.unit_tests.model.reference import Shape, random_batch
from tests.unit_tests.model.test_model import FUSED, KAIYUAN, assert_matches_reference
from tests.unit_tests.model.tiny import Case, Outcome

BITS = 5
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WGRAD = {"gradient_accumulation_fusion": True}
HUGE_PRODUCTS = {"linear_proj": 65504.0, "linear_fc2": 65504.0}
HUGE_SWIGLU = {"linear_fc1": 400.0}


def case(name: str, **values: Any) -> Case:
    """A model with scaled branches; `unscaled` is its twin."""
    return Case(name=name, features=KAIYUAN, **({"branch_scale_bits": BITS} | values))


def unscaled(scaled: Case) -> Case:
    values = {name: getattr(scaled, name) for name in Case.__dataclass_fields__}
    return Case(**(values | {"name": f"{scaled.name}, off", "branch_scale_bits": 0, "raised_to": None}))


IDENTICAL = [
    case("FP32"),
    case("FP32, fused", fusions=FUSED),
    case("FP32, only norms fused", fusions="norm"),
    case("FP32, unfused attention", attention="unfused"),
    case("FP32, weight gradients fused", fusions=FUSED, overrides=WGRAD),
    case("FP32, selective recompute", overrides=RECOMPUTE),
    case("FP32, full recompute", fusions=FUSED, overrides=FULL_RECOMPUTE),
]
RAISED = {"branch_scale_bits": 1, "raised_to": BITS}
IDENTICAL += [
    case("FP32, raised", **RAISED),
    case("FP32, raised from 0, fused", fusions=FUSED, branch_scale_bits=0, raised_to=BITS),
    case("FP32, raised, selective recompute", overrides=RECOMPUTE, **RAISED),
    case("FP32, raised, SwiGLU recomputed", recompute_swiglu=True, **RAISED),
]
IDENTICAL_TP = [
    case("FP32, TP 2", tensor_parallel=2),
    case("FP32, TP 2, fused", tensor_parallel=2, fusions=FUSED),
    case("FP32, TP 2, sequence parallel", tensor_parallel=2, fusions=FUSED, overrides={"sequence_parallel": True}),
]
HALF = [
    case("FP16", half=True),
    case("FP16, fused", half=True, fusions=FUSED, overrides=WGRAD),
    case("FP16, raised", half=True, **RAISED),
    case("FP16, FP32 residual", half=True, fusions=FUSED, overrides={"fp32_residual_connection": True}),
]
HUGE = [
    case("huge products", half=True, factors=HUGE_PRODUCTS),
    case("huge products, fused", half=True, fusions=FUSED, overrides=WGRAD, factors=HUGE_PRODUCTS),
    case("huge SwiGLU", half=True, factors=HUGE_SWIGLU),
    case("huge SwiGLU, raised", half=True, factors=HUGE_SWIGLU, **RAISED),
    case("huge SwiGLU, fused", half=True, fusions=FUSED, factors=HUGE_SWIGLU),
]
HALF_TP = [
    case("FP16, TP 2", half=True, tensor_parallel=2, fusions=FUSED, overrides=WGRAD),
    case("huge products, TP 2", half=True, tensor_parallel=2, fusions=FUSED, factors=HUGE_PRODUCTS),
    case("huge products, TP 2, sequence parallel", half=True, tensor_parallel=2, fusions=FUSED, factors=HUGE_PRODUCTS,
         overrides={"sequence_parallel": True}),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    cases = IDENTICAL + HALF + HUGE
    [result] = run_distributed(tiny.train_steps, 1, cases + [unscaled(each) for each in IDENTICAL + HUGE])
    return tiny.outcomes_of(result)


@pytest.fixture(scope="module")
def parallel() -> list[dict[str, Outcome]]:
    off = [unscaled(each) for each in IDENTICAL_TP + HALF_TP]
    return [tiny.outcomes_of(each) for each in run_distributed(tiny.train_steps, 2, IDENTICAL_TP + HALF_TP + off)]


def assert_identical(scaled: Outcome, off: Outcome) -> None:
    assert scaled.loss is not None
    assert off.loss is not None
    assert torch.equal(scaled.loss, off.loss)
    assert scaled.gradients.keys() == off.gradients.keys()
    assert len(scaled.gradients) > 20
    different = [name for name, value in scaled.gradients.items() if not torch.equal(value, off.gradients[name])]
    assert different == []


def is_finite(outcome: Outcome) -> bool:
    assert outcome.loss is not None
    return bool(outcome.loss.isfinite().all()) and all(value.isfinite().all() for value in outcome.gradients.values())


@pytest.mark.distributed
@pytest.mark.parametrize("scaled", IDENTICAL, ids=lambda scaled: scaled.name)
def test_loss_and_gradients_are_those_of_the_unscaled_model_bit_for_bit(
    scaled: Case, alone: dict[str, Outcome]
) -> None:
    assert_identical(alone[scaled.name], alone[unscaled(scaled).name])


@pytest.mark.distributed
@pytest.mark.parametrize("scaled", IDENTICAL_TP, ids=lambda scaled: scaled.name)
def test_tensor_parallel_ranks_agree_with_the_unscaled_model_bit_for_bit(
    scaled: Case, parallel: list[dict[str, Outcome]]
) -> None:
    for outcomes in parallel:
        assert_identical(outcomes[scaled.name], outcomes[unscaled(scaled).name])


@pytest.mark.distributed
@pytest.mark.parametrize("scaled", IDENTICAL + HALF, ids=lambda scaled: scaled.name)
def test_loss_and_gradients_match_float64(scaled: Case, alone: dict[str, Outcome]) -> None:
    assert_matches_reference(scaled, alone[scaled.name])


@pytest.mark.distributed
@pytest.mark.parametrize("scaled", HUGE, ids=lambda scaled: scaled.name)
def test_products_beyond_fp16_match_float64_where_the_unscaled_model_overflows(
    scaled: Case, alone: dict[str, Outcome]
) -> None:
    assert not is_finite(alone[unscaled(scaled).name])
    assert is_finite(alone[scaled.name])
    assert_matches_reference(scaled, alone[scaled.name])


@pytest.mark.distributed
@pytest.mark.parametrize("scaled", HALF_TP, ids=lambda scaled: scaled.name)
def test_the_sum_over_tensor_parallel_ranks_stays_in_fp16_too(scaled: Case, parallel: list[dict[str, Outcome]]) -> None:
    for outcomes in parallel:
        assert is_finite(outcomes[unscaled(scaled).name]) == (not scaled.factors)
        assert_matches_reference(scaled, outcomes[scaled.name])


@pytest.fixture(scope="module")
def observed() -> dict[str, Any]:
    [result] = run_distributed(observe, 1)
    restored: dict[str, Any] = tiny.unpacked(result)
    return restored


def observe(_rank: int) -> dict[str, Any]:
    """Peaks with and without scale, a checkpoint of one loaded by the other, a spec that does not scale."""
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_kaiyuan.model.layer_specs import get_kaiyuan_decoder_spec
    from megatron_kaiyuan.model.layers import KaiyuanTransformerLayer

    tiny.initialize_parallel(1, 1)
    huge = case("", half=True, factors=HUGE_SWIGLU)
    spec: Any = get_kaiyuan_decoder_spec(GPTModelConfig(transformer=tiny.build_config(unscaled(case("")))))
    try:
        KaiyuanTransformerLayer(tiny.build_config(case("")), spec.layer_specs[0].submodules)
        complaint = "accepted"
    except ConfigError as error:
        complaint = str(error)
    seen: dict[str, Any] = tiny.portable(
        {
            "off": _losses_and_peaks(unscaled(case(""))),
            "on": _losses_and_peaks(case("")),
            "raised": _losses_and_peaks(case("", **RAISED)),
            "loaded": _losses_and_peaks(case("", factors={"linear": 0.5}), _saved_state(unscaled(case("")))),
            "huge": _losses_and_peaks(unscaled(huge)),
        }
    )
    return seen | {"complaint": complaint}


def _saved_state(saved: Case) -> dict[str, Any]:
    model = tiny.build_stage(saved)
    tiny.load_weights(model, saved.weights())
    return dict(model.state_dict())


def _losses_and_peaks(built: Case, state: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, float]]:
    from megatron_kaiyuan.model.numerics import ActivationMeter

    model = tiny.build_stage(built)
    tiny.load_weights(model, built.weights())
    if state is not None:
        model.load_state_dict(state)
    tokens, labels = random_batch(Shape())
    with ActivationMeter(model) as meter, torch.no_grad():
        losses = model(tokens, torch.arange(Shape().sequence).expand_as(tokens), None, labels=labels)
    return losses, {entry.name: entry.peak for entry in meter.read()}


@pytest.mark.distributed
def test_the_meter_reports_what_fp16_has_to_hold(observed: dict[str, Any]) -> None:
    on, off = observed["on"][1], observed["off"][1]
    assert list(on) == list(off)
    scaled = {name for name in off if name.endswith(("linear_proj", "mlp.activation", "linear_fc2"))}
    assert len(scaled) == 3 * Shape().layers
    assert all(on[name] == off[name] * (2.0**-BITS if name in scaled else 1.0) for name in off)
    assert observed["raised"][1] == on


@pytest.mark.distributed
def test_the_meter_names_the_activation_when_that_overflows_first(observed: dict[str, Any]) -> None:
    peaks = [ActivationPeak(name, peak) for name, peak in observed["huge"][1].items()]
    assert first_non_finite(peaks) == "decoder.layers.0.mlp.activation"


@pytest.mark.distributed
def test_a_checkpoint_of_an_unscaled_run_computes_the_same_under_a_scale(observed: dict[str, Any]) -> None:
    assert torch.equal(observed["loaded"][0], observed["off"][0])


@pytest.mark.distributed
def test_a_spec_that_does_not_scale_is_refused(observed: dict[str, Any]) -> None:
    assert "make the spec by get_kaiyuan_decoder_spec" in observed["complaint"]
