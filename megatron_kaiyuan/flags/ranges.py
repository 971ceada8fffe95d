"""Numbers that no run can use: counts below zero, and intervals of no step.

Megatron divides by an interval in the midst of its loop, and hands other numbers to torch after the model is built.
"""

import argparse
from collections.abc import Mapping

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.spelling import Spelling

__all__ = ["check_ranges"]

_OFF_AT_ZERO = frozenset({"exit_interval", "manual_gc_interval", "train_sync_interval", "kaiyuan_activation_interval"})
"""Intervals of which 0 means never."""
_NOT_NEGATIVE = frozenset(
    {"lr", "min_lr", "weight_decay", "clip_grad", "adam_eps", "attention_dropout", "hidden_dropout", "init_method_std"}
)
"""Numbers that are no counts, and may not be negative either."""
_BELOW_ONE = frozenset({"adam_beta1", "adam_beta2", "attention_dropout", "hidden_dropout"})


def check_ranges(args: argparse.Namespace, flags: Mapping[str, Spelling]) -> None:
    """Refuse counts below zero, intervals of no step, and rates outside their range.

    A whole number whose default is negative may be so itself.

    Args:
        args: Parsed, not yet validated.
        flags: How the parser spells them, and their defaults.

    Raises:
        ConfigError: names all of them.
    """
    complaints = []
    for name, flag in flags.items():
        value = getattr(args, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or value == flag.default:
            continue
        is_count = isinstance(value, int) and not (isinstance(flag.default, int | float) and flag.default < 0)
        if name.endswith("_interval") and name not in _OFF_AT_ZERO and is_count and value < 1:
            complaints.append(f"{flag.written(value)}: give at least 1")
        elif (is_count or name in _NOT_NEGATIVE) and not value >= 0:
            complaints.append(f"{flag.written(value)}: give at least 0")
        elif name in _BELOW_ONE and value >= 1:
            complaints.append(f"{flag.written(value)}: give less than 1")
    if complaints:
        raise ConfigError("; ".join(complaints))
