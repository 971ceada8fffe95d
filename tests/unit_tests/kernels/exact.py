"""What the kernels compute, in float64 and by the definition, and how far from it a result may be. On any device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6


def exact_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * gain


def exact_swiglu(packed: Tensor, scale: float = 1.0) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up * scale


def exact_rotation(heads: Tensor, angles: Tensor) -> Tensor:
    """The complex number (first half + i second half) times e^(i angle)."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def exact_query_key_value(
    packed: Tensor, angles: Tensor, gains: tuple[Tensor, ...], per_group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `[s, b, g, (q + 2) * d]`; `angles` is `[s, d]`."""
    length, batch, groups, width = packed.shape
    heads = packed.view(length, batch, groups, per_group + 2, width // (per_group + 2))
    query, key, value = heads[..., :per_group, :].flatten(2, 3), heads[..., per_group, :], heads[..., per_group + 1, :]
    if gains:
        query, key = exact_norm(query, gains[0]), exact_norm(key, gains[1])
    turn = angles[:, : angles.shape[1] // 2].double()
    return exact_rotation(query, turn), exact_rotation(key, turn), value


def exact_losses(hidden: Tensor, matrix: Tensor, labels: Tensor, cap: float, z_loss: float) -> Tensor:
    """Losses of each token."""
    logits = hidden @ matrix.t()
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return functional.cross_entropy(logits, labels, reduction="none") + z_loss * logits.logsumexp(dim=-1).square()


def assert_close(
    call: Callable[..., tuple[Tensor, ...]],
    exact: Callable[..., tuple[Tensor, ...]],
    *leaves: Tensor,
    inner_error: float = 0.0,
) -> None:
    """Outputs and gradients of all leaves within a few roundings of their largest value.

    Args:
        call: The kernel.
        exact: The same in float64.
        *leaves: Inputs of both.
        inner_error: What the FP32 arithmetic inside may lose besides, in units of that largest value.
    """
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outputs, expected = call(*leaves), exact(*wide)
    weights = [torch.randn(output.shape, generator=torch.Generator().manual_seed(7)) for output in outputs]
    weights = [weight.to(output) for weight, output in zip(weights, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    wanted = torch.autograd.grad(expected, wide, [weight.double() for weight in weights])
    unit = torch.finfo(leaves[0].dtype).eps
    for value, target in zip((*outputs, *gradients), (*expected, *wanted), strict=True):
        largest = max(1e-30, float(target.detach().abs().max()))
        assert (value.double() - target).abs().max() <= (4 * unit + inner_error) * largest


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> Tensor:
    """Normal numbers within FP16; the same on every device."""
    return (torch.randn(*shape) * scale).clamp(-65504, 65504).to(device, dtype).requires_grad_()
