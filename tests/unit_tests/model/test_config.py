"""Options that cannot work are refused by name before a model is built."""

import argparse
import dataclasses
import math
from typing import Any

import pytest
from torch.nn import functional

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.config import KaiyuanModelOptions, KaiyuanTransformerConfig, model_options_from_args

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "normalization": "RMSNorm",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "cuda_graph_modules": [],  # its default is deprecated
}


SCALED = {"sandwich_norm": True, "branch_scale_bits": 4}
RISING = {"sandwich_norm": True, "raise_branch_scale_below": 8.0}
SWIGLU = {"gated_linear_unit": True, "activation_func": functional.silu, "add_bias_linear": False}


def config(**values: Any) -> KaiyuanTransformerConfig:
    return KaiyuanTransformerConfig(**(BASE | values))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"logit_softcap": -1.0}, r"--kaiyuan-logit-softcap must be a finite number >= 0, got -1.0; 0 switches"),
        ({"logit_softcap": math.nan}, "--kaiyuan-logit-softcap must be"),
        ({"logit_softcap": math.inf}, "--kaiyuan-logit-softcap must be"),
        ({"z_loss": -1e-4}, "--kaiyuan-z-loss must be"),
        (
            {"sandwich_norm": True, "post_norm_gain_init": 0.0},
            "--kaiyuan-post-norm-gain-init must be a positive number",
        ),
        ({"post_norm_gain_init": 0.5}, "add --kaiyuan-sandwich-norm or remove them"),
        ({"post_norm_depth_scaled": True}, "add --kaiyuan-sandwich-norm or remove them"),
        (
            {"sandwich_norm": True, "branch_scale_bits": 9},
            "--kaiyuan-branch-scale-bits must be a whole number from 0 to 8",
        ),
        ({"sandwich_norm": True, "branch_scale_bits": -1}, "got -1; 0 switches it off"),
        ({"branch_scale_bits": 4}, "add --kaiyuan-sandwich-norm or remove it"),
        ({"raise_branch_scale_below": 8.0}, "--kaiyuan-raise-branch-scale-below 8 scales what"),
        (
            {"sandwich_norm": True, "raise_branch_scale_below": 0.5},
            "--kaiyuan-raise-branch-scale-below 0.5: what is finite in FP16 has a headroom of at least 1",
        ),
        (
            {"sandwich_norm": True, "raise_branch_scale_below": -1.0},
            "--kaiyuan-raise-branch-scale-below must be a finite number >= 0, got -1",
        ),
        (
            {"attention": "flash"},
            "--kaiyuan-attention 'flash' is unknown; use one of auto, sdpa, sdpa-flash, sdpa-torch-order, unfused",
        ),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_flag(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        KaiyuanModelOptions(**values)


@pytest.mark.filterwarnings("ignore:Transformer Engine cross entropy loss fusion has known stability issues")
@pytest.mark.parametrize(
    ("options", "values", "complaint"),
    [
        ({"logit_softcap": 30.0}, {"cross_entropy_loss_fusion": True}, "remove --cross-entropy-loss-fusion"),
        (
            {"z_loss": 1e-4},
            {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
            "remove --cross-entropy-loss-fusion",
        ),
        ({"logit_softcap": 30.0}, {"mtp_num_layers": 1}, "remove --mtp-num-layers"),
        ({"sandwich_norm": True}, {"normalization": "LayerNorm"}, "add --normalization RMSNorm"),
        (
            SCALED,
            SWIGLU | {"num_moe_experts": 4, "moe_ffn_hidden_size": 64},
            "branch-scale-bits does not support --num-experts",
        ),
        (
            RISING,
            SWIGLU | {"num_moe_experts": 4, "moe_ffn_hidden_size": 64},
            "raise-branch-scale-below does not support --num-experts",
        ),
        ({"sandwich_norm": True}, {"layernorm_zero_centered_gamma": True}, "--apply-layernorm-1p"),
        (RISING, {"gated_linear_unit": False}, "--kaiyuan-raise-branch-scale-below acts on the output of SwiGLU"),
        (RISING, SWIGLU | {"cuda_graph_impl": "local"}, "raise-branch-scale-below does not support --cuda-graph-impl"),
        (SCALED, {"gated_linear_unit": False}, "acts on the output of SwiGLU; add --swiglu"),
        (SCALED, SWIGLU | {"activation_func": functional.gelu}, "add --swiglu"),
        (SCALED, SWIGLU | {"add_bias_linear": True}, "add --disable-bias-linear"),
        (SCALED, SWIGLU | {"activation_func_clamp_value": 7.0}, "--activation-func-clamp-value; remove one"),
        ({"recompute_swiglu": True}, {"gated_linear_unit": False}, "add --swiglu or remove it"),
        ({"recompute_swiglu": True}, SWIGLU | {"add_bias_linear": True}, "add --disable-bias-linear"),
        (
            {"recompute_swiglu": True},
            SWIGLU | {"add_bias_linear": False, "num_moe_experts": 4, "moe_ffn_hidden_size": 64},
            "recompute-swiglu does not support --num-experts",
        ),
        (
            {"recompute_swiglu": True},
            SWIGLU | {"add_bias_linear": False, "cuda_graph_impl": "local"},
            "--cuda-graph-impl",
        ),
        ({"attention": "sdpa"}, {"transformer_impl": "transformer_engine"}, "use --attention-backend there"),
        ({}, {"context_parallel_size": 2}, "--context-parallel-size 2 needs --transformer-impl transformer_engine"),
        ({}, {"window_size": (128, 0)}, "use --kaiyuan-attention unfused"),
        ({}, {"softmax_type": "off-by-one"}, "use --kaiyuan-attention unfused"),
    ],
)
def test_a_contradiction_with_a_megatron_flag_is_refused_with_the_remedy(
    options: dict[str, Any], values: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config(kaiyuan=KaiyuanModelOptions(**options), **values)


def test_the_unfused_kernel_takes_what_sdpa_refuses() -> None:
    chosen = config(kaiyuan=KaiyuanModelOptions(attention="unfused"), window_size=(128, 0))
    assert chosen.local_attention_kernel == "unfused"


def test_by_default_nothing_of_the_model_changes() -> None:
    assert config().local_attention_kernel == "sdpa"
    assert config(transformer_impl="transformer_engine").has_stock_layers
    assert config(kaiyuan=KaiyuanModelOptions(attention="unfused")).has_stock_layers
    recomputing = KaiyuanModelOptions(attention="unfused", fusions="none", recompute_swiglu=True)
    assert not config(kaiyuan=recomputing, **SWIGLU).has_stock_layers, "only ours recomputes"
    defaults = KaiyuanModelOptions()
    assert (defaults.sandwich_norm, defaults.logit_softcap, defaults.z_loss) == (False, 0.0, 0.0)
    assert (defaults.branch_scale_bits, defaults.branch_scale) == (0, 1.0)


def test_depth_scaling_divides_the_gain_by_the_square_root_of_the_depth() -> None:
    assert KaiyuanModelOptions(sandwich_norm=True).post_norm_gain(28) == 1.0
    scaled = KaiyuanModelOptions(sandwich_norm=True, post_norm_gain_init=2.0, post_norm_depth_scaled=True)
    assert scaled.post_norm_gain(16) == 0.5


def test_options_are_read_from_the_arguments_of_the_same_name() -> None:
    options = KaiyuanModelOptions(sandwich_norm=True, logit_softcap=20.0, z_loss=1e-5, attention="unfused")
    arguments = {f"kaiyuan_{name}": value for name, value in dataclasses.asdict(options).items()}
    assert model_options_from_args(argparse.Namespace(**arguments, lr=1.0)) == options
    stock = argparse.Namespace(lr=1.0)
    assert model_options_from_args(stock) == KaiyuanModelOptions(), "a checkpoint of stock Megatron has none"
