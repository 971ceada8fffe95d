"""What every tool shares: exit codes, and errors without tracebacks."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from megatron_kaiyuan.errors import KaiyuanError
from megatron_kaiyuan.host.terminal import visible

__all__ = ["TOOLS", "CommandParser", "python_command", "run_tool", "say", "tool", "tool_command"]

TOOLS = {
    "preprocess": "preprocess_data",
    "inspect": "inspect_data",
    "rank": "rank_data",
    "plan": "plan_data",
    "inspect-checkpoint": "inspect_checkpoint",
    "average": "average_checkpoints",
    "evaluate": "evaluate",
    "generate": "generate",
    "convert": "convert_checkpoint",
    "release": "release",
    "quantile": "quantile_benchmark",
    "report": "report_run",
}
"""Of each verb that has a door in `tools/`: the door's name."""
_DOORS = Path(__file__).resolve().parents[2] / "tools"


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, whose refusals show the control characters of what they name."""

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2, the usage and this message."""
        super().error(visible(message))


def python_command() -> str:
    """This Python as a user would type it, for commands in messages: below the working directory if it is there."""
    return shlex.quote(str(_from_here(Path(sys.executable))))


def _from_here(path: Path) -> Path:
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path


def _door(verb: str) -> Path | None:
    """Return a tool's file in this checkout.

    None for users who started `kaiyuan`, or who have no checkout.
    """
    door, started_as = _DOORS / f"{TOOLS[verb]}.py", next(iter(sys.argv), "")
    return None if started_as.startswith("kaiyuan ") or not door.exists() else _from_here(door)


def tool(verb: str) -> str:
    """Return the name under which a user starts a tool, for messages: `tools/rank_data.py`, or `kaiyuan rank`.

    Args:
        verb: One of `TOOLS`.
    """
    return shlex.quote(str(door)) if (door := _door(verb)) else f"kaiyuan {verb}"


def tool_command(verb: str) -> str:
    """Return what a shell runs to start a tool, to be followed by its words.

    Args:
        verb: One of `TOOLS`.
    """
    return f"{python_command()} {tool(verb)}" if _door(verb) else tool(verb)


def say(*values: object, sep: str = " ", end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Print as `print` does, with control characters shown: what a tool says holds names that others chose."""
    print(visible(sep.join(map(str, values))), end=end, file=file, flush=flush)


def run_tool(main: Callable[[], None]) -> int:
    """Run a tool and return its exit code: 0 = done, 1 = failed, 130 = interrupted.

    A wrong command line leaves with 2, by argparse. A mistake that a user can mend is printed on stderr without a
    traceback. Anything else keeps its traceback.
    """
    try:
        main()
    except KaiyuanError as error:
        print(f"error: {visible(error)}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a missing folder, no permission: it names the file itself
        print(f"error: {visible(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
