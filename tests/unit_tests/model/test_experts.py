"""Mixtures of experts: the model that stock Megatron builds, on one rank and split, and our options around them."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.helpers import run_distributed
from tests.unit_tests.model import command_lines, tiny
from tests.unit_tests.model.command_lines import FEATURES_OFF, FUSED

EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 40 --moe-aux-loss-coeff 0.01"
ONE_RANK = [
    "--num-experts 4",
    f"{EXPERTS} --qk-layernorm",
    f"{EXPERTS} --qk-l2-norm",
    f"{EXPERTS} --moe-layer-freq ([0]*1+[1]*1)",
    f"{EXPERTS} --moe-shared-expert-intermediate-size 24 --moe-shared-expert-gate",
    f"{EXPERTS} --moe-router-topk 1 --moe-router-pre-softmax --moe-token-dispatcher-type alltoall",
    f"{EXPERTS} --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-z-loss-coeff 0.001",
    f"{EXPERTS} --moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.0",
    f"{EXPERTS} --normalization LayerNorm --add-qkv-bias",
]
SPLIT = [EXPERTS, f"{EXPERTS} --moe-token-dispatcher-type alltoall --qk-layernorm"]
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "TP 2, sequence parallel": (
        "--tensor-model-parallel-size 2 --sequence-parallel",
        {"tensor_model_parallel_size": 2},
    ),
    "EP 2": ("--expert-model-parallel-size 2", {"expert_model_parallel_size": 2}),
}
# Two orders of the same FP32 sums of up to 64 terms, with values near 1, through two layers and back.
ROUNDING = 1e-6


def assert_same_model(steps: dict[str, Any]) -> None:
    """With our features off every bit is stock's; SDPA and the fused kernels only round in another order."""
    stock = tiny.unpacked(steps["stock"])
    assert len(stock) > 30
    for flags in (FEATURES_OFF, FUSED):
        ours = tiny.unpacked(steps[flags])
        assert ours.keys() == stock.keys()
        exact = [name for name in stock if flags == FEATURES_OFF or name.startswith("weight")]
        assert [name for name in exact if not torch.equal(ours[name], stock[name])] == []
        assert max(float((ours[name] - stock[name]).abs().max()) for name in stock) < ROUNDING


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    [result] = run_distributed(command_lines.compare, 1, ONE_RANK, [FEATURES_OFF, FUSED], {})
    return dict(result)


@pytest.mark.distributed
@pytest.mark.parametrize("words", ONE_RANK)
def test_experts_are_built_as_stock_builds_them(words: str, one_rank: dict[str, Any]) -> None:
    assert_same_model(one_rank[words])
    assert any(".experts." in name for name in one_rank[words]["stock"])


def compare_split(rank: int, layout: str) -> dict[str, Any]:
    """The steps of this rank, and the names of its weights."""
    from megatron_kaiyuan.monitoring.diagnosis import global_name

    words, sizes = LAYOUTS[layout]
    lines = [f"{line} {words}" for line in SPLIT]
    steps = command_lines.compare(rank, lines, [FEATURES_OFF, FUSED], sizes)
    model = command_lines.build_stage(lines[0])
    return {"steps": steps, "names": [global_name(model, name) for name, _ in model.named_parameters()]}


@pytest.fixture(scope="module", params=LAYOUTS)
def split(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    return request.param, run_distributed(compare_split, 2, request.param)


@pytest.mark.distributed
def test_split_experts_are_built_as_stock_builds_them(split: tuple[str, list[dict[str, Any]]]) -> None:
    for rank in split[1]:
        assert len(rank["steps"]) == len(SPLIT)
        for steps in rank["steps"].values():
            assert_same_model(steps)


@pytest.mark.distributed
def test_gradients_are_named_by_the_experts_number_in_the_whole_model(split: tuple[str, list[dict[str, Any]]]) -> None:
    layout, ranks = split
    first, second = ({name for name in rank["names"] if ".local_experts." in name} for rank in ranks)
    experts = {int(name.split(".local_experts.")[1].split(".")[0]) for name in first | second}
    assert experts == {0, 1, 2, 3}
    assert first.isdisjoint(second) if layout == "EP 2" else first == second


SANDWICH = f"{EXPERTS} --moe-shared-expert-intermediate-size 24 --kaiyuan-sandwich-norm"


def observe(rank: int) -> dict[str, Any]:
    """A layer with output norms whose attention adds nothing; the meter's readings."""
    from megatron_kaiyuan.model.numerics import ActivationMeter
    from megatron_kaiyuan.monitoring.diagnosis import depth

    tiny.initialize_parallel(1, 1)
    layers = {flags: _layer_without_attention(f"{SANDWICH} {flags}") for flags in (FEATURES_OFF, FUSED)}
    model = command_lines.build_stage(f"{EXPERTS} --moe-shared-expert-intermediate-size 24")
    outputs: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.endswith(("linear_fc1", "linear_fc2")):
            module.register_forward_hook(_note_peak(outputs, name))
    with ActivationMeter(model) as meter:
        command_lines.step(model, rank)
    peaks = meter.read()
    names = [entry.name for entry in peaks]
    return {
        "layers": tiny.portable(layers),
        "peaks": {entry.name: entry.peak for entry in peaks},
        "outputs": outputs,
        "ordered": names == sorted(names, key=depth),
    }


def _note_peak(outputs: dict[str, float], name: str) -> Any:
    def note(_module: Any, _inputs: Any, output: Any) -> None:
        if output[0].numel():
            outputs[name] = max(outputs.get(name, 0.0), float(output[0].abs().max()))

    return note


def _layer_without_attention(words: str) -> dict[str, Any]:
    """A layer's output for an input, the experts' own output inside it, and the gain of their output norm."""
    layer = command_lines.build_stage(words).decoder.layers[0]
    torch.nn.init.zeros_(layer.post_self_attn_layernorm.weight)
    torch.nn.init.uniform_(layer.post_mlp_layernorm.weight, 0.5, 2.0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(command_lines.LENGTH, command_lines.BATCH, 32, generator=generator)
    output, _ = layer(x)
    branch, _ = layer.mlp.forward(functional.rms_norm(x, (32,), layer.pre_mlp_layernorm.weight, 1e-6))
    return {"x": x, "output": output, "branch": branch, "gain": layer.post_mlp_layernorm.weight}


@pytest.fixture(scope="module")
def observations() -> dict[str, Any]:
    [result] = run_distributed(observe, 1)
    return dict(result)


@pytest.mark.distributed
@pytest.mark.parametrize("flags", [FEATURES_OFF, FUSED])
def test_sandwich_norm_acts_on_what_the_experts_output_together(flags: str, observations: dict[str, Any]) -> None:
    seen = {name: value.double() for name, value in tiny.unpacked(observations["layers"][flags]).items()}
    branch = seen["branch"]
    normed = branch / (branch.square().mean(-1, keepdim=True) + 1e-6).sqrt() * seen["gain"]
    assert (seen["x"] + normed - seen["output"]).abs().max() < 1e-5
    assert branch.abs().max() > 0


@pytest.mark.distributed
def test_the_meter_tells_the_largest_value_among_a_layers_experts(observations: dict[str, Any]) -> None:
    peaks, outputs = observations["peaks"], observations["outputs"]
    for layer in range(2):
        mlp = f"decoder.layers.{layer}.mlp"
        for product in ("linear_fc1", "linear_fc2"):
            of_experts = [
                value for name, value in outputs.items() if name.startswith(f"{mlp}.experts.") and product in name
            ]
            assert len(of_experts) > 1
            assert peaks[f"{mlp}.experts.{product}"] == max(of_experts)
            assert peaks[f"{mlp}.shared_experts.{product}"] == outputs[f"{mlp}.shared_experts.{product}"]
        assert {f"{mlp}.experts.activation", f"{mlp}.shared_experts.activation"} <= peaks.keys()
    assert observations["ordered"]
