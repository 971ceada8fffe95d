"""Attention inside documents against float64, against the dense mask of a whole model, and what is refused."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_kaiyuan.model.document_attention import (
    _by_lengths,
    attend_within_documents,
    document_boundaries,
    holds_boundaries,
)
from megatron_kaiyuan.model.samples import SampleOptions, make_sample
from tests.helpers import run_distributed
from tests.unit_tests.model import tiny
from tests.unit_tests.model.reference import random_batch, reference_attention
from tests.unit_tests.model.test_model import FUSED, KAIYUAN
from tests.unit_tests.model.tiny import Case

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]])
BOUNDARIES = [0, 4, 6, 7, 12, 23, 24]
HEADS, GROUPS, SIZE = 4, 2, 16
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = [
    Case(name="plain", features=KAIYUAN),
    Case(name="fused, recomputed", features=KAIYUAN, fusions=FUSED, overrides=RECOMPUTE),
    Case(name="scaled", features=KAIYUAN, branch_scale_bits=4),
]
TP_CASE = Case(name="TP 2", features=KAIYUAN, tensor_parallel=2, overrides={"sequence_parallel": True})


def test_boundaries_are_where_positions_start_again() -> None:
    boundaries = document_boundaries(POSITIONS)
    assert boundaries.dtype == torch.int32
    assert boundaries.tolist() == BOUNDARIES
    assert document_boundaries(POSITIONS + 5).tolist() == [0, 12, 24]  # a sample always starts one


def test_boundaries_agree_with_the_loaders_own_mask() -> None:
    window = np.array([5, 9, 0, 7, 7, 0, 0, 3, 2, 4], dtype=np.int64)
    options = SampleOptions(eod_token=0, reset_position_ids=True, reset_attention_mask=True, create_attention_mask=True)
    sample = make_sample(window, options)
    assert document_boundaries(sample["position_ids"][None]).tolist() == [0, 3, 6, 7, 9]
    # With equal scores the output is the mean of the visible values, so it shows exactly what is visible.
    zeros, places = torch.zeros(9, 1, 1, 16), torch.eye(9, 16)[:, None, None]
    boundaries = document_boundaries(sample["position_ids"][None])
    seen = attend_within_documents(zeros, zeros, places, boundaries, 1.0)[:, 0, :9] > 0
    assert torch.equal(seen, ~sample["attention_mask"][0])


def test_masks_are_told_apart_by_their_dtype() -> None:
    assert holds_boundaries(document_boundaries(POSITIONS))
    assert not holds_boundaries(torch.zeros(1, 1, 3, 3, dtype=torch.bool))
    assert not holds_boundaries(None)


def exact_context(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each document by itself, by the definition; [s, b, n, d] to [s, b, n * d]."""
    key, value = (part.repeat_interleave(HEADS // GROUPS, dim=2) for part in (key, value))
    samples = []
    for row, positions in enumerate(POSITIONS):
        cuts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        pieces = []
        for first, end in pairwise(cuts):
            visible = torch.ones(end - first, end - first, dtype=torch.bool).tril()
            parts = (part[first:end, row].transpose(0, 1) for part in (query, key, value))
            pieces.append(reference_attention(*parts, visible).transpose(0, 1).flatten(1))
        samples.append(torch.cat(pieces))
    return torch.stack(samples, dim=1)


def random_inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    length, batch = POSITIONS.shape[1], POSITIONS.shape[0]
    shapes = [(length, batch, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def loop_over_documents(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _ends: Tensor, *_longest: int, scale: float, **rest: Any
) -> Tensor:
    """What torch's kernel on CUDA promises: [tokens, heads, d], each document by itself."""
    assert rest == {"window_size": (-1, 0)}
    assert starts.dtype == torch.int32
    pieces = []
    for first, end in pairwise(starts.tolist()):
        parts = [part[first:end].transpose(0, 1) for part in (query, key, value)]
        pieces.append(
            torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)
        )
    return torch.cat([piece.transpose(0, 1) for piece in pieces])


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("way", ["mask", "lengths"])
def test_values_and_gradients_match_documents_by_themselves_in_float64(
    dtype: torch.dtype, unit: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", loop_over_documents)
    attend: Callable[..., Tensor] = _by_lengths if way == "lengths" else attend_within_documents
    inputs = random_inputs(dtype)
    assert_exact(attend(*inputs, document_boundaries(POSITIONS), SIZE**-0.5), inputs, unit)


def assert_exact(context: Tensor, inputs: list[Tensor], unit: float) -> None:
    """Four roundings of a value, eight of a gradient, as in `test_attention.py`."""
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    expected = exact_context(*exact)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4)).to(context.dtype)
    context.backward(upstream.to(context.device))
    expected.backward(upstream.double())
    assert (context.detach().cpu().double() - expected).abs().max() <= 4 * unit * exact[2].detach().abs().max()
    for tensor, reference in zip(inputs, exact, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        assert (tensor.grad.cpu().double() - reference.grad).abs().max() <= 8 * unit * reference.grad.abs().max()


def dense_mask() -> Tensor:
    """Megatron's, [b, 1, s, s], true where hidden."""
    starts = torch.arange(POSITIONS.shape[1]) - POSITIONS
    later = torch.ones(POSITIONS.shape[1], POSITIONS.shape[1], dtype=torch.bool).triu(1)
    return (later | (starts.unsqueeze(-1) != starts.unsqueeze(-2))).unsqueeze(1)


def whole_models(_rank: int, cases: list[Case]) -> dict[str, Any]:
    """Loss and gradients with the boundaries and with the dense mask, and the loss of other earlier documents."""
    results: dict[str, Any] = {}
    for case in cases:
        tiny.initialize_parallel(case.tensor_parallel, 1)
        tokens, labels = random_batch(case.shape)
        changed = tokens.clone()
        changed[:, 0] = (changed[:, 0] + 1) % case.shape.vocab
        results[case.name] = {
            "documents": _pass(case, tokens, labels, document_boundaries(POSITIONS)),
            "dense": _pass(case, tokens, labels, dense_mask()),
            "causal": _pass(case, tokens, labels, None),
            "changed": _pass(case, changed, labels, document_boundaries(POSITIONS)),
        }
    portable: dict[str, Any] = tiny.portable(results)
    return portable


def _pass(case: Case, tokens: Tensor, labels: Tensor, mask: Tensor | None) -> list[Tensor]:
    model = tiny.build_stage(case)
    tiny.load_weights(model, case.weights())
    losses = model(tokens, POSITIONS, mask, labels=labels)
    losses.float().mean().backward()
    return [losses.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    [alone] = run_distributed(whole_models, 1, CASES)
    split = run_distributed(whole_models, 2, [TP_CASE])[1]
    restored: dict[str, Any] = tiny.unpacked(alone | split)
    return restored


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*CASES, TP_CASE], ids=lambda case: case.name)
def test_a_model_has_the_loss_and_gradients_of_the_dense_mask(case: Case, models: dict[str, Any]) -> None:
    seen = models[case.name]
    for value, dense in zip(seen["documents"], seen["dense"], strict=True):
        torch.testing.assert_close(value, dense, rtol=0, atol=float(1e-5 * dense.abs().max()))
    assert (seen["causal"][0] - seen["dense"][0]).abs().max() > 0.01  # the mask matters


@pytest.mark.distributed
def test_a_token_of_one_document_changes_no_loss_of_another(models: dict[str, Any]) -> None:
    before, after = models["plain"]["documents"][0], models["plain"]["changed"][0]
    assert not torch.equal(before[0, :4], after[0, :4])
    assert torch.equal(before[0, 4:], after[0, 4:])
    assert torch.equal(before[1, 11:], after[1, 11:])
