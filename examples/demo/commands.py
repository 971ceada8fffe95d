"""The commands of the demo, as a user would type them, and how they are run: logged, stopped at the first failure."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from settings import DemoSettings

from megatron_kaiyuan.host.failures import line_that_matters

__all__ = ["CommandFailed", "baseline_command", "python_tool", "run_command", "training_command"]

_TAIL = 25


class CommandFailed(RuntimeError):
    """Error of a command of the demo, with the place of its log."""


def python_tool(repository: Path, name: str, *arguments: object) -> list[str]:
    """Command line of one of the tools."""
    return [sys.executable, str((repository / "tools" / name).relative_to(repository)), *map(str, arguments)]


def training_command(
    settings: DemoSettings, *, plan: Path, checkpoints: Path, tensorboard: Path, save_interval: int
) -> list[str]:
    """Return the `torchrun` command on this machine: FP16, dynamic loss scale, distributed optimizer.

    It goes on from its last checkpoint.
    """
    training = (
        f"--micro-batch-size {settings.micro_batch} --global-batch-size {settings.global_batch} --seed 1234 "
        "--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --init-method-std 0.02 "
        f"--fp16 --initial-loss-scale {settings.initial_loss_scale} --loss-scale-window {settings.loss_scale_window} "
        "--use-distributed-optimizer --num-workers 0 --log-interval 1 --eval-interval 80 --eval-iters 2"
    )
    storage = ["--save", str(checkpoints), "--load", str(checkpoints), "--save-interval", str(save_interval)]
    launcher = ["-m", "megatron_kaiyuan.host.torchrun", "--standalone", "--nproc-per-node", str(settings.processes)]
    return [
        *[sys.executable, *launcher, "-m", "megatron_kaiyuan.pretrain", "--plan", str(plan)],
        *settings.model.flags(),
        *training.split(),
        *storage,
        *["--tensorboard-dir", str(tensorboard)],
    ]


def baseline_command(settings: DemoSettings, seq_length: int) -> list[str]:
    """`benchmarks/plain_torch_gpt.py` with the demo's shape, batch and number of processes."""
    shape = settings.model
    accumulation = settings.global_batch // (settings.micro_batch * settings.processes)
    flags = (
        f"--layers {shape.layers} --hidden {shape.hidden} --ffn {shape.ffn} --heads {shape.heads} "
        f"--groups {shape.query_groups} --head-size {shape.hidden // shape.heads} --softcap {shape.softcap} "
        f"--vocabulary {settings.vocab_size} --sequence {seq_length} --dtype float16 "
        f"--micro-batch {settings.micro_batch} --accumulation {accumulation} --steps {settings.baseline_steps} "
        f"--device {settings.device}"
    )
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {settings.processes}"
    return [sys.executable, *launcher.split(), "-m", "benchmarks.plain_torch_gpt", *flags.split()]


def run_command(
    command: Sequence[str], repository: Path, log: Path, *, on_line: Callable[[str], None] = lambda _: None
) -> str:
    """Run a command in the repository and append its output to a log.

    Args:
        command: Program and arguments.
        repository: Working directory.
        log: File for stdout and stderr together; the command line is written first.
        on_line: Called with each line.

    Returns:
        stdout and stderr together.

    Raises:
        CommandFailed: the exit code is not 0; the message holds the error, or the last lines where none is named.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    with (
        log.open("a", encoding="utf-8") as record,
        subprocess.Popen(
            command,
            cwd=repository,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        record.write(f"$ {shlex.join(command)}\n")
        assert process.stdout is not None, "asked for by PIPE"
        try:
            for line in process.stdout:
                record.write(line)
                lines.append(line)
                on_line(line)
        except BaseException:
            process.terminate()  # the launcher waits for its ranks
            raise
    if process.returncode:
        why = line_that_matters(lines) or "".join(lines[-_TAIL:]).rstrip()
        raise CommandFailed(f"{why}\ncommand failed (exit code {process.returncode}); all of its output is in {log}")
    return "".join(lines)
