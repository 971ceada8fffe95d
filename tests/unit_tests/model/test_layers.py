"""RMSNorm at the end of FP16."""

import pytest
import torch

from megatron_kaiyuan.model.config import KaiyuanTransformerConfig
from megatron_kaiyuan.model.layers import StableRMSNorm

UNIT_ROUNDOFF_FP16 = 2.0**-11


def build_norm(size: int, dtype: torch.dtype, *, sequence_parallel: bool = False) -> StableRMSNorm:
    config = KaiyuanTransformerConfig(
        num_layers=1,
        hidden_size=size,
        num_attention_heads=4,
        transformer_impl="local",
        use_cpu_initialization=True,
        cuda_graph_modules=[],  # its default is deprecated
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
    )
    norm = StableRMSNorm(config, size, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return norm.to(dtype)


def reference(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * gain


@pytest.mark.parametrize("magnitude", [65504.0, 30000.0, 1.0, 6e-5])
def test_fp16_norm_and_its_gradients_match_float64_at_every_magnitude(magnitude: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(5, 64, generator=generator) * 2 - 1) * magnitude
    x[:, 0] = magnitude
    x = x.half().requires_grad_()
    upstream = torch.randn(5, 64, generator=generator).half()
    norm = build_norm(64, torch.float16)
    norm(x).backward(upstream)

    exact, gain = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = reference(exact, gain)
    expected.backward(upstream.double())
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert exact.grad is not None
    assert gain.grad is not None
    # One rounding of the output. The input's gradient is a difference of two terms, and may be subnormal.
    torch.testing.assert_close(norm(x).double(), expected, rtol=UNIT_ROUNDOFF_FP16, atol=2.0**-25)
    spacing = 2.0**-24
    assert (x.grad.double() - exact.grad).abs().max() <= 4 * UNIT_ROUNDOFF_FP16 * exact.grad.abs().max() + spacing
    # The gain's gradient sums five rows of rounded products.
    assert (norm.weight.grad.double() - gain.grad).abs().max() <= 8 * UNIT_ROUNDOFF_FP16 * gain.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_norm_is_bit_identical_to_torchs_for_inputs_of_its_own_dtype(dtype: torch.dtype) -> None:
    norm = build_norm(64, dtype)
    torch_norm = torch.nn.RMSNorm(64, eps=1e-5, dtype=dtype)
    torch_norm.load_state_dict(norm.state_dict())
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(norm(x), torch_norm(x))


def test_an_fp32_residual_stream_leaves_the_norm_in_fp16() -> None:
    norm = build_norm(64, torch.float16)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(3)) * 1e6  # beyond FP16, as the stream may be
    output = norm(x)
    assert output.dtype == torch.float16
    torch.testing.assert_close(
        output.double(), reference(x.double(), norm.weight.double()), rtol=1.01 * UNIT_ROUNDOFF_FP16, atol=0
    )


def test_the_gain_is_marked_for_megatrons_sequence_parallel_reduction() -> None:
    assert build_norm(8, torch.float32, sequence_parallel=True).weight.sequence_parallel
    assert not build_norm(8, torch.float32).weight.sequence_parallel
