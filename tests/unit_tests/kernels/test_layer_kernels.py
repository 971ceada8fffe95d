"""Norms, rotation and SwiGLU against float64, values and gradients, also at the end of FP16."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_kaiyuan.kernels.qk_norm_rope import qk_norm_rope
from megatron_kaiyuan.kernels.rms_norm import add_rms_norm, residual_rms_norm
from megatron_kaiyuan.kernels.swiglu import swiglu
from tests.unit_tests.kernels.exact import EPS, assert_close, exact_norm, exact_query_key_value, exact_swiglu, leaf

SETTINGS = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
pytestmark = pytest.mark.usefixtures("implementation")


@SETTINGS
@given(rows=st.integers(1, 9), columns=st.integers(3, 70), dtype=DTYPES, scale=st.sampled_from([1e-3, 1.0, 3e4]))
def test_norm_before_a_branch_hands_the_stream_on_and_adds_both_gradients(
    rows: int, columns: int, dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(rows)
    x, gain = leaf(rows, 2, columns, dtype=dtype, scale=scale), leaf(columns, dtype=dtype)
    assert_close(lambda x, g: residual_rms_norm(x, g, EPS), lambda x, g: (exact_norm(x, g), x), x, gain)


@SETTINGS
@given(rows=st.integers(1, 9), columns=st.integers(3, 70), dtype=DTYPES, scale=st.sampled_from([1e-3, 1.0, 3e4]))
def test_norm_after_a_branch_is_added_with_one_rounding(
    rows: int, columns: int, dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(rows)
    residual, branch = leaf(rows, 2, columns, dtype=dtype), leaf(rows, 2, columns, dtype=dtype, scale=scale)
    assert_close(
        lambda r, x, g: (add_rms_norm(r, x, g, EPS),),
        lambda r, x, g: (r + exact_norm(x, g),),
        residual, branch, leaf(columns, dtype=dtype),
    )  # fmt: skip


def test_an_fp32_residual_stream_stays_fp32_under_an_fp16_branch() -> None:
    residual = (torch.randn(3, 8) * 1e5).requires_grad_()
    branch, gain = leaf(3, 8, dtype=torch.float16), leaf(8, dtype=torch.float16)
    total = add_rms_norm(residual, branch, gain, EPS)
    total.sum().backward()
    assert total.dtype == torch.float32
    assert residual.grad is not None
    assert branch.grad is not None
    assert branch.grad.dtype == torch.float16
    exact = residual.detach().double() + exact_norm(branch.detach().double(), gain.detach().double())
    torch.testing.assert_close(total.detach().double(), exact, rtol=1e-6, atol=0)


def test_norms_of_the_largest_fp16_numbers_are_finite() -> None:
    x = torch.full((2, 4096), 65504.0, dtype=torch.float16, requires_grad=True)
    gain = torch.ones(4096, dtype=torch.float16, requires_grad=True)
    normed, residual = residual_rms_norm(x, gain, EPS)
    (normed.float().sum() + residual.float().sum()).backward()
    assert torch.equal(normed, torch.ones_like(normed))
    assert torch.isfinite(add_rms_norm(torch.zeros_like(x), x, gain, EPS)).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@SETTINGS
@given(
    length=st.integers(1, 5),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    half=st.integers(1, 6),
    norm=st.booleans(),
    dtype=DTYPES,
)
def test_qk_norm_and_rotation_match_the_rotation_of_complex_numbers(
    length: int,
    batch: int,
    groups: int,
    per_group: int,
    half: int,
    norm: bool,  # noqa: FBT001
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(half)
    size = 2 * half
    packed = leaf(length, batch, groups, (per_group + 2) * size, dtype=dtype)
    angles = (torch.rand(length, half) * 4096).repeat(1, 2)
    gains = [leaf(size, dtype=dtype), leaf(size, dtype=dtype)] if norm else []

    def fused(packed: Tensor, *gains: Tensor) -> tuple[Tensor, ...]:
        query_gain, key_gain = gains or (None, None)
        return qk_norm_rope(packed, angles, query_gain, key_gain, queries_per_group=per_group, head_size=size, eps=EPS)

    def exact(packed: Tensor, *gains: Tensor) -> tuple[Tensor, ...]:
        return exact_query_key_value(packed, angles, gains, per_group)

    # A gain's gradient sums over the heads, each term of size 1 with a few FP32 roundings, and may cancel to below 1.
    summed = length * batch * groups * per_group
    assert_close(fused, exact, packed, *gains, inner_error=summed * 2.0**-22)


def test_gradients_of_attention_in_another_layout_are_read_by_their_strides() -> None:
    packed = leaf(4, 2, 2, 4 * 8, dtype=torch.float32)
    angles = torch.rand(4, 4).repeat(1, 2)
    outputs = qk_norm_rope(packed, angles, None, None, queries_per_group=2, head_size=8, eps=EPS)
    grads = [torch.randn_like(output) for output in outputs]
    swapped = [grad.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for grad in grads]
    [usual] = torch.autograd.grad(outputs, packed, grads, retain_graph=True)
    [other] = torch.autograd.grad(outputs, packed, swapped)
    assert torch.equal(usual, other)


@SETTINGS
@given(rows=st.integers(1, 5), half=st.integers(1, 70), dtype=DTYPES, scale=st.sampled_from([1e-2, 1.0, 30.0]))
def test_swiglu_matches_float64(rows: int, half: int, dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(half)
    packed = leaf(rows, 2, 2 * half, dtype=dtype, scale=scale)
    # silu' holds gate * (1 - sigmoid(gate)): at a large gate the difference keeps the rounding of a sigmoid near 1
    inner_error = torch.finfo(torch.float32).eps / 2 * float(packed.detach().abs().max())
    assert_close(lambda x: (swiglu(x),), lambda x: (exact_swiglu(x),), packed, inner_error=inner_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_power_of_two_enters_swiglu_before_its_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    packed = leaf(3, 2, 90, dtype=dtype, scale=900.0)
    largest = exact_swiglu(packed.detach().double()).abs().max()
    assert largest > 65504  # beyond FP16 without the factor
    assert_close(lambda x: (swiglu(x, 2.0**-8),), lambda x: (exact_swiglu(x, 2.0**-8),), packed)


def test_without_underflow_the_power_of_two_changes_no_other_bit() -> None:
    torch.manual_seed(2)
    packed = leaf(5, 140, dtype=torch.float32)
    assert torch.equal(swiglu(packed, 2.0**-8) * 256, swiglu(packed))
