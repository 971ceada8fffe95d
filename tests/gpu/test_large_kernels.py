"""Kernels on tensors of more than 2^31 elements, whose places no int32 counts; the last rows are compared."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_kaiyuan.kernels.qk_norm_rope import qk_norm_rope
from megatron_kaiyuan.kernels.rms_norm import add_rms_norm, residual_rms_norm
from megatron_kaiyuan.kernels.softmax_loss import gradient_, partial_statistics
from megatron_kaiyuan.kernels.swiglu import swiglu
from tests import GPU_TESTS
from tests.gpu.conftest import require_memory
from tests.unit_tests.kernels.exact import EPS, exact_norm, exact_query_key_value, exact_swiglu

MORE_THAN = 2**31 if GPU_TESTS == "cuda" else 2**14
UNIT = 2.0**-10
"""Two roundings of FP16."""


@pytest.fixture(autouse=True)
def _free_afterwards(device: str) -> Iterator[None]:
    require_memory(30)
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


def large(columns: int, device: str) -> Tensor:
    """Random FP16 rows, so many that they have more than 2^31 elements; made on the device, for the time it takes."""
    generator = torch.Generator(device).manual_seed(columns)
    rows = MORE_THAN // columns + 3
    return torch.randn(rows, columns, dtype=torch.float16, device=device, generator=generator)


def assert_near(value: Tensor, expected: Tensor) -> None:
    assert (value.double() - expected).abs().max() <= 4 * UNIT * expected.abs().max()


def probes(rows: int) -> list[int]:
    """The first row, and the last ones: they lie beyond 2^31 elements."""
    return [0, rows - 2, rows - 1]


def gradient_of(output: Tensor, input_: Tensor, seen: list[int]) -> tuple[Tensor, Tensor]:
    """Gradient of some rows of the input, and the gradient of the output there; elsewhere that is zero."""
    upstream = torch.zeros_like(output)
    upstream[seen] = torch.randn_like(output[seen])
    (gradient,) = torch.autograd.grad(output, input_, upstream)
    return gradient[seen], upstream[seen].double()


@pytest.mark.parametrize("adds", [False, True], ids=["before a branch", "after a branch"])
def test_norms(adds: bool, device: str) -> None:  # noqa: FBT001
    x = large(5000, device).requires_grad_()
    gain = torch.linspace(0.5, 1.5, 5000, device=device).half()
    seen = probes(len(x))
    out = add_rms_norm(torch.zeros_like(x), x, gain, EPS) if adds else residual_rms_norm(x, gain, EPS)[0]
    exact = x.detach()[seen].double().requires_grad_()
    expected = exact_norm(exact, gain.double())
    assert_near(out.detach()[seen], expected.detach())
    gradient, upstream = gradient_of(out, x, seen)
    assert_near(gradient, torch.autograd.grad(expected, exact, upstream)[0])


def test_swiglu(device: str) -> None:
    packed = large(5000, device).requires_grad_()
    seen = probes(len(packed))
    out = swiglu(packed)
    exact = packed.detach()[seen].double().requires_grad_()
    expected = exact_swiglu(exact)
    assert_near(out.detach()[seen], expected.detach())
    gradient, upstream = gradient_of(out, packed, seen)
    assert_near(gradient, torch.autograd.grad(expected, exact, upstream)[0])


def test_qk_norm_and_rotation(device: str) -> None:
    groups, per_group, size = 8, 2, 128 if device == "cuda" else 16
    packed = large(groups * (per_group + 2) * size, device)
    length = len(packed)
    packed = packed.view(length, 1, groups, -1).requires_grad_()
    angles = torch.rand(length, size // 2, device=device).mul_(4096).repeat(1, 2)
    gains = tuple(torch.linspace(0.5, 1.5, size, device=device).half() for _ in range(2))
    query, key, value = qk_norm_rope(packed, angles, *gains, queries_per_group=per_group, head_size=size, eps=EPS)
    seen = probes(length)
    exact = packed.detach()[seen].double().requires_grad_()
    expected = exact_query_key_value(exact, angles[seen], tuple(gain.double() for gain in gains), per_group)
    for one, target in zip((query, key, value), expected, strict=True):
        assert_near(one.detach()[seen], target.detach())
    gradient, upstream = gradient_of(query, packed, seen)
    assert_near(gradient, torch.autograd.grad(expected[0], exact, upstream)[0])


def test_loss_over_the_vocabulary(device: str) -> None:
    vocabulary = 8193
    logits = large(vocabulary, device)
    labels = torch.arange(len(logits), device=device) % vocabulary
    seen = probes(len(logits))
    before = logits[seen].double()
    largest, total, label_logits, _ = partial_statistics(logits, labels, 0, 30.0)
    capped = 30 * torch.tanh(before / 30)
    log_partition = largest + total.log()
    torch.testing.assert_close(log_partition[seen].double(), capped.logsumexp(dim=-1), rtol=1e-6, atol=1e-5)
    wanted = capped.gather(1, labels[seen][:, None])[:, 0]
    torch.testing.assert_close(label_logits[seen].double(), wanted, rtol=0, atol=1e-5)
    ones = torch.ones(len(logits), device=device)
    gradient_(logits, labels, 0, 30.0, log_partition, ones * 1024, ones * 1024)
    one_hot = torch.nn.functional.one_hot(labels[seen], vocabulary)
    assert_near(logits[seen], 1024 * (capped.softmax(dim=-1) - one_hot) * (1 - (capped / 30).square()))
