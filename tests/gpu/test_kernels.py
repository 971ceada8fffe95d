"""Every kernel against float64 at shapes that fill no tile: one row, hidden 96, 768 and 5 000, vocabulary 8 193."""

import math

import pytest
import torch
from torch import Tensor

from megatron_kaiyuan.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy
from megatron_kaiyuan.kernels.qk_norm_rope import qk_norm_rope
from megatron_kaiyuan.kernels.rms_norm import add_rms_norm, residual_rms_norm
from megatron_kaiyuan.kernels.softmax_loss import gradient_, partial_statistics
from megatron_kaiyuan.kernels.swiglu import free_until_backward, swiglu
from megatron_kaiyuan.kernels.weight_gradient import wgrad_gemm_accum_fp32
from megatron_kaiyuan.model.document_attention import attend_within_documents, document_boundaries
from megatron_kaiyuan.model.products import keep_partial_sums_in_fp32
from tests import GPU_TESTS
from tests.unit_tests.kernels.exact import (
    EPS,
    assert_close,
    exact_losses,
    exact_norm,
    exact_query_key_value,
    exact_swiglu,
    leaf,
)
from tests.unit_tests.model import test_document_attention as documents

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(1, 96), (3, 768), (131, 5000)] if GPU_TESTS == "cuda" else [(1, 96), (3, 768)]
VOCABULARY = 8193
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_half = pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype).removeprefix("torch."))
each_shape = pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=lambda size: str(size))
SUM = 2.0**-24
"""What one FP32 addition may lose, relative to the sum of absolute values."""


@each_dtype
@each_shape
@pytest.mark.parametrize("scale", [1.0, 3e4], ids=["near 1", "near 65504"])
def test_norm_before_a_branch(rows: int, columns: int, dtype: torch.dtype, scale: float, device: str) -> None:
    torch.manual_seed(rows)
    x, gain = leaf(rows, columns, dtype=dtype, scale=scale, device=device), leaf(columns, dtype=dtype, device=device)
    exact = lambda x, g: (exact_norm(x, g), x)  # noqa: E731
    assert_close(lambda x, g: residual_rms_norm(x, g, EPS), exact, x, gain, inner_error=rows * SUM)


@each_dtype
@each_shape
@pytest.mark.parametrize("scale", [1.0, 3e4], ids=["near 1", "near 65504"])
def test_norm_after_a_branch(rows: int, columns: int, dtype: torch.dtype, scale: float, device: str) -> None:
    torch.manual_seed(rows)
    residual, gain = leaf(rows, columns, dtype=dtype, device=device), leaf(columns, dtype=dtype, device=device)
    branch = leaf(rows, columns, dtype=dtype, scale=scale, device=device)
    call, exact = lambda r, x, g: (add_rms_norm(r, x, g, EPS),), lambda r, x, g: (r + exact_norm(x, g),)
    assert_close(call, exact, residual, branch, gain, inner_error=rows * SUM)


def test_norms_of_the_largest_fp16_numbers_are_finite(device: str) -> None:
    x = torch.full((2, 5000), 65504.0, dtype=torch.float16, device=device, requires_grad=True)
    gain = torch.ones(5000, dtype=torch.float16, device=device, requires_grad=True)
    normed, residual = residual_rms_norm(x, gain, EPS)
    (normed.float().sum() + residual.float().sum()).backward()
    assert torch.equal(normed, torch.ones_like(normed))
    assert torch.isfinite(add_rms_norm(torch.zeros_like(x), x, gain, EPS)).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@each_dtype
@pytest.mark.parametrize("norm", [True, False], ids=["with QK-norm", "without"])
@pytest.mark.parametrize(
    ("length", "batch", "groups", "per_group", "size"), [(1, 1, 1, 1, 96), (7, 2, 3, 2, 128), (5, 3, 2, 3, 40)]
)
def test_qk_norm_and_rotation(
    length: int, batch: int, groups: int, per_group: int, size: int, dtype: torch.dtype, norm: bool, device: str  # noqa: FBT001
) -> None:  # fmt: skip
    torch.manual_seed(size)
    packed = leaf(length, batch, groups, (per_group + 2) * size, dtype=dtype, device=device)
    angles = (torch.rand(length, size // 2) * 4096).repeat(1, 2).to(device)
    gains = [leaf(size, dtype=dtype, device=device) for _ in range(2 * norm)]

    def fused(packed: Tensor, *gains: Tensor) -> tuple[Tensor, ...]:
        of_query, of_key = gains or (None, None)
        return qk_norm_rope(packed, angles, of_query, of_key, queries_per_group=per_group, head_size=size, eps=EPS)

    exact = lambda packed, *gains: exact_query_key_value(packed, angles, gains, per_group)  # noqa: E731
    assert_close(fused, exact, packed, *gains, inner_error=length * batch * groups * per_group * 4 * SUM)


@each_dtype
@pytest.mark.parametrize(("rows", "half"), [(1, 48), (3, 384), (131, 2500), (2, 1)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_swiglu(rows: int, half: int, dtype: torch.dtype, scale: float, device: str) -> None:
    torch.manual_seed(half)
    packed = leaf(rows, 2 * half, dtype=dtype, scale=scale, device=device)
    # silu' holds gate * (1 - sigmoid(gate)): at a large gate the difference keeps the rounding of a sigmoid near 1
    inner_error = 2 * SUM * float(packed.detach().abs().max())
    assert_close(lambda x: (swiglu(x),), lambda x: (exact_swiglu(x),), packed, inner_error=inner_error)


@each_dtype
def test_swiglu_beyond_65504_with_a_branch_scale(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(1)
    packed = leaf(3, 2 * 384, dtype=dtype, scale=900.0, device=device)
    assert exact_swiglu(packed.detach().double()).abs().max() > 65504
    assert_close(lambda x: (swiglu(x, 2.0**-8),), lambda x: (exact_swiglu(x, 2.0**-8),), packed)


@each_half
def test_swiglu_recomputed_in_the_backward_pass_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(2)
    packed, matrix = leaf(33, 2 * 96, dtype=dtype, device=device), leaf(96, 40, dtype=dtype, device=device)
    found = []
    for frees in (False, True):
        activation = swiglu(packed, 0.5)
        product = activation @ matrix
        if frees:
            free_until_backward(activation, packed, 0.5, product)
        found.append(torch.autograd.grad(product.float().square().mean(), (packed, matrix)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@each_dtype
@pytest.mark.parametrize("cap", [0.0, 30.0], ids=["no cap", "soft-capped"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (37, 768)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2], ids=["no z-loss", "z-loss"])
def test_output_head_and_loss(
    tokens: int, width: int, cap: float, z_loss: float, dtype: torch.dtype, device: str
) -> None:
    keep_partial_sums_in_fp32()
    torch.manual_seed(tokens)
    hidden = leaf(tokens, width, dtype=dtype, scale=10 / math.sqrt(width), device=device)
    matrix = leaf(VOCABULARY, width, dtype=dtype, device=device)
    labels, weights = torch.randint(0, VOCABULARY, (tokens,)).to(device), torch.randint(0, 3, (tokens,)).float()
    weights[0] = 1.0
    weights = weights.to(device)
    options = LossOptions(cap=cap, z_loss=z_loss, chunk_bytes=16 * VOCABULARY * dtype.itemsize)
    result = linear_cross_entropy(hidden, matrix, labels, weights, options)
    (result.total * 3.0).backward()
    wide = [leaf.detach().double().requires_grad_() for leaf in (hidden, matrix)]
    expected = exact_losses(*wide, labels, cap, z_loss)
    ((expected * weights).sum() * 3.0).backward()
    # The logits are rounded to the dtype; a loss moves by at most twice the largest rounding, and by the z-loss's
    # share.
    unit, largest = torch.finfo(dtype).eps, float((wide[0] @ wide[1].t()).detach().abs().max())
    spread = largest * unit * (2 + 4 * z_loss * 100) + 1e-4
    assert (result.losses.double() - expected).abs().max() <= spread
    assert float(result.peak_logit) == pytest.approx(largest, rel=4 * unit + width * SUM)
    for one, exact in zip((hidden, matrix), wide, strict=True):
        assert one.grad is not None
        assert exact.grad is not None
        assert (one.grad.double() - exact.grad).abs().max() <= (4 * unit + 2 * spread) * float(exact.grad.abs().max())


@pytest.mark.parametrize("value", [math.inf, -math.inf, 65504.0])
def test_overflowed_logits_are_capped_and_get_no_gradient(value: float, device: str) -> None:
    torch.manual_seed(5)
    logits = torch.randn(2, VOCABULARY).half().to(device)
    logits[0, VOCABULARY - 1] = value
    labels = torch.tensor([1, VOCABULARY - 1], device=device)
    capped = 30 * torch.tanh(logits.double() / 30)
    largest, total, label_logits, peak = partial_statistics(logits, labels, 0, 30.0)
    log_partition = largest + total.log()
    torch.testing.assert_close(log_partition.double(), capped.logsumexp(dim=-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(label_logits.double(), capped.gather(1, labels[:, None])[:, 0], rtol=0, atol=1e-5)
    assert float(peak[0]) == abs(value)
    ones = torch.ones(2, device=device)
    gradient_(logits, labels, 0, 30.0, log_partition, ones, ones)
    assert float(logits[0, VOCABULARY - 1]) == 0.0
    assert torch.isfinite(logits).all()


@each_dtype
def test_a_masked_token_that_is_not_finite_contributes_nothing(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(6)
    hidden, matrix = leaf(3, 96, dtype=dtype, device=device), leaf(VOCABULARY, 96, dtype=dtype, device=device)
    with torch.no_grad():
        hidden[1] = math.inf
    labels, weights = torch.tensor([2, 0, 8192], device=device), torch.tensor([1.0, 0.0, 1.0], device=device)
    linear_cross_entropy(hidden, matrix, labels, weights, LossOptions(cap=30.0)).total.backward()
    assert hidden.grad is not None
    assert matrix.grad is not None
    assert hidden.grad[1].abs().max() == 0
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(matrix.grad).all()


@each_dtype
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(1, 96, 768), (513, 768, 96), (4096, 40, 24)])
def test_weight_gradients_are_added_in_fp32(
    tokens: int, inner: int, outer: int, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(tokens)
    inputs, upstream = (leaf(tokens, size, dtype=dtype, device=device).detach() for size in (inner, outer))
    buffer = torch.randn(outer, inner).to(device)
    expected = buffer.double() + upstream.double().t() @ inputs.double()
    wgrad_gemm_accum_fp32(inputs, upstream, buffer)
    assert buffer.dtype == torch.float32
    # FP32 sums over the tokens; FP32 factors may not be rounded to TF32.
    allowed = tokens * SUM * float((upstream.double().t().abs() @ inputs.double().abs()).max())
    assert (buffer.double() - expected).abs().max() <= allowed + 1e-6


def test_weight_gradients_whose_fp16_sum_would_overflow(device: str) -> None:
    inputs, upstream = (torch.full((512, size), 100.0, dtype=torch.float16, device=device) for size in (3, 2))
    buffer = torch.full((2, 3), 7.0, device=device)
    wgrad_gemm_accum_fp32(inputs, upstream, buffer)
    assert buffer.tolist() == [[512 * 1e4 + 7.0] * 3] * 2


@each_half
def test_attention_inside_documents(dtype: torch.dtype, device: str) -> None:
    inputs = [tensor.detach().to(device).requires_grad_() for tensor in documents.random_inputs(dtype)]
    boundaries = document_boundaries(documents.POSITIONS.to(device))
    context = attend_within_documents(*inputs, boundaries, documents.SIZE**-0.5)
    documents.assert_exact(context, inputs, torch.finfo(dtype).eps / 2)
