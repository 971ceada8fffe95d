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

__all__ = ["CommandParser", "python_command", "run_tool", "say"]


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, whose refusals show the control characters of what they name."""

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2, the usage and this message."""
        super().error(visible(message))


def python_command() -> str:
    """This Python as a user would type it, for commands in messages: below the working directory if it is there."""
    executable = Path(sys.executable)
    with contextlib.suppress(ValueError):
        executable = executable.relative_to(Path.cwd())
    return shlex.quote(str(executable))


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
