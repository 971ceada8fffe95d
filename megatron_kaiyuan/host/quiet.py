"""What a process does not say: missing packages, lines that nobody can keep, control characters of others."""

import contextlib
import io
import select
import sys
import warnings
from collections.abc import Buffer, Iterator
from contextlib import contextmanager
from typing import TextIO

from megatron_kaiyuan.host.terminal import visible

__all__ = ["lose_lines", "quiet_megatron_import"]


class _LossyFile(io.FileIO):
    """A file whose bytes are lost where they cannot be written."""

    def write(self, data: Buffer, /) -> int:
        """Write all bytes, or report success where they are lost.

        Waits where another program has made the stream non-blocking.
        """
        left = memoryview(data).cast("B")
        size = len(left)
        with contextlib.suppress(OSError):
            while left:
                written = super().write(left)
                if written is None:
                    select.select((), (self,), ())
                else:
                    left = left[written:]
        return size


class _VisibleText(io.TextIOWrapper):
    """A text stream that shows control characters: a plan's names, paths and checkpoints come from others."""

    def write(self, text: str, /) -> int:
        """Write the text as `visible` shows it, whoever prints it: Megatron, a library, or a traceback."""
        super().write(visible(text))
        return len(text)


def lose_lines() -> None:
    """Let this process go on where its stdout or stderr cannot be written: a full disk, or a `tee` that is gone.

    A log is no reason to end a training: `metrics.jsonl` and TensorBoard's file follow the same rule. Lines come again
    as soon as they can be written.
    Their control characters are written out, except newlines and tabs.
    """
    sys.stdout, sys.stderr = _lossy(sys.stdout), _lossy(sys.stderr)


def _lossy(stream: TextIO) -> TextIO:
    if stream is None or stream not in (sys.__stdout__, sys.__stderr__):
        return stream  # somebody else's, who knows what to do
    stream.flush()
    raw = _LossyFile(stream.fileno(), "wb", closefd=False)
    unbuffered = getattr(stream, "write_through", False)  # as `python -u` makes it: nothing is held in any layer
    return _VisibleText(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=getattr(stream, "line_buffering", False) or stream is sys.stderr,
        write_through=unbuffered,
    )


@contextmanager
def quiet_megatron_import() -> Iterator[None]:
    """For tools that compute no faster with these packages: their output is the result, not a list of fallbacks."""
    with warnings.catch_warnings():
        for message in (
            "Transformer Engine and Apex are not installed",
            "Apex is not installed",
            "Only transformer-engine>=",
        ):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield
