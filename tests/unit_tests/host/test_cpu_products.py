"""FP16 products on the CPU platform: FP32 sums rounded once, forward and backward, and nothing else is touched.

Each test runs in a process of its own, because the kernels are exchanged for the whole process.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.helpers import run_distributed


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


def rounded(product: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """The same product of the same numbers in FP32, rounded once."""
    return product(*(factor.float() for factor in factors)).half()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _products(rank: int) -> None:
    torch.manual_seed(0)
    x, w, bias = half(3, 40, 24), half(16, 24), half(16)
    a, b, c = half(40, 24), half(24, 16), half(40, 16)
    batched = half(3, 24, 16)
    cases: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "matmul": (torch.matmul, (x, b)),
        "@": (lambda left, right: left @ right, (x, batched)),
        "mm": (torch.mm, (a, b)),
        "transposed": (lambda left, right: left.t() @ right, (a, c)),
        "bmm": (torch.bmm, (x, batched)),
        "addmm": (lambda *given: torch.addmm(*given, beta=0.5, alpha=2.0), (c, a, b)),
        "baddbmm": (lambda *given: torch.baddbmm(*given, beta=0.5, alpha=2.0), (c, x, batched)),
        "linear": (functional.linear, (x, w)),
        "linear with bias": (functional.linear, (x, w, bias)),
        "einsum": (lambda left, right: torch.einsum("bsi,bio->bso", left, right), (x, batched)),
    }
    for name, (product, factors) in cases.items():
        assert same_bits(product(*factors), rounded(product, *factors)), name


def _places(rank: int) -> None:
    """Results in a tensor that is there: its memory, its shape and its dtype stay; one of another shape is resized."""
    torch.manual_seed(0)
    a, b, c = half(40, 24), half(24, 16), half(40, 16)
    stack, batched, sums = half(3, 40, 24), half(3, 24, 16), half(3, 40, 16)
    out, many = torch.empty_like(c), torch.empty_like(sums)
    assert torch.mm(a, b, out=out) is out
    assert same_bits(out, rounded(torch.mm, a, b))
    assert same_bits(torch.mm(a, b, out=torch.empty(0).half()), rounded(torch.mm, a, b))
    assert same_bits(torch.bmm(stack, batched, out=many), rounded(torch.bmm, stack, batched))
    assert same_bits(torch.baddbmm(sums, stack, batched, out=many), rounded(torch.baddbmm, sums, stack, batched))
    for given, *factors in ((c, a, b), (sums, stack, batched)):
        product = torch.addmm if given.dim() == 2 else torch.baddbmm
        expected, place = rounded(product, given, *factors), given.data_ptr()
        changed = given.addmm_(*factors) if given.dim() == 2 else given.baddbmm_(*factors)
        assert changed is given
        assert given.data_ptr() == place
        assert same_bits(given, expected)
    strided = torch.zeros(16, 40).half().t()
    torch.addmm(c, a, b, out=strided)
    assert strided.stride() == (1, 40)
    assert same_bits(strided, rounded(torch.addmm, c, a, b))


def _range(rank: int) -> None:
    """The sum may leave FP16's range on its way, the result may not; small results keep what FP16 keeps of them."""
    large = torch.full((1, 4), 256.0).half()
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0]]).half()
    assert (large @ large.t()).item() == torch.inf
    assert ((large * signs) @ large.t()).item() == 0.0
    assert ((-large) @ large.t()).item() == -torch.inf
    assert (large[:, :1] @ torch.tensor([[255.875]]).half()).item() == 65504.0
    assert (torch.tensor([[2.0**-14]]).half() @ torch.tensor([[2.0**-10]]).half()).item() == 2.0**-24
    assert torch.isnan(torch.tensor([[torch.inf]]).half() @ torch.zeros(1, 1).half()).item()


def _gradients(rank: int) -> None:
    torch.manual_seed(0)
    x, w, bias, upstream = half(3, 40, 24), half(16, 24), half(16), half(3, 40, 16)
    leaves = [leaf.requires_grad_() for leaf in (x, w, bias)]
    functional.linear(*leaves).backward(upstream)
    flat, of_output = x.detach().flatten(0, 1), upstream.flatten(0, 1)
    assert x.grad is not None
    assert w.grad is not None
    assert same_bits(x.grad.flatten(0, 1), rounded(torch.mm, of_output, w.detach()))
    assert same_bits(w.grad, rounded(torch.mm, of_output.t(), flat))


def _megatrons_linear(rank: int) -> None:
    """Its backward multiplies by hand, in the function mode of the platform."""
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication

    torch.manual_seed(0)
    x, w, upstream = half(200, 2, 24).requires_grad_(), half(300, 24).requires_grad_(), half(200, 2, 300)
    options = (None, False, False, False, None, None, None, 1)
    output = LinearWithGradAccumulationAndAsyncCommunication.apply(x, w, *options)
    assert same_bits(output, rounded(torch.matmul, x.detach(), w.detach().t()))
    output.backward(upstream)
    of_output = upstream.flatten(0, 1)
    assert same_bits(x.grad.flatten(0, 1), rounded(torch.mm, of_output, w.detach()))
    assert same_bits(w.grad, rounded(torch.mm, of_output.t(), x.detach().flatten(0, 1)))


def _attention(rank: int) -> None:
    """The fused kernel of the CPU, its mask and its gradients: its own FP32 numbers, rounded."""
    torch.manual_seed(0)
    hidden = torch.zeros(20, 20).masked_fill(torch.rand(20, 20) < 0.3, -torch.inf)
    hidden.fill_diagonal_(0.0)
    for mask, causal in ((None, True), (hidden, False), (hidden == 0, False)):
        q, k, v, upstream = half(2, 3, 20, 8), half(2, 3, 20, 8), half(2, 3, 20, 8), half(2, 3, 20, 8)
        narrow = [part.requires_grad_() for part in (q, k, v)]
        wide = [part.detach().float().requires_grad_() for part in narrow]
        masks = (mask, mask) if mask is None or mask.dtype is torch.bool else (mask.half(), mask)
        outputs = [
            functional.scaled_dot_product_attention(*parts, attn_mask=given, is_causal=causal, scale=0.25)
            for parts, given in zip((narrow, wide), masks, strict=True)
        ]
        assert same_bits(outputs[0], outputs[1].half())
        for output in outputs:
            output.backward(upstream.to(output.dtype))
        for one, other in zip(narrow, wide, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(one.grad.float(), other.grad, rtol=2.0**-9, atol=2.0**-9)  # `out` was rounded


def _others(rank: int, expected: dict[str, Tensor]) -> None:
    """FP32, FP64, BF16 and integers give what they give without the CPU platform; mixtures are refused as before."""
    for name, result in _of_every_dtype().items():
        assert same_bits(result, expected[name]), name
    for left, right in ((half(2, 2), torch.ones(2, 2)), (torch.ones(2, 2), half(2, 2))):
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(left, right)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(half(2, 2), half(2, 2), out=torch.empty(2, 2))
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(2x3 and 2x3\)"):
        torch.mm(half(2, 3), half(2, 3))


def _of_every_dtype() -> dict[str, Tensor]:
    torch.manual_seed(0)
    results = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        a, b, c, out = ((8 * torch.randn(2, 24, 24)).to(dtype) for _ in range(4))
        torch.addmm(c[0], a[0], b[0], out=out[0])
        torch.bmm(a[1:], b[1:], out=out[1:])
        results |= {f"@ {dtype}": a @ b, f"+ {dtype}": torch.baddbmm(c, a, b), f"out {dtype}": out}
        if dtype.is_floating_point:
            results[f"attention {dtype}"] = functional.scaled_dot_product_attention(a, b, c, is_causal=True)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("check", [_products, _places, _range, _gradients, _megatrons_linear, _attention])
def test_fp16_products_are_fp32_sums_rounded_once(check: Callable[[int], None]) -> None:
    run_distributed(check, 1)


@pytest.mark.distributed
def test_products_of_other_dtypes_are_torchs_own() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = _of_every_dtype()
    finally:
        torch.set_num_threads(threads)
    run_distributed(_others, 1, expected)
