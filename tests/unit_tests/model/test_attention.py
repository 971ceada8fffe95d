"""SDPA core attention against softmax attention in float64."""

import contextlib
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.attention import SdpaCoreAttention
from megatron_kaiyuan.model.config import KaiyuanModelOptions, KaiyuanTransformerConfig
from tests.unit_tests.model.reference import reference_attention

HEADS, GROUPS, SIZE, BATCH = 4, 2, 16, 2


def build_attention(options: KaiyuanModelOptions | None = None) -> SdpaCoreAttention:
    config = KaiyuanTransformerConfig(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        transformer_impl="local",
        use_cpu_initialization=True,
        cuda_graph_modules=[],  # its default is deprecated
        kaiyuan=options or KaiyuanModelOptions(),
    )
    return SdpaCoreAttention(config, 1, AttnMaskType.causal, "self")


def random_inputs(queries: int, keys: int, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(queries, BATCH, HEADS, SIZE, generator=generator) * factor
    key, value = (torch.randn(keys, BATCH, GROUPS, SIZE, generator=generator) for _ in range(2))
    query, key, value = (tensor.to(dtype).requires_grad_() for tensor in (query, key * factor, value))
    return query, key, value


def expected_context(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """[sq, b, n, d] and [sk, b, g, d] in, [sq, b, n * d] out, by the definition."""
    repeated = [tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (key, value)]
    per_head = [tensor.permute(1, 2, 0, 3) for tensor in (query, *repeated)]
    return reference_attention(*per_head, visible).permute(2, 0, 1, 3).flatten(2)


# An output is a weighted mean of values: 4 roundings relative to the largest value (score, weight, product, output).
@pytest.mark.parametrize(("dtype", "unit_roundoff"), [(torch.float32, 2.0**-24), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("masking", ["causal flag", "explicit mask"])
def test_causal_attention_with_grouped_queries_matches_float64(
    dtype: torch.dtype, unit_roundoff: float, masking: str
) -> None:
    inputs = random_inputs(33, 33, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    visible = torch.ones(33, 33, dtype=torch.bool).tril()
    output = build_attention()(*inputs, ~visible[None, None] if masking == "explicit mask" else None)
    expected = expected_context(*exact, visible)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    output.backward(upstream)
    expected.backward(upstream.double())
    assert (output.double() - expected).abs().max() <= 4 * unit_roundoff * inputs[2].abs().max()
    for tensor, reference in zip(inputs, exact, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        # A gradient passes the four roundings of the recomputed forward pass and four of its own.
        assert (tensor.grad.double() - reference.grad).abs().max() <= 8 * unit_roundoff * reference.grad.abs().max()


def test_scores_beyond_65504_stay_finite_in_fp16() -> None:
    query, key, value = random_inputs(17, 17, torch.float16, factor=300.0)
    scores = torch.einsum("sbd,tbd->st", query[:, :, 0].double(), key[:, :, 0].double())
    assert scores.abs().max() > 65504
    output = build_attention()(query, key, value, None)
    output.sum().backward()
    exact = expected_context(query.double(), key.double(), value.double(), torch.ones(17, 17, dtype=torch.bool).tril())
    assert (output.double() - exact).abs().max() <= 4 * 2.0**-11 * value.abs().max()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (query, key, value))


@pytest.mark.parametrize(
    ("attention", "first", "cudnn"),
    [("auto", SDPBackend.CUDNN_ATTENTION, True), ("sdpa", SDPBackend.CUDNN_ATTENTION, True),
     ("sdpa-flash", SDPBackend.FLASH_ATTENTION, False), ("sdpa-torch-order", None, None)],
)  # fmt: skip
def test_the_option_says_which_kernels_are_tried(
    attention: Any, first: SDPBackend | None, cudnn: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are CUDA's; here it is only seen what would be asked for."""
    asked: list[list[SDPBackend] | None] = []

    def order(kernels: list[SDPBackend] | None, _query: Tensor) -> contextlib.AbstractContextManager[None]:
        asked.append(kernels)
        return contextlib.nullcontext()

    monkeypatch.setattr("megatron_kaiyuan.model.attention._preferred", order)
    build_attention(KaiyuanModelOptions(attention=attention))(*random_inputs(5, 5, torch.float32), None)
    [kernels] = asked
    if first is None:
        assert kernels is None
    else:
        assert kernels is not None
        assert kernels[0] == first
        assert (SDPBackend.CUDNN_ATTENTION in kernels) == cudnn


@pytest.mark.parametrize("queries", [1, 3])
def test_queries_behind_a_cache_see_all_keys_up_to_their_own(queries: int) -> None:
    query, key, value = random_inputs(queries, 9, torch.float32)
    visible = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    expected = expected_context(query.double(), key.double(), value.double(), visible)
    torch.testing.assert_close(build_attention()(query, key, value, None).double(), expected, rtol=0, atol=1e-6)


def test_an_explicit_mask_replaces_the_causal_one() -> None:
    query, key, value = random_inputs(6, 6, torch.float32)
    documents = torch.tensor([0, 0, 1, 1, 1, 2])
    visible = (documents[:, None] == documents) & torch.ones(6, 6, dtype=torch.bool).tril()
    expected = expected_context(query.double(), key.double(), value.double(), visible)
    output = build_attention()(query, key, value, ~visible[None, None])
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "refused",
    [{"packed_seq_params": object()}, {"attention_bias": torch.zeros(1)}, {"attn_mask_type": AttnMaskType.padding}],
    ids=["packed", "bias", "padding without a mask"],
)
def test_what_sdpa_cannot_do_is_refused(refused: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_attention()(*random_inputs(4, 4, torch.float32), None, **refused)


def test_boundaries_of_documents_go_where_a_mask_goes() -> None:
    query, key, value = random_inputs(6, 6, torch.float32)
    documents = torch.tensor([0, 0, 1, 1, 1, 2])
    visible = (documents[:, None] == documents) & torch.ones(6, 6, dtype=torch.bool).tril()
    expected = expected_context(query.double(), key.double(), value.double(), visible)
    boundaries = torch.tensor([0, 2, 5, 6, 8, 11, 12], dtype=torch.int32)  # two samples, one behind the other
    output = build_attention()(query, key, value, boundaries)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)


def test_dropout_inside_documents_is_refused() -> None:
    attention = build_attention()
    attention.dropout = 0.1
    boundaries = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ConfigError, match="add --attention-dropout 0"):
        attention(*random_inputs(4, 4, torch.float32), boundaries)
    attention.eval()(*random_inputs(4, 4, torch.float32), boundaries)
