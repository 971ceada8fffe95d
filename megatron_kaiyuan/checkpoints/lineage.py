"""Which starts of a run led to a checkpoint, to separate its own from those of an abandoned attempt.

A run that is resumed from an older checkpoint leaves the newer ones behind, in the same folder, until it has come that
far itself. They have the right names, model, seed and data, and other weights.
"""

import argparse
import shlex
import sys
from typing import Any

from megatron_kaiyuan.checkpoints.redaction import redact
from megatron_kaiyuan.host.version import code_version

__all__ = [
    "CODE",
    "COMMAND",
    "COMMANDS",
    "STARTS",
    "comes_from",
    "commands_of",
    "start_at",
    "store_start",
    "this_start",
]

CODE = "kaiyuan_code"
"""Name of the argument that holds the version and the commit of the code of the start that saved a checkpoint."""

COMMAND = "kaiyuan_command"
"""Name of the argument that holds the flags of that start, as a shell takes them, without secrets."""
COMMANDS = "kaiyuan_commands"
"""Name of the argument that holds `[iteration, code, flags]` of each start up to a checkpoint; None: not known."""
STARTS = "kaiyuan_starts"
"""Name of the argument that holds `[iteration, id]` of each start up to a checkpoint; None: they are not known."""


def store_start(args: argparse.Namespace, saved: argparse.Namespace | None, start: str | None) -> None:
    """Let every checkpoint of this run say which starts led to it, and which code the last of them ran.

    Args:
        args: Validated arguments of this run.
        saved: Arguments of the run that it continues, if it does.
        start: Names this start, the same on all ranks; None where the ranks have not agreed on one.
    """
    earlier = getattr(saved, STARTS, None) or []
    here = 0 if saved is None else int(saved.iteration)
    command = shlex.join(redact(sys.argv[1:]))
    setattr(args, CODE, code_version())
    setattr(args, COMMAND, command)
    setattr(args, COMMANDS, [*([] if saved is None else commands_of(saved)), [here, code_version(), command]])
    setattr(args, STARTS, None if start is None else [*earlier, [here, start]])


def commands_of(saved: argparse.Namespace) -> list[list[Any]]:
    """Return `[iteration, code, flags]` of each start that led to a checkpoint, the first one first.

    None stands for what the checkpoint does not say: earlier versions recorded the last start or none.

    Args:
        saved: Arguments in the checkpoint.
    """
    known: list[list[Any]] | None = getattr(saved, COMMANDS, None)
    if known is not None:
        return known
    starts = getattr(saved, STARTS, None) or [[None, None]]
    last = [starts[-1][0], getattr(saved, CODE, None), getattr(saved, COMMAND, None)]
    return [*([start[0], None, None] for start in starts[:-1]), last]


def this_start(args: argparse.Namespace) -> str | None:
    """Return the name of the last start that led here, None where the starts are not known."""
    starts = getattr(args, STARTS, None)
    return starts[-1][1] if starts else None


def start_at(saved: argparse.Namespace, iteration: int) -> str | None:
    """Return the name of the start that trained a step on the way to a checkpoint.

    None where that is not known.

    Args:
        saved: Arguments in the checkpoint.
        iteration: Of the step.
    """
    before: list[str] = [start[1] for start in getattr(saved, STARTS, None) or [] if start[0] < iteration]
    return before[-1] if before else None


def comes_from(later: argparse.Namespace, earlier: argparse.Namespace, iteration: int) -> bool:
    """Return whether a checkpoint was trained on from an earlier one, true where this is not known.

    Args:
        later: Arguments in the later checkpoint.
        earlier: Arguments in the earlier one.
        iteration: That of the earlier one.
    """
    led_to_later, led_to_earlier = getattr(later, STARTS, None), getattr(earlier, STARTS, None)
    if led_to_later is None:
        return True
    before = [start for start in led_to_later if start[0] < iteration]
    return before == (led_to_earlier or [])
