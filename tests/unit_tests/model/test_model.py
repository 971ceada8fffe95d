"""One process: the whole model against the float64 reference, the stock model, and inputs at the end of FP16."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kaiyuan.model.numerics import first_non_finite
from tests.helpers import run_distributed
from tests.unit_tests.model import tiny
from tests.unit_tests.model.reference import Features, Shape, random_batch, random_weights, reference_step
from tests.unit_tests.model.tiny import Case, Outcome

KAIYUAN = Features(sandwich=True, qk_norm=True, softcap=5.0, z_loss=1e-2)
FUSED = "norm,rotary,swiglu,loss"
CASES = [
    Case(name="no feature"),
    Case(name="no feature, fused", fusions=FUSED),
    Case(name="all features, fused", features=KAIYUAN, fusions=FUSED),
    Case(name="all features, fused, FP16", features=KAIYUAN, fusions=FUSED, half=True),
    Case(
        name="all features, fused, FP16, FP32 residual",
        features=KAIYUAN,
        fusions=FUSED,
        half=True,
        overrides={"fp32_residual_connection": True},
    ),
    Case(
        name="all features, fused, weight gradients fused, FP16",
        features=KAIYUAN,
        fusions=FUSED,
        half=True,
        overrides={"gradient_accumulation_fusion": True},
    ),
    Case(
        name="all features, fused, full recompute",
        features=KAIYUAN,
        fusions=FUSED,
        overrides={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    Case(
        name="all features, fused, selective recompute",
        features=KAIYUAN,
        fusions=FUSED,
        overrides={"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ),
    Case(name="no feature, unfused attention", attention="unfused"),
    Case(name="sandwich norm", features=Features(sandwich=True)),
    Case(name="QK-norm", features=Features(qk_norm=True)),
    Case(name="soft-cap", features=Features(softcap=2.0)),
    Case(name="z-loss", features=Features(z_loss=0.1)),
    Case(name="all features", features=KAIYUAN),
    Case(name="all features, unfused attention", features=KAIYUAN, attention="unfused"),
    Case(name="no feature, FP16", half=True),
    Case(name="all features, FP16", features=KAIYUAN, half=True),
    Case(
        name="all features, FP16, FP32 residual",
        features=KAIYUAN,
        half=True,
        overrides={"fp32_residual_connection": True},
    ),
    Case(
        name="all features, full recompute",
        features=KAIYUAN,
        overrides={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    Case(
        name="all features, selective recompute",
        features=KAIYUAN,
        overrides={"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ),
]


def roundings(shape: Shape) -> int:
    """Roundings that a value passes on its way through the model.

    14 a layer (4 norms, 4 matrix products, QK-norm, rotation, attention, activation, 2 additions) and 4 around them.
    Each contributes at most one unit roundoff relative to the largest value; norms keep values near 1, so none grows.
    """
    return 14 * shape.layers + 4


def assert_matches_reference(case: Case, outcome: Outcome) -> None:
    """Losses within the roundings of one pass, gradients within those of two (forward and backward)."""
    unit_roundoff = torch.finfo(case.dtype).eps / 2
    tolerance = roundings(case.shape) * unit_roundoff
    tokens, labels = random_batch(case.shape)
    weights = case.weights()
    loss, gradients = reference_step(weights, tokens, labels, case.shape, case.features)
    if outcome.loss is not None:
        assert (outcome.loss - loss).abs().max() <= tolerance * loss.abs().max()
    for name, gradient in outcome.gradients.items():
        size = case.tensor_parallel
        expected = tiny.shard(name, gradients[name], outcome.split[name], outcome.tensor_rank, size)
        assert (gradient - expected).abs().max() <= 2 * tolerance * gradients[name].abs().max(), name


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    [result] = run_distributed(tiny.train_steps, 1, CASES)
    return tiny.outcomes_of(result)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_match_a_float64_model(case: Case, outcomes: dict[str, Outcome]) -> None:
    assert_matches_reference(case, outcomes[case.name])
    assert outcomes[case.name].gradients.keys() == random_weights(case.shape, case.features).keys()


@pytest.fixture(scope="module")
def observations() -> dict[str, Any]:
    [result] = run_distributed(observe, 1)
    restored: dict[str, Any] = tiny.unpacked(result)
    return restored


def observe(_rank: int) -> dict[str, Any]:
    """Everything else there is to see in one process, so that Megatron is imported once."""
    tiny.initialize_parallel(1, 1)
    observed = {
        "identity": {
            "stock": _stock_step(Features(qk_norm=True)),
            "ours": _seeded_step(tiny.build_stage, Features(qk_norm=True)),
            "our modules": _seeded_step(_build_with_our_modules, Features(qk_norm=True)),
        },
        "huge logits": _step(Case(name="", features=KAIYUAN, half=True, factors={"output_layer": 65504.0})),
        "huge logits, stock": _step(Case(name="", half=True, factors={"output_layer": 65504.0})),
        "huge branches": _step_with_huge_branches(KAIYUAN),
        "huge branches, stock": _step_with_huge_branches(Features()),
        "logit peak": _metered_logit_peak(),
        "identity layer": _layer_without_output_gains(),
        "evaluation": _evaluation_loss(),
        "gain": _initial_gains(),
        "names": _checkpoint_names(),
    }
    observations: dict[str, Any] = tiny.portable(observed)
    return observations


def _seeded_step(build: Any, features: Features) -> list[Tensor]:
    """Logits, losses and gradients of a freshly initialised model."""
    case = Case(name="", features=features, attention="unfused")
    tiny.initialize_parallel(1, 1)
    torch.manual_seed(5)
    model = build(case)
    return _pass(model, case.shape)


def _pass(model: Any, shape: Shape) -> list[Tensor]:
    tokens, labels = random_batch(shape)
    positions = torch.arange(shape.sequence).expand_as(tokens)
    logits = model(tokens, positions, None)
    loss = model(tokens, positions, None, labels=labels)
    (loss.float().mean() * tiny.LOSS_SCALE).backward()
    return [logits.detach(), loss.detach(), *(parameter.grad for parameter in model.parameters())]


def _stock_step(features: Features) -> list[Tensor]:
    """The same with Megatron's own config class and builder, none of our code."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    def build(case: Case) -> Any:
        ours = tiny.build_config(case)
        fields = {name: getattr(ours, name) for name in TransformerConfig.__dataclass_fields__}
        model_config = gpt_config_from_args(tiny.builder_arguments(case.shape), config=TransformerConfig(**fields))
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return GPTModelBuilder(model_config).build_model(groups, pre_process=True, post_process=True)

    return _seeded_step(build, features)


def _build_with_our_modules(case: Case) -> Any:
    """Our layer spec with everything off, which the builder would not even use."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_kaiyuan.model.layer_specs import get_kaiyuan_decoder_spec

    config = tiny.build_config(case)
    return GPTModel(
        config,
        get_kaiyuan_decoder_spec(GPTModelConfig(transformer=config)),
        case.shape.vocab,
        case.shape.sequence,
        position_embedding_type="rope",
        rotary_base=case.shape.rotary_base,
    )


def _step(case: Case) -> list[Tensor]:
    return _pass(_build_loaded(case), case.shape)


def _build_loaded(case: Case) -> Any:
    model = tiny.build_stage(case)
    tiny.load_weights(model, case.weights())
    return model


def _step_with_huge_branches(features: Features) -> tuple[list[Tensor], list[Any]]:
    """A step of a deep model whose branches stay below 65 504 each while their sum does not, and the meter's peaks."""
    from megatron_kaiyuan.model.numerics import ActivationMeter

    factors = {"linear_proj": 16384.0, "linear_fc2": 8192.0}
    case = Case(name="", features=features, half=True, shape=Shape(layers=12), factors=factors)
    model = _build_loaded(case)
    with ActivationMeter(model) as meter:
        step = _pass(model, case.shape)
    return step, meter.read()


def _metered_logit_peak() -> float:
    """What a meter says of the output layer when the logits are far above the cap."""
    from megatron_kaiyuan.model.numerics import ActivationMeter

    case = Case(name="", features=KAIYUAN, factors={"output_layer": 100.0})
    model = _build_loaded(case)
    with ActivationMeter(model) as meter:
        _pass(model, case.shape)
    peaks = {entry.name: entry.peak for entry in meter.read()}
    meter.reset()
    _pass(model, case.shape)  # no longer metered
    assert meter.read() == []
    return peaks["output_layer"]


def _layer_without_output_gains() -> bool:
    """Whether a layer returns its input when its output norms return zero."""
    layer = tiny.build_stage(Case(name="", features=KAIYUAN)).decoder.layers[0]
    torch.nn.init.zeros_(layer.post_self_attn_layernorm.weight)
    torch.nn.init.zeros_(layer.post_mlp_layernorm.weight)
    x = torch.randn(3, 1, 32)
    output, _ = layer(x)
    return torch.equal(output, x)


def _evaluation_loss() -> tuple[Tensor, Tensor]:
    """Losses in training and in evaluation mode of a model with z-loss."""
    case = Case(name="", features=Features(z_loss=0.1))
    model = _build_loaded(case)
    tokens, labels = random_batch(case.shape)
    positions = torch.arange(case.shape.sequence).expand_as(tokens)
    training = model(tokens, positions, None, labels=labels)
    return training.detach(), model.eval()(tokens, positions, None, labels=labels).detach()


def _initial_gains() -> dict[str, float]:
    from megatron_kaiyuan.model.config import KaiyuanModelOptions

    options = KaiyuanModelOptions(sandwich_norm=True, post_norm_gain_init=0.5, post_norm_depth_scaled=True)
    model = tiny.build_stage(Case(name="", shape=Shape(layers=4), overrides={"kaiyuan": options}))
    return {name: p.mean().item() for name, p in model.named_parameters() if "layernorm" in name}


def _checkpoint_names() -> dict[str, set[str]]:
    model = tiny.build_stage(Case(name="", features=KAIYUAN))
    model.config.hetereogenous_dist_checkpoint = True  # Megatron's spelling: one entry a layer, not one stacked tensor
    return {
        "state": set(model.state_dict()),
        "sharded": {entry.key for entry in model.sharded_state_dict().values() if hasattr(entry, "key")},
    }


@pytest.mark.distributed
def test_with_every_switch_off_the_model_is_bit_identical_to_megatrons(observations: dict[str, Any]) -> None:
    identity = observations["identity"]
    assert len(identity["ours"]) == len(identity["stock"]) > 10
    assert all(torch.equal(ours, stock) for ours, stock in zip(identity["ours"], identity["stock"], strict=True))


@pytest.mark.distributed
def test_our_norm_and_layer_spec_alone_change_no_bit(observations: dict[str, Any]) -> None:
    identity = observations["identity"]
    assert all(torch.equal(ours, stock) for ours, stock in zip(identity["our modules"], identity["stock"], strict=True))


@pytest.mark.distributed
def test_logits_beyond_fp16_give_a_finite_loss_and_finite_gradients(observations: dict[str, Any]) -> None:
    _, stock_loss, *_ = observations["huge logits, stock"]
    assert not stock_loss.isfinite().all()
    logits, loss, *gradients = observations["huge logits"]
    assert logits.abs().max() == KAIYUAN.softcap
    log_partition = KAIYUAN.softcap + math.log(Shape().vocab)
    assert loss.max() <= KAIYUAN.softcap + log_partition + KAIYUAN.z_loss * log_partition**2
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.distributed
def test_branch_outputs_near_65504_do_not_reach_the_residual_stream(observations: dict[str, Any]) -> None:
    (_, loss, *gradients), peaks = observations["huge branches"]
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    by_name = {entry.name: entry for entry in peaks}
    assert max(entry.peak for name, entry in by_name.items() if "linear_" in name) > 20_000
    # Each branch adds at most sqrt(h) * gain to an element: 24 branches, gains below 2.
    assert all(by_name[f"decoder.layers.{layer}"].peak < 24 * 32**0.5 * 2 for layer in range(12))


@pytest.mark.distributed
def test_the_meter_names_the_first_layer_that_overflows(observations: dict[str, Any]) -> None:
    (_, loss, *_), peaks = observations["huge branches, stock"]
    assert not loss.isfinite().all()
    culprit = first_non_finite(peaks)
    assert culprit is not None
    position = [entry.name for entry in peaks].index(culprit)
    assert position > 0
    assert all(entry.headroom > 1 for entry in peaks[:position])
    assert peaks[position].headroom == 0


@pytest.mark.distributed
def test_the_meter_sees_the_logits_before_the_soft_cap(observations: dict[str, Any]) -> None:
    assert observations["logit peak"] > 10 * KAIYUAN.softcap


@pytest.mark.distributed
def test_zero_output_gains_make_a_layer_the_identity(observations: dict[str, Any]) -> None:
    assert observations["identity layer"]


@pytest.mark.distributed
def test_evaluation_loss_is_the_cross_entropy_without_z_loss(observations: dict[str, Any]) -> None:
    shape, features = Shape(), Features(z_loss=0.1)
    tokens, labels = random_batch(shape)
    weights = random_weights(shape, features)
    training, evaluation = observations["evaluation"]
    torch.testing.assert_close(
        training.double(), reference_step(weights, tokens, labels, shape, features)[0], rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        evaluation.double(), reference_step(weights, tokens, labels, shape, Features())[0], rtol=1e-5, atol=0
    )


@pytest.mark.distributed
def test_depth_scaling_divides_the_gain_of_output_norms_only(observations: dict[str, Any]) -> None:
    gains = observations["gain"]
    assert len(gains) == 4 * 4 + 1
    assert all(value == (0.25 if ".post_" in name else 1.0) for name, value in gains.items())


@pytest.mark.distributed
def test_checkpoint_names_are_megatrons_plus_the_output_norms(observations: dict[str, Any]) -> None:
    names = observations["names"]
    layer = {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "post_self_attn_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
        "post_mlp_layernorm.weight",
    }
    expected = {f"decoder.layers.{number}.{name}" for number in range(2) for name in layer}
    expected |= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    assert {name for name in names["sharded"] if "_extra_state" not in name} == expected
    assert {"decoder.layers.1.post_self_attn_layernorm.weight", "decoder.layers.1.post_mlp_layernorm.weight"} <= names[
        "state"
    ]
