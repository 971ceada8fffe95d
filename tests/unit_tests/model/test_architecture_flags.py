"""Every architecture flag that the table calls honoured reaches the built model, and ours computes what stock does.

Tests look at weights, losses and gradients, not at the flag. With our features off they are stock Megatron's, bit for
bit. With SDPA and our fused kernels they only round in another order. Without the flag they are others.
"""

from typing import Any

import pytest
import torch

from megatron_kaiyuan.flags.architecture import ARCHITECTURE
from megatron_kaiyuan.flags.rules import Fate
from tests.helpers import run_distributed
from tests.unit_tests.model import command_lines, test_experts, tiny
from tests.unit_tests.model.command_lines import FEATURES_OFF, FUSED

SAME_FUNCTION = [
    "--apply-query-key-layer-scaling",
    "--attention-softmax-in-fp32",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--recompute-granularity selective --recompute-modules core_attn mlp",
    "--no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion",
]
"""Ways to compute: the flag alone changes no value."""
OTHER_FUNCTION = [
    "--normalization LayerNorm",
    "--normalization LayerNorm --qk-layernorm",
    "--norm-epsilon 0.1",
    "--qk-layernorm",
    "--num-attention-heads 8 --kv-channels 4",
    "minus:--group-query-attention",
    "--kv-channels 16",
    "--attention-output-gate",
    "--attention-output-gate --qk-layernorm --add-qkv-bias",
    "--no-rope-freq 2",
    "--rotary-interleaved",
    "--rotary-percent 0.5",
    "--rotary-base 500000",
    "--rotary-seq-len-interpolation-factor 2",
    "--use-rope-scaling",
    "--position-embedding-type yarn --rotary-scaling-factor 4",
    "--position-embedding-type learned_absolute",
    "--position-embedding-type none",
    "minus:--swiglu",
    "minus:--swiglu --squared-relu",
    "minus:--swiglu --quick-geglu",
    "--activation-func-clamp-value 0.1 --no-bias-swiglu-fusion",
    "--glu-linear-offset 1 --no-bias-swiglu-fusion",
    "minus:--disable-bias-linear",
    "--add-qkv-bias",
    "--num-layers 3",
    "--use-mup --mup-base-hidden-size 16",
    "--init-method-std 0.1",
    "--embedding-init-method-std 0.5",
    "minus:--untie-embeddings-and-output-weights",
    "--mtp-num-layers 2 --mtp-use-repeated-layer --mtp-detach-heads --num-experts 4",  # Megatron's log never grows
    "--mtp-num-layers 1",
    "--fp16",
    "--cross-entropy-loss-fusion",
]
"""Another model, or the same one rounded elsewhere."""
BY_UNFUSED_ATTENTION = [
    "--window-size 4,0",
    "--window-size 4,0 --window-attn-skip-freq 2",
    "--softmax-type off-by-one",
    "--softmax-type learnable",
]
UNFUSED_ATTENTION = f"--kaiyuan-attention unfused {FUSED}"
LARGER = "--init-method-std 0.3"
"""Initial weights with which positions and activations matter."""
# Two orders of the same FP32 sums of up to 64 terms below 10, through three layers and back.
ROUNDING = 1e-4
HALF_ROUNDING = 0.1

TESTED_ELSEWHERE = {
    "sequence_parallel": test_experts.LAYOUTS["TP 2, sequence parallel"][0],
    "hidden_dropout": "test_layers.py",  # random: no bits to compare
    "attention_dropout": "test_attention.py",
    "fp32_residual_connection": "test_model.py",  # stock's local norms fail at it
    "moe_latent_size": "needs Transformer Engine",
    "spec": "below",
    "gradient_accumulation_fusion": "test_model.py",
    "use_flash_attn": "below",
    "transformer_impl": "test_builder.py",
}


def lines_compared() -> list[str]:
    return [*SAME_FUNCTION, *OTHER_FUNCTION, *BY_UNFUSED_ATTENTION, *test_experts.ONE_RANK]


def test_every_honoured_flag_is_compared_with_stock() -> None:
    from megatron_kaiyuan.training.parsing import known_flags

    words = {word.removeprefix("minus:") for line in lines_compared() for word in line.split()}
    flags = known_flags()
    honoured = {name for rule in ARCHITECTURE if rule.fate is Fate.HONOURED for name in rule.names}
    missing = {name for name in honoured - TESTED_ELSEWHERE.keys() if words.isdisjoint(flags[name].flags)}
    assert missing - {"swiglu", "num_query_groups"} == set()  # of the command that all lines extend
    assert {"--swiglu", "--num-query-groups"} <= set(command_lines.COMMAND.split())


def compare_all(rank: int) -> dict[str, Any]:
    plain = [f"{LARGER} {line}" for line in ["", *SAME_FUNCTION, *OTHER_FUNCTION]]
    results = command_lines.compare(rank, plain, [FEATURES_OFF, FUSED], {})
    windows = [f"{LARGER} {line}" for line in BY_UNFUSED_ATTENTION]
    return results | command_lines.compare(rank, windows, [FEATURES_OFF, UNFUSED_ATTENTION], None)


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    [result] = run_distributed(compare_all, 1, timeout=300)
    return {words: {flags: tiny.unpacked(step) for flags, step in steps.items()} for words, steps in result.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("line", [*SAME_FUNCTION, *OTHER_FUNCTION, *BY_UNFUSED_ATTENTION])
def test_the_model_is_stocks(line: str, compared: dict[str, Any]) -> None:
    steps = compared[f"{LARGER} {line}"]
    stock, off = steps["stock"], steps[FEATURES_OFF]
    fused = steps[UNFUSED_ATTENTION if line in BY_UNFUSED_ATTENTION else FUSED]
    assert off.keys() == stock.keys() == fused.keys()
    assert [name for name in stock if not torch.equal(off[name], stock[name])] == []
    assert [name for name in stock if name.startswith("weight") and not torch.equal(fused[name], stock[name])] == []
    rounding = HALF_ROUNDING if "--fp16" in line else ROUNDING
    assert max(float((fused[name] - stock[name]).abs().max()) for name in stock) < rounding


@pytest.mark.distributed
@pytest.mark.parametrize("line", [*OTHER_FUNCTION, *BY_UNFUSED_ATTENTION])
def test_the_flag_changes_the_model(line: str, compared: dict[str, Any]) -> None:
    with_flag, without = compared[f"{LARGER} {line}"][FEATURES_OFF], compared[f"{LARGER} "][FEATURES_OFF]
    assert with_flag.keys() != without.keys() or any(
        not torch.equal(with_flag[name], without[name]) for name in without
    )


def observe(_rank: int) -> dict[str, Any]:
    """Models whose difference is in their modules, and command lines that are refused."""
    from megatron_kaiyuan.errors import ConfigError

    tiny.initialize_parallel(1, 1)
    seen = {}
    for words in (f"{SPEC} {FEATURES_OFF}", "", "--kaiyuan-fusions loss", "--cross-entropy-loss-fusion"):
        model = command_lines.build_stage(words)
        core = model.decoder.layers[0].self_attention.core_attention
        seen[words] = (type(core).__name__, hasattr(model, "fused_loss"))
    for words in REFUSED:
        try:
            command_lines.build_stage(words)
            seen[words] = "accepted"
        except ConfigError as error:
            seen[words] = str(error)
    return seen


SPEC = "--spec tests.unit_tests.model.command_lines marked_layer_spec"
REFUSED = {
    SPEC: "replaces the Kaiyuan layers; leave it out, or give --kaiyuan-attention unfused",
    f"--spec nowhere marked_layer_spec {FEATURES_OFF}": "cannot be imported (No module named 'nowhere')",
    f"--spec tests.unit_tests.model.command_lines nothing {FEATURES_OFF}": "has no attribute 'nothing'",
    f"--spec local {FEATURES_OFF}": "give a module and the name of a spec in it",
    "--cross-entropy-loss-fusion --kaiyuan-fusions loss": "both name a kernel for the loss",
}


@pytest.fixture(scope="module")
def observations() -> dict[str, Any]:
    [result] = run_distributed(observe, 1)
    return dict(result)


@pytest.mark.distributed
def test_another_spec_builds_its_own_layers(observations: dict[str, Any]) -> None:
    assert observations[f"{SPEC} {FEATURES_OFF}"][0] == "MarkedAttention"
    assert observations[""][0] == "SdpaCoreAttention"


@pytest.mark.distributed
def test_megatrons_fused_loss_is_taken_where_it_is_asked_for(observations: dict[str, Any]) -> None:
    assert observations["--kaiyuan-fusions loss"][1]
    assert not observations["--cross-entropy-loss-fusion"][1]


@pytest.mark.distributed
@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_built_is_refused(words: str, observations: dict[str, Any]) -> None:
    assert REFUSED[words] in observations[words]
