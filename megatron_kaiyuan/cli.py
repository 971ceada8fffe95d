"""What every tool shares: exit codes, and errors without tracebacks."""

import sys
from collections.abc import Callable

from megatron_kaiyuan.errors import KaiyuanError

__all__ = ["run_tool"]


def run_tool(main: Callable[[], None]) -> int:
    """Run a tool and return its exit code: 0 = done, 1 = failed, 130 = interrupted (argparse itself exits with 2).

    A mistake that a user can mend is told on stderr without a traceback; anything else keeps it.
    """
    try:
        main()
    except KaiyuanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a missing folder, no permission: it names the file itself
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
