"""The model's options in the arguments of a checkpoint: what a run takes from there, and where two models differ."""

import argparse
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_kaiyuan.arguments import add_kaiyuan_arguments
from megatron_kaiyuan.flags.identity import FUNCTION, RECIPE, WEIGHTS
from megatron_kaiyuan.flags.rules import flag_of

__all__ = ["Difference", "carried_options", "differences"]

_EARLIER_NAMES = {"layernorm_epsilon": "norm_epsilon", "layernorm_zero_centered_gamma": "apply_layernorm_1p"}
"""What earlier versions of Megatron stored an argument under."""
_ONLY_WITH = {
    "num_query_groups": ("group_query_attention", True),  # else Megatron changes the number while it builds the model
    "max_position_embeddings": ("position_embedding_type", "learned_absolute"),
}
"""Arguments that are part of a model only where another has this value."""
_UNKNOWN = object()


@dataclass(frozen=True, slots=True)
class Difference:
    """An option of two models."""

    name: str
    """As argparse stores it."""
    before: Any
    now: Any

    def __str__(self) -> str:
        """For messages."""
        return f"{flag_of(self.name)} was {self.before} and is now {self.now}"


def carried_options(saved: argparse.Namespace, given: Collection[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a run takes from the checkpoint it loads: all that its command line leaves open.

    Args:
        saved: Arguments in the checkpoint.
        given: Names of the arguments that the command line gives.
        defaults: The parser's default by name.
    """
    values = {name: _value(saved, name, defaults) for name in (*WEIGHTS, *FUNCTION, *RECIPE) if name not in given}
    carried = {name: value for name, value in values.items() if value is not _UNKNOWN}
    padding = {"padded_vocab_size", "make_vocab_size_divisible_by", "pad_vocab_size"}
    if padding.isdisjoint(given) and getattr(saved, "padded_vocab_size", None):
        carried["padded_vocab_size"] = saved.padded_vocab_size
    return carried


def differences(
    before: argparse.Namespace,
    now: argparse.Namespace,
    names: Iterable[str],
    defaults: Mapping[str, Any] | None = None,
) -> list[Difference]:
    """Return the options in which two models differ.

    Args:
        before: Arguments in a checkpoint. An option of ours that it does not have was off, and so was one of Megatron's
            that is off by default; what else it lacks is not known and equals everything.
        now: Arguments of a run, or in another checkpoint.
        names: Options to compare.
        defaults: The parser's default by name.
    """
    found = []
    for name in names:
        one, other = (_value(arguments, name, defaults or {}) for arguments in (before, now))
        if one is not _UNKNOWN and other is not _UNKNOWN and one != other:
            found.append(Difference(name, one, other))
    return found


def _value(arguments: argparse.Namespace, name: str, defaults: Mapping[str, Any]) -> Any:
    if name in _ONLY_WITH:
        master, value = _ONLY_WITH[name]
        if getattr(arguments, master, value) != value:
            return _UNKNOWN
    for stored in (name, _EARLIER_NAMES.get(name, name)):
        if hasattr(arguments, stored):
            return _plain(getattr(arguments, stored))
    absent = {**defaults, **_defaults_of_ours()}.get(name, _UNKNOWN)
    return absent if name.startswith("kaiyuan_") or not absent else _UNKNOWN


def _plain(value: Any) -> Any:
    """Return a value as Megatron's validation leaves it: a list of one is that one."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 else list(value)
    return value


@cache
def _defaults_of_ours() -> dict[str, Any]:
    return vars(add_kaiyuan_arguments(argparse.ArgumentParser()).parse_args([]))
