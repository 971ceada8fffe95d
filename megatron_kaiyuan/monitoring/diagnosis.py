"""Where in a model the first value that is not finite came from, by activations and by gradients.

After an overflow in the forward pass every later value is NaN, and so is every gradient: only activations, in the order
of computation, show the place. Where the forward pass is finite the gradients show it, the deepest being the first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_kaiyuan.model.numerics import ActivationMeter, ActivationPeak, first_non_finite

__all__ = ["GradientCheck", "check_gradients", "depth", "global_name", "merged", "why_loss_is_not_finite"]

_WITHIN_LAYER = (
    "input_layernorm",
    "self_attention",
    "post_self_attn_layernorm",
    "pre_mlp_layernorm",
    "mlp",
    "post_mlp_layernorm",
)
_PARTS_OF_EXPERTS = ("shared_experts", "router", "experts")
_WITHIN_BRANCH = ("linear_qkv", "q_layernorm", "k_layernorm", "linear_proj", "linear_fc1", "activation", "linear_fc2")
_LOCAL_EXPERTS = "mlp.experts.local_experts."


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """What is known of the gradients of one rank's weights."""

    non_finite: list[str]
    """Names, with the layer's number in the whole model, of weights whose gradient has an inf or a NaN."""
    checked: int
    """Number of weights with a gradient."""


def check_gradients(models: list[Any]) -> GradientCheck:
    """Look at the gradients of this rank's model chunks. Waits for the device."""
    named = [(global_name(model, name), gradient) for model in models for name, gradient in _gradients(model)]
    if not named:
        return GradientCheck([], 0)
    finite = torch.stack([torch.isfinite(gradient).all() for _, gradient in named]).tolist()
    return GradientCheck([name for (name, _), good in zip(named, finite, strict=True) if not good], len(named))


def merged(parts: list[list[ActivationPeak]]) -> list[ActivationPeak]:
    """The largest peak of each name over the ranks, in the order of computation."""
    largest: dict[str, ActivationPeak] = {}
    for peak in (peak for part in parts for peak in part):
        known = largest.get(peak.name)
        if known is None or not peak.peak <= known.peak:  # a NaN wins, too
            largest[peak.name] = peak if known is None or not math.isnan(known.peak) else known
    return sorted(largest.values(), key=lambda entry: depth(entry.name))


def depth(name: str) -> tuple[int, int, int]:
    """Return where in the forward pass a module or its weight is: embedding, layer by layer, output layer."""
    if name.startswith("embedding"):
        return 0, 0, 0
    if not name.startswith(("decoder.layers.", "mtp.layers.")):
        return (1, 1 << 30, 0) if name.startswith("decoder") else (3, 0, 0)
    stage = 1 if name.startswith("decoder") else 2
    _, _, layer, *rest = name.replace(".mtp_model_layer", "").split(".")
    if not rest or rest[0] not in _WITHIN_LAYER:
        return stage, int(layer), 1000  # the whole layer
    place = _WITHIN_LAYER.index(rest[0]) * 100
    for step, names in ((10, _PARTS_OF_EXPERTS), (1, _WITHIN_BRANCH)):
        place += step * next((names.index(part) for part in rest[1:] if part in names), 0)
    return stage, int(layer), place


def why_loss_is_not_finite(model: Any, forward: Callable[[], Any]) -> str:
    """Repeat a forward pass whose loss is not finite, metered, and say where it breaks.

    Args:
        model: This rank's stage, the last of the pipeline, wrapped or not.
        forward: Runs it once more on the same micro-batch; all ranks that it communicates with have to call this too.
    """
    with torch.no_grad(), ActivationMeter(model) as meter:
        output = forward()
    peaks = meter.read()
    if isinstance(output, tuple):  # the fused loss, which does not call the output layer
        peaks.append(ActivationPeak("output_layer", float(output[2])))
    culprit = first_non_finite(peaks)
    if culprit is None:
        return "all its activations are finite when the forward pass is repeated, so it is the loss itself or chance"
    if culprit == peaks[0].name and not culprit.startswith("embedding"):
        return f"what an earlier pipeline stage sends, or the activation of {culprit}, is not finite"
    return f"the first activation that is not finite is that of {culprit}"


def _gradients(model: Any) -> list[tuple[str, torch.Tensor]]:
    named = [(name, getattr(weight, "main_grad", None)) for name, weight in _unwrapped(model).named_parameters()]
    return [(name, gradient) for name, gradient in named if gradient is not None]


def global_name(model: Any, name: str) -> str:
    """A parameter's name with the numbers of its layer and expert in the whole model.

    Args:
        model: A stage of it, wrapped or not, on one rank of its expert-parallel group.
        name: The parameter's name there.
    """
    if not name.startswith("decoder.layers."):
        return name
    _, _, local, rest = name.split(".", 3)
    layer = _unwrapped(model).decoder.layers[int(local)]
    if rest.startswith(_LOCAL_EXPERTS):
        expert, weight = rest.removeprefix(_LOCAL_EXPERTS).split(".", 1)
        rest = f"{_LOCAL_EXPERTS}{layer.mlp.local_expert_indices[int(expert)]}.{weight}"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model
