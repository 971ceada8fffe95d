"""Parameter counts: the published shape, and the formula against built models."""

from typing import Any

import pytest
import torch

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.config import KaiyuanModelOptions, KaiyuanTransformerConfig
from megatron_kaiyuan.model.parameters import count_parameters
from tests.helpers import run_distributed
from tests.unit_tests.model import tiny
from tests.unit_tests.model.reference import Features
from tests.unit_tests.model.tiny import Case


def kaiyuan_2b(**options: Any) -> KaiyuanTransformerConfig:
    return KaiyuanTransformerConfig(
        num_layers=28,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=16,
        num_query_groups=8,
        kv_channels=128,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        transformer_impl="local",
        use_cpu_initialization=True,
        cuda_graph_modules=[],  # its default is deprecated
        kaiyuan=KaiyuanModelOptions(**options),
    )


def test_the_kaiyuan_2b_shape_has_its_published_number_of_parameters() -> None:
    count = count_parameters(kaiyuan_2b(), 151_936)
    assert count.total == 2_031_739_904
    assert count.embeddings == 622_329_856


def test_the_output_norms_add_two_gains_a_layer_and_the_soft_cap_none() -> None:
    count = count_parameters(kaiyuan_2b(sandwich_norm=True, logit_softcap=30.0), 151_936)
    assert count.total == 2_031_739_904 + 28 * 2 * 2048


BIASED = {"add_bias_linear": True, "gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}
CASES = [
    Case(name="stock"),
    Case(name="QK-norm and sandwich norm", features=Features(qk_norm=True, sandwich=True)),
    Case(name="biases, no gate", overrides=BIASED),
    Case(name="biases, sandwich norm", features=Features(sandwich=True), overrides=BIASED),
    Case(name="biases of QKV only", overrides={"add_qkv_bias": True}),
]


@pytest.mark.distributed
def test_the_formula_counts_what_is_built() -> None:
    [counts] = run_distributed(tiny.count_parameters_both_ways, 1, CASES)
    assert all(built == counted for built, counted in counts.values()), counts


def test_a_mixture_of_experts_is_not_counted_wrongly_but_refused() -> None:
    config = kaiyuan_2b()
    config.num_moe_experts = 8
    with pytest.raises(ConfigError, match="dense attention and MLP only"):
        count_parameters(config, 151_936)
