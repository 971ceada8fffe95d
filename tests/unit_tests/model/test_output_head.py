"""The soft-cap in isolation; the whole head is tested in test_model.py and test_parallel.py."""

import math

import pytest
import torch

from megatron_kaiyuan.model.output_head import softcap

CAP = 30.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softcap_and_its_gradient_match_float64_over_the_whole_range(dtype: torch.dtype) -> None:
    magnitudes = torch.logspace(-4, math.log10(60000.0), 200)
    logits = torch.cat((-magnitudes, torch.zeros(1), magnitudes)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    capped, expected = softcap(logits, CAP), CAP * torch.tanh(exact / CAP)
    capped.sum().backward()
    expected.sum().backward()
    assert capped.dtype == torch.float32
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    # tanh in FP32: a few units in the last place; the gradient is rounded to the logits' dtype and is at most 1.
    torch.testing.assert_close(capped.double(), expected, rtol=8 * 2.0**-24, atol=0)
    assert (logits.grad.double() - exact.grad).abs().max() <= torch.finfo(dtype).eps + 2.0**-22


def test_overflowed_logits_become_the_cap_and_get_no_gradient() -> None:
    logits = torch.tensor([math.inf, -math.inf, 65504.0], dtype=torch.float16, requires_grad=True)
    capped = softcap(logits, CAP)
    (capped * 1e6).sum().backward()
    assert capped.tolist() == [CAP, -CAP, CAP]
    assert logits.grad is not None
    assert logits.grad.tolist() == [0.0, 0.0, 0.0]


def test_softcap_leaves_its_input_alone_and_survives_a_loss_that_works_in_place() -> None:
    logits = torch.linspace(-50, 50, 11, requires_grad=True)
    before = logits.detach().clone()
    capped = softcap(logits, CAP)
    capped.detach().zero_()  # Megatron's cross-entropy overwrites FP32 logits
    capped.backward(torch.ones(11))
    assert torch.equal(logits.detach(), before)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, 1 - torch.tanh(before / CAP) ** 2)
