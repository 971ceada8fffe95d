"""Whether the tensors of a checkpoint are those of a model: all of them, in their shapes, and none beside.

Megatron loads what both sides have. What the model lacks is dropped; in the legacy format what the checkpoint lacks
keeps its random weights, with a line in the log.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.errors import ResumeError

__all__ = ["Shapes", "misfit", "require_fit", "stored_shapes", "wanted_shapes"]

Shapes = Mapping[str, tuple[int, ...]]
_MOST_NAMED = 3


def misfit(model: Shapes, stored: Shapes) -> str | None:
    """Say which tensors one side lacks, or which have another shape there.

    None if the two fit.

    Transformer Engine's `_extra_state` is no weight: a layer has it as an empty tensor, and a checkpoint may have none.
    """
    model, stored = _weights(model), _weights(stored)
    lacks = _named("has no", sorted(model.keys() - stored.keys()))
    beside = _named("has beside the model's tensors", sorted(stored.keys() - model.keys()))
    both = sorted(model.keys() & stored.keys())
    other = _named(
        "has another shape of",
        [f"{name} {stored[name]} not {model[name]}" for name in both if model[name] != stored[name]],
    )
    return "; ".join(filter(None, (lacks, beside, other))) or None


def _weights(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if "._extra_state" not in name}


def _named(verb: str, names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{verb} {', '.join(names[:_MOST_NAMED])}{more}" if names else ""


def wanted_shapes(sharded_state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of each tensor of a model by its name in checkpoints.

    All ranks together.

    Args:
        sharded_state: This rank's part of the model's sharded state.
    """
    own = {entry.key: tuple(entry.global_shape) for entry in _sharded_tensors(sharded_state)}
    parts: list[Any] = [own]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, own)
    return {name: shape for part in parts for name, shape in part.items()}


def _sharded_tensors(sharded_state: Any) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in nested_values(sharded_state):
        if isinstance(entry, ShardedTensorFactory):
            yield from _sharded_tensors(entry.build())
        elif isinstance(entry, ShardedTensor):
            yield entry


_MADE_BY = {
    "expert_bias": "--moe-router-enable-expert-bias",
    "qb_beta": "--moe-router-load-balancing-type quantile_balancing",
}
"""Flags of training that a tensor comes from, by words of its name that say little."""


def require_fit(origin: str, model: Shapes, stored: Shapes) -> None:
    """Refuse a checkpoint whose tensors are not those of a model.

    Args:
        origin: Names the checkpoint.
        model: Shape by name.
        stored: Likewise, in the checkpoint.

    Raises:
        ResumeError: names the tensors.
    """
    if difference := misfit(model, stored):
        made = "".join(f" ({flag} makes {name})" for name, flag in _MADE_BY.items() if name in difference)
        raise ResumeError(
            f"{origin} {difference}: it is of another model{made}; leave the model's flags out to take the "
            "checkpoint's, or name another checkpoint"
        )


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of each tensor of a checkpoint's model."""
    return {name: shape for name, (shape, _) in checkpoint.tensors.items()}
