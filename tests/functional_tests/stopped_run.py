"""Start the real entry point, wait for a line of its output, disturb it, and see how it ends."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.functional_tests.training_run import MODEL_FLAGS, TRAINING_FLAGS

LAUNCHERS = {
    "none": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
    "ours": ["-m", "megatron_kaiyuan.host.torchrun", "--standalone"],
}
PATIENCE = 120.0
"""Seconds for a start and a few steps on a busy machine."""


class RunningRun:
    """A run in processes of its own, with what it has printed so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def close(self) -> None:
        """Stop reading, once all processes that write are gone."""
        self._reader.join(timeout=10.0)
        if self.process.stdout is not None:
            self.process.stdout.close()

    @property
    def output(self) -> str:
        """stdout and stderr."""
        return "".join(self.lines)

    def wait_for(self, text: str, times: int = 1, timeout: float = PATIENCE) -> None:
        """Wait until so many lines hold the text.

        Raises:
            AssertionError: the output ended before, or the time ran out.
        """
        with self._news:
            self._news.wait_for(lambda: self._count(text) >= times or self._ended, timeout)
        assert self._count(text) >= times, f"no {text!r} in {self.output[-4000:]}"

    def _count(self, text: str) -> int:
        return sum(text in line for line in self.lines)

    def wait_for_step(self, step: int) -> None:
        """Wait for the log line of a step."""
        self.wait_for(f" iteration {step:8d}/")

    def ranks(self) -> list[psutil.Process]:
        """The ranks: the children of the launcher, or the process itself where there is none."""
        first = psutil.Process(self.process.pid)
        if not any("torchrun" in word or "torch.distributed.run" in word for word in first.cmdline()):
            return [first]
        return [child for child in first.children() if "megatron_kaiyuan.pretrain" in child.cmdline()]

    def helpers(self) -> list[psutil.Process]:
        """What the ranks have started: loader workers, and the helper of a save if there is one."""
        return [child for rank in self.ranks() for child in rank.children(recursive=True)]

    def end(self, timeout: float) -> tuple[int, float]:
        """Wait for the end; exit code and seconds.

        Raises:
            AssertionError: it still runs.
        """
        began = time.monotonic()
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout:.0f} s: {self.output[-4000:]}") from None
        seconds = time.monotonic() - began
        self._reader.join(timeout=10.0)
        return code, seconds


@contextmanager
def running(
    folder: Path,
    *flags: str,
    processes: int = 1,
    launcher: str = "none",
    training: Sequence[str] = TRAINING_FLAGS,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> Iterator[RunningRun]:
    """Start a run of the tiny model and kill whatever is left of it at the end.

    Args:
        folder: Working directory.
        *flags: After those of the tiny model.
        processes: Number of ranks, with a launcher.
        launcher: A key of `LAUNCHERS`.
        training: Flags of its training.
        environment: Further variables.
        before: What starts the command, such as `["prlimit", ...]`.
    """
    start = [*LAUNCHERS[launcher], f"--nproc-per-node={processes}"] if launcher != "none" else []
    command = [*before, sys.executable, *start, "-m", "megatron_kaiyuan.pretrain", *MODEL_FLAGS, *training, *flags]
    kept = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | kept | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    family: list[psutil.Process] = []
    run = RunningRun(process)
    try:
        yield run
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        for member in [*family, process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                member.kill()
        process.wait()
        run.close()
