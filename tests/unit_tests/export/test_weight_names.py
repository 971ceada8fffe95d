import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.export.architecture import Architecture
from megatron_kaiyuan.export.configuration_kaiyuan import KaiyuanConfig
from megatron_kaiyuan.export.layouts import Layout
from megatron_kaiyuan.export.modeling_kaiyuan import KaiyuanForCausalLM
from megatron_kaiyuan.export.weight_names import joined, parts_of, weights_of
from tests.unit_tests.export.small_models import VARIANTS, SmallModel

ARCHITECTURES = st.builds(
    lambda groups, per_group, head, ffn, **switches: Architecture(
        num_layers=2,
        hidden_size=6,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=2 * head,
        padded_vocab_size=16,
        max_position_embeddings=32,
        rotary_base=1e4,
        layernorm_epsilon=1e-5,
        init_method_std=0.02,
        logit_softcap=0.0,
        **switches,
    ),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    head=st.integers(1, 3),
    ffn=st.integers(1, 7),
    qk_layernorm=st.booleans(),
    sandwich_norm=st.booleans(),
    add_qkv_bias=st.booleans(),
    tied_embeddings=st.booleans(),
)


@given(ARCHITECTURES)
@settings(max_examples=60, deadline=None)
def test_joining_the_parts_gives_the_weight_back_bit_for_bit(architecture: Architecture) -> None:
    for weight in weights_of(architecture):
        tensor = torch.arange(torch.Size(weight.shape).numel()).view(weight.shape)
        assert torch.equal(joined(weight, parts_of(weight, tensor, architecture), architecture), tensor)


@given(ARCHITECTURES)
@settings(max_examples=60, deadline=None)
def test_rows_of_query_key_and_value_are_where_megatron_puts_them(architecture: Architecture) -> None:
    """Row by row: a group is its queries, then its key, then its value, each `kv_channels` rows."""
    weight = next(weight for weight in weights_of(architecture) if weight.layout == "qkv")
    query, key, value = parts_of(weight, torch.arange(weight.shape[0])[:, None].expand(weight.shape), architecture)
    head, per_group = architecture.kv_channels, architecture.queries_per_group
    for part, find in (
        (query, lambda number: (number // per_group, number % per_group)),
        (key, lambda number: (number, per_group)),
        (value, lambda number: (number, per_group + 1)),
    ):
        for row in range(part.shape[0]):
            group, place = find(row // head)
            assert int(part[row, 0]) == (group * (per_group + 2) + place) * head + row % head


@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: model.name)
def test_names_and_shapes_are_those_that_transformers_asks_for(model: SmallModel) -> None:
    architecture = model.architecture
    with torch.device("meta"):
        wanted = KaiyuanForCausalLM(KaiyuanConfig(**Layout("kaiyuan", architecture).config(torch.float32))).state_dict()
    if model.tied:
        del wanted["lm_head.weight"]
    found = {}
    for weight in weights_of(architecture):
        for layer in range(architecture.num_layers if weight.stacked else 1):
            parts = parts_of(weight, torch.empty(weight.shape, device="meta"), architecture)
            found.update(zip(weight.part_names(layer), (part.shape for part in parts), strict=True))
    assert found == {name: tensor.shape for name, tensor in wanted.items()}
