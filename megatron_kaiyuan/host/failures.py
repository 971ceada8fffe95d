"""The line of a long log that says why a command failed."""

import re
from collections.abc import Sequence

__all__ = ["line_that_matters"]

_ERROR = re.compile(
    r"^\s*(?:\[(?:default|rank)?(\d+)\]:\s*)?"
    r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Stopped)\b.*|error: .*)"
)
_LAUNCHER = ("torch.distributed.elastic", "ChildFailedError", "torch.multiprocessing.spawn")
"""What torchrun says of a rank that failed; the rank has said why."""


def line_that_matters(lines: Sequence[str]) -> str | None:
    """Return the last error of the rank that failed first, or None where no line names one.

    A traceback ends with the error; other ranks fail later, for want of the first.
    """
    found = [(match[1], match[2].strip()) for line in lines if (match := _ERROR.match(line))]
    found = [(rank, text) for rank, text in found if not any(name in text for name in _LAUNCHER)]
    if not found:
        return None
    first = found[0][0]
    return [text for rank, text in found if rank == first][-1]
