"""What every tool shares: exit codes, and errors without tracebacks."""

import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_kaiyuan.errors import KaiyuanError
from megatron_kaiyuan.host.terminal import visible

__all__ = ["python_command", "run_tool"]


def python_command() -> str:
    """This Python as a user would type it, for commands in messages: below the working directory if it is there."""
    executable = Path(sys.executable)
    with contextlib.suppress(ValueError):
        executable = executable.relative_to(Path.cwd())
    return shlex.quote(str(executable))


def run_tool(main: Callable[[], None]) -> int:
    """Run a tool and return its exit code: 0 = done, 1 = failed, 130 = interrupted (argparse itself exits with 2).

    A mistake that a user can mend is told on stderr without a traceback; anything else keeps it.
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
