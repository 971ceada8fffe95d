"""How far a model's activations are from the end of FP16, layer by layer.

Overflow: an FP16 value beyond 65 504 becomes infinite, and NaN a few operations later, in another layer.
Bound: headroom = 65 504 / max|activation| of each matrix product's output and of the residual stream; below 1 it
    overflows. (In a BF16 or FP32 run the same number says whether FP16 would have.)
Remedy: none here; the meter names the first tensor, in the order of computation, that is not finite.
    With `branch_scale_bits` the values of the branches are the scaled ones, which are what FP16 has to hold.
Cost: one max-abs reduction of each metered output, on the device; the host waits only in `read`. Off between readings.
Upstream instead: Megatron logs norms of whole gradients and skips a step after the fact.
Source: IEEE 754 binary16.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FP16_MAX", "ActivationMeter", "ActivationPeak", "first_non_finite"]

FP16_MAX = 65504.0
"""Largest finite FP16 number."""

_ACTIVATION = "activation"
"""silu(gate) * up, what `linear_fc2` reads: no module's output, and it can overflow before that product does."""


@dataclass(frozen=True, slots=True)
class ActivationPeak:
    """The largest absolute value of one tensor of the model since the last reset."""

    name: str
    """Checkpoint-style name with the layer's number in the whole model, from 0: `decoder.layers.3.mlp.linear_fc2`."""
    peak: float
    """max |value|; inf or NaN when the tensor held one."""

    @property
    def headroom(self) -> float:
        """65 504 / peak: how many times larger the values could be in FP16. 0 when not finite."""
        if not math.isfinite(self.peak):
            return 0.0
        return FP16_MAX / self.peak if self.peak > 0 else math.inf


def first_non_finite(peaks: list[ActivationPeak]) -> str | None:
    """Return the name of the first tensor that held an infinity or a NaN, None if all are finite.

    Tensors are in the order of computation.
    """
    return next((entry.name for entry in peaks if not math.isfinite(entry.peak)), None)


class ActivationMeter:
    """Records max |activation| of every linear layer, MLP activation, layer output and raw logits of one model stage.

    Use as a context manager around the steps to be measured, or call `start` and `stop`. Recomputed activations are
    seen twice, which a maximum does not mind. Values are of this rank's shard and stage only.
    """

    def __init__(self, model: nn.Module, *, training_only: bool = False) -> None:
        """Prepare to meter `model`, which must contain a Megatron decoder.

        The model may be wrapped (DDP, Float16Module). With `training_only`, what is computed in evaluation mode is not
        recorded.
        """
        self._training_only = training_only
        self._targets = list(_metered_modules(_unwrapped(model)))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._peaks: list[Tensor | None] = [None] * len(self._targets)

    def __enter__(self) -> "ActivationMeter":
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin recording.

        Peaks of earlier recordings are kept until `reset`.
        """
        self.stop()
        for index, (name, module) in enumerate(self._targets):
            if name.endswith(f".{_ACTIVATION}"):
                self._handles.append(module.register_forward_pre_hook(self._input_recorder(index)))
            else:
                # First among the hooks: before the output norm or the soft-cap hides what came out of the product.
                self._handles.append(module.register_forward_hook(self._recorder(index), prepend=True))

    def stop(self) -> None:
        """Stop recording and remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def reset(self) -> None:
        """Forget the recorded peaks."""
        self._peaks = [None] * len(self._targets)

    def read(self) -> list[ActivationPeak]:
        """The peaks in the order of computation, those never computed left out. Waits for the device, once."""
        seen: dict[str, Tensor] = {}
        for (name, _), peak in zip(self._targets, self._peaks, strict=True):
            if peak is not None:
                seen[name] = torch.maximum(seen[name], peak) if name in seen else peak  # a NaN wins
        if not seen:
            return []
        values = torch.stack(list(seen.values())).tolist()
        return [ActivationPeak(name, value) for name, value in zip(seen, values, strict=True)]

    def _recorder(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, _inputs: Any, output: Any) -> None:
            if module.training or not self._training_only:
                self._note(index, output[0] if isinstance(output, tuple) else output)

        return record

    def _input_recorder(self, index: int) -> Callable[[nn.Module, Any], None]:
        def record(module: nn.Module, inputs: Any) -> None:
            if module.training or not self._training_only:
                self._note(index, inputs[0])

        return record

    def _note(self, index: int, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return  # an expert that no token was sent to
        peak = torch.linalg.vector_norm(tensor.detach(), ord=math.inf).float()
        earlier = self._peaks[index]
        self._peaks[index] = peak if earlier is None else torch.maximum(earlier, peak)


def _unwrapped(model: nn.Module) -> nn.Module:
    while not hasattr(model, "decoder"):
        model = model.module  # type: ignore[assignment]  # Megatron's wrappers keep the model there
    return model


def _metered_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules in the order of computation.

    A name that ends on `_ACTIVATION` means the module's input. All experts of a layer have the same names: the meter
    reports the largest value among them.
    """
    if hasattr(model, "embedding"):
        yield "embedding", model.embedding
    for layer in model.decoder.layers:
        yield from _metered_of_layer(f"decoder.layers.{layer.layer_number - 1}", layer)
    if getattr(model, "mtp_process", False):
        for number, depth in enumerate(model.mtp.layers):
            yield from _metered_of_layer(f"mtp.layers.{number}.mtp_model_layer", depth.mtp_model_layer)
    if hasattr(model, "output_layer"):
        yield "output_layer", model.output_layer


def _metered_of_layer(prefix: str, layer: Any) -> Iterator[tuple[str, nn.Module]]:
    for name in ("linear_qkv", "linear_proj"):
        if hasattr(layer.self_attention, name):  # other kinds of attention have other products
            yield f"{prefix}.self_attention.{name}", getattr(layer.self_attention, name)
    if hasattr(layer.mlp, "router"):
        yield from _metered_of_mlp(f"{prefix}.mlp.shared_experts", layer.mlp.shared_experts)
        for expert in getattr(layer.mlp.experts, "local_experts", [layer.mlp.experts]):
            yield from _metered_of_mlp(f"{prefix}.mlp.experts", expert)
    yield from _metered_of_mlp(f"{prefix}.mlp", layer.mlp)
    yield prefix, layer


def _metered_of_mlp(prefix: str, mlp: Any) -> Iterator[tuple[str, nn.Module]]:
    if hasattr(mlp, "linear_fc1"):
        yield f"{prefix}.linear_fc1", mlp.linear_fc1
        yield f"{prefix}.{_ACTIVATION}", mlp.linear_fc2
        yield f"{prefix}.linear_fc2", mlp.linear_fc2
