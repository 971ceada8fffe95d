"""The fused output head and the weight gradients against float64, logits beyond FP16 included."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_kaiyuan.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy
from megatron_kaiyuan.kernels.softmax_loss import gradient_, partial_statistics
from megatron_kaiyuan.kernels.weight_gradient import wgrad_gemm_accum_fp16, wgrad_gemm_accum_fp32
from tests.unit_tests.kernels.exact import exact_losses

SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
pytestmark = pytest.mark.usefixtures("implementation")


def inputs(
    tokens: int, width: int, ids: int, dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens * 31 + ids)
    hidden = (torch.randn(tokens, width) * scale).to(dtype).requires_grad_()
    matrix = torch.randn(ids, width).to(dtype).requires_grad_()
    return hidden, matrix, torch.randint(0, ids, (tokens,)), torch.randint(0, 3, (tokens,)).float()


@SETTINGS
@given(
    tokens=st.integers(1, 20),
    width=st.integers(1, 12),
    ids=st.integers(2, 50),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    cap=st.sampled_from([0.0, 5.0, 30.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    chunk_tokens=st.integers(1, 20),
)
def test_losses_and_gradients_match_float64_for_any_chunks(
    tokens: int, width: int, ids: int, dtype: torch.dtype, cap: float, z_loss: float, chunk_tokens: int
) -> None:
    hidden, matrix, labels, weights = inputs(tokens, width, ids, dtype, 1.0)
    options = LossOptions(cap=cap, z_loss=z_loss, chunk_bytes=chunk_tokens * ids * dtype.itemsize)
    result = linear_cross_entropy(hidden, matrix, labels, weights, options)
    (result.total * 3.0).backward()
    wide_hidden, wide_matrix = (leaf.detach().double().requires_grad_() for leaf in (hidden, matrix))
    expected = exact_losses(wide_hidden, wide_matrix, labels, cap, z_loss)
    ((expected * weights).sum() * 3.0).backward()
    # The logits are rounded to the dtype; a loss moves by at most twice the largest rounding, and by the z-loss's
    # share.
    unit = torch.finfo(dtype).eps
    spread = float((wide_hidden @ wide_matrix.t()).detach().abs().max()) * unit * (2 + 4 * z_loss * 100) + 1e-5
    assert (result.losses.double() - expected).abs().max() <= spread
    assert float(result.peak_logit) == pytest.approx(
        float((wide_hidden @ wide_matrix.t()).detach().abs().max()), rel=2 * unit
    )
    for leaf, exact in ((hidden, wide_hidden), (matrix, wide_matrix)):
        assert leaf.grad is not None
        assert exact.grad is not None
        largest = float(exact.grad.abs().max())
        assert (leaf.grad.double() - exact.grad).abs().max() <= (4 * unit + 2 * spread) * (largest + 1e-3)


def test_small_probabilities_keep_their_gradient_in_fp16() -> None:
    """Unscaled, 1 / 65 536 and less would keep 6 bits or fewer of 11."""
    ids, width = 65_536, 4
    hidden = torch.zeros(2, width, dtype=torch.float16, requires_grad=True)
    matrix = torch.ones(ids, width, dtype=torch.float16, requires_grad=True)
    with torch.no_grad():
        hidden += 1e-3
    labels = torch.tensor([3, 9])
    linear_cross_entropy(hidden, matrix, labels, torch.ones(2), LossOptions(cap=30.0)).total.mul(2.0**14).backward()
    assert matrix.grad is not None
    unlabelled = matrix.grad[100].double()
    exact = 2 * 2.0**14 * float(hidden[0, 0].detach().double()) / ids
    assert unlabelled.tolist() == pytest.approx([exact] * width, rel=2.0**-10)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 65504.0])
def test_overflowed_logits_are_capped_and_get_no_gradient(value: float) -> None:
    logits = torch.tensor([[value, 1.0, -2.0]], dtype=torch.float16)
    labels = torch.tensor([1])
    largest, total, label_logit, peak = partial_statistics(logits, labels, 0, 30.0)
    log_partition = largest + total.log()
    capped = torch.tensor([math.copysign(30.0, value), 30 * math.tanh(1 / 30), 30 * math.tanh(-2 / 30)]).double()
    assert float(log_partition) == pytest.approx(float(capped.logsumexp(0)), rel=1e-6)
    assert float(label_logit) == pytest.approx(float(capped[1]), abs=1e-5)
    assert float(peak) == abs(value)
    gradient_(logits, labels, 0, 30.0, log_partition, torch.ones(1), torch.ones(1))
    assert float(logits[0, 0]) == 0.0
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_a_masked_token_contributes_nothing_even_if_it_is_not_finite(
    bad: float, z_loss: float, cap: float, chunk_bytes: int
) -> None:
    options = LossOptions(cap=cap, z_loss=z_loss, chunk_bytes=chunk_bytes)
    hidden = torch.tensor([[0.25, -1.0], [bad, 1.0], [0.5, 0.5]], requires_grad=True)
    matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-1.0, 2.0]], requires_grad=True)
    result = linear_cross_entropy(hidden, matrix, torch.tensor([2, 0, 1]), torch.tensor([1.0, 0.0, 1.0]), options)
    result.total.backward()
    counted, alone = hidden.detach()[::2].requires_grad_(), matrix.detach().clone().requires_grad_()
    expected = linear_cross_entropy(counted, alone, torch.tensor([2, 1]), torch.ones(2), options)
    expected.total.backward()
    torch.testing.assert_close(result.total, expected.total)
    assert hidden.grad is not None
    assert counted.grad is not None
    torch.testing.assert_close(hidden.grad[::2], counted.grad)
    assert hidden.grad[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(matrix.grad, alone.grad)


def test_the_loss_of_a_masked_token_is_told_as_it_is() -> None:
    hidden, weights = torch.tensor([[math.nan, 1.0], [0.5, 0.5]]), torch.tensor([0.0, 1.0])
    result = linear_cross_entropy(hidden, torch.eye(3, 2), torch.tensor([0, 1]), weights, LossOptions(cap=30.0))
    assert torch.isnan(result.losses[0])
    assert torch.isfinite(result.losses[1])


def test_without_gradients_nothing_is_kept() -> None:
    hidden, matrix, labels, weights = inputs(4, 3, 7, torch.float32, 1.0)
    with torch.no_grad():
        result = linear_cross_entropy(hidden, matrix, labels, weights, LossOptions())
    assert not result.total.requires_grad
    assert (
        result.losses.double() - exact_losses(hidden.detach().double(), matrix.detach().double(), labels, 0, 0)
    ).abs().max() < 1e-5


def test_parts_of_a_vocabulary_together_are_the_whole() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 12) * 20, torch.tensor([0, 3, 6, 7, 11])
    whole = partial_statistics(logits.clone(), labels, 0, 30.0)
    log_partition = whole[0] + whole[1].log()
    parts = [partial_statistics(logits[:, start : start + 4].contiguous(), labels, start, 30.0) for start in (0, 4, 8)]
    joined = torch.stack([part[0].double() + part[1].double().log() for part in parts]).logsumexp(0)
    torch.testing.assert_close(joined, log_partition.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sum(part[2] for part in parts), whole[2])
    expected = logits.clone()
    gradient_(expected, labels, 0, 30.0, log_partition, torch.ones(5), torch.ones(5))
    for start in (0, 4, 8):
        part = logits[:, start : start + 4].contiguous()
        gradient_(part, labels, start, 30.0, log_partition, torch.ones(5), torch.ones(5))
        torch.testing.assert_close(part, expected[:, start : start + 4])


def test_the_gradient_of_the_matrix_is_added_to_megatrons_buffer_in_fp32() -> None:
    hidden, matrix, labels, _ = inputs(6, 4, 9, torch.float16, 1.0)
    weights = torch.ones(6)
    linear_cross_entropy(hidden, matrix, labels, weights, LossOptions(cap=30.0)).total.backward()
    assert matrix.grad is not None
    usual = matrix.grad.float()
    buffered: Any = matrix.detach().clone().requires_grad_()
    buffered.main_grad, buffered.adds_to_main_grad = torch.full(matrix.shape, 2.0), True
    (linear_cross_entropy(hidden, buffered, labels, weights, LossOptions(cap=30.0)).total * 1e-6).backward()
    assert buffered.grad_added_to_main_grad
    # In FP16 a millionth of these gradients would be a multiple of 6e-8; in FP32 only the addition to 2.0 rounds.
    torch.testing.assert_close(buffered.main_grad - 2.0, usual * 1e-6, rtol=0, atol=2.4e-7)


def test_weight_gradients_accumulate_in_fp32_where_fp16_would_overflow() -> None:
    total_input = torch.full((512, 3), 100.0, dtype=torch.float16)
    grad_output = torch.full((512, 2), 100.0, dtype=torch.float16)
    buffer = torch.full((2, 3), 7.0)
    wgrad_gemm_accum_fp32(total_input, grad_output, buffer)
    assert buffer.tolist() == [[512 * 1e4 + 7.0] * 3] * 2
    half = torch.zeros(2, 3, dtype=torch.float16)
    wgrad_gemm_accum_fp16(total_input[:4], grad_output[:4], half)
    assert half.tolist() == [[4e4] * 3] * 2
