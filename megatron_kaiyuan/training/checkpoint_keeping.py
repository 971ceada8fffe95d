"""Which checkpoints a run saves beside those of `--save-interval`, which it never deletes, and which it does.

The plan's `averaging` names the last `last` checkpoints, `every` steps apart, counted back from the end of the plan.
"""

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kaiyuan.checkpoints.averaging import is_average
from megatron_kaiyuan.checkpoints.checksums import CHECKSUMS_NAME
from megatron_kaiyuan.checkpoints.damage import DESCRIPTION_NAME, METADATA_NAME
from megatron_kaiyuan.checkpoints.hold import taken_by
from megatron_kaiyuan.checkpoints.identity import AVERAGING
from megatron_kaiyuan.checkpoints.reading import iteration_folder, read_tracker, saved_iterations
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError, SaveError
from megatron_kaiyuan.host.atomic import rename_durably
from megatron_kaiyuan.host.cli import tool, tool_command
from megatron_kaiyuan.host.stop_signals import may_be_killed_after
from megatron_kaiyuan.host.terminal import counted, shell_command
from megatron_kaiyuan.monitoring.metrics_file import average_path, metrics_path, read_metrics
from megatron_kaiyuan.training import compat

__all__ = [
    "CheckpointKeeper",
    "average_folder",
    "averaged_iterations",
    "keep_checkpoints",
    "plan_averaging",
    "say_how_to_average",
    "say_what_cannot_be_averaged",
]


def average_folder(save: str) -> Path:
    """Where the planned average of a run lies: beside the folder of `--save`."""
    return Path(f"{save.rstrip('/')}-averaged")


def averaged_iterations(last: int, every: int, final: int) -> tuple[int, ...]:
    """Return the last `last` iterations, `every` apart, of a run that ends at `final`, ascending.

    Raises:
        ConfigError: the run is too short for them.
    """
    first = final - (last - 1) * every
    if first < 1:
        raise ConfigError(
            f"averaging: last {last} x every {counted(every, 'step')} reaches {counted((last - 1) * every, 'step')} "
            "back from the end, but "
            f"the run has {final}; lower one of them in the plan"
        )
    return tuple(range(first, final + 1, every))


def plan_averaging(args: argparse.Namespace, plan: Plan | None, final: int) -> dict[str, Any] | None:
    """Return what the plan wants averaged, as plain data: `iterations` and `weights`.

    None if it wants nothing.

    Args:
        args: Megatron's validated arguments.
        plan: The plan of the run, if it has one.
        final: The iteration at which the run ends.

    Raises:
        ConfigError: nothing is saved, or the run is too short.
    """
    if plan is None or plan.averaging is None:
        return None
    wanted = plan.averaging
    if not args.save:
        raise ConfigError(
            f"the plan averages its last {counted(wanted.last, 'checkpoint')}, but nothing is saved: add --save DIR, "
            "or take "
            "averaging out of the plan"
        )
    return {"iterations": list(averaged_iterations(wanted.last, wanted.every, final)), "weights": wanted.weights}


class CheckpointKeeper:
    """Keeper of the checkpoints of a run, notified of each.

    Args:
        directory: What `--save` names.
        averaged: Iterations that are saved and never deleted.
        keep: Keep so many of the newest others; None: all.
        writes: Whether this rank touches files.
    """

    def __init__(self, directory: Path, averaged: tuple[int, ...], keep: int | None, *, writes: bool) -> None:
        self._directory = directory
        self._averaged = frozenset(averaged)
        self._final = max(averaged, default=0)
        self._keep = keep
        self._writes = writes
        self._last_saved = 0
        self._listeners: list[Callable[[int], None]] = []
        self._began = 0.0
        self._is_warned = False

    def listen(self, listener: Callable[[int], None]) -> None:
        """Call `listener` with the iteration, on all ranks, when one of the averaged is saved and a step follows."""
        self._listeners.append(listener)

    def lacks(self, iteration: int) -> bool:
        """Return whether a checkpoint must be saved now.

        Megatron itself saves the end of the run.
        """
        return iteration in self._averaged and iteration not in (self._last_saved, self._final)

    def protects(self, iteration: int) -> bool:
        """Whether nobody may delete it."""
        return iteration in self._averaged

    def before_save(self, iteration: int) -> None:
        """Remove the metadata of an older folder of that iteration.

        Called on all ranks. Were it to stay while the files under it are replaced, a run killed meanwhile would leave a
        mixture of two runs that looks intact.

        Raises:
            SaveError: on all ranks: another run has taken the folder.
        """
        self._refuse_if_taken(iteration)
        folder = iteration_folder(self._directory, iteration)
        if self._writes and folder.is_dir():
            for name in (DESCRIPTION_NAME, METADATA_NAME, CHECKSUMS_NAME):
                (folder / name).unlink(missing_ok=True)
            for path in folder.glob("*.distcp"):
                path.unlink(missing_ok=True)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self._began = time.monotonic()

    def after_save(self, iteration: int) -> None:
        """Delete what is no longer kept."""
        self._last_saved = iteration
        self._warn_of_launcher(time.monotonic() - self._began)
        if self._writes and self._keep is not None:
            gone = [self._set_aside(number) for number in self._superfluous(iteration, self._keep)]
            if gone:
                threading.Thread(target=_remove, args=(gone,), name="delete checkpoints").start()

    def not_saved(self, iteration: int, error: BaseException) -> SaveError:
        """Return the error that says why a checkpoint could not be written, and where the run goes on.

        What there is of the checkpoint is removed.
        """
        folder = iteration_folder(self._directory, iteration)
        if isinstance(error, CheckpointException):
            reasons = [f"rank {rank}: {_reason(failure)}" for rank, (failure, _) in sorted(error.failures.items())]
            reason = "; ".join(reasons) or "rank 0 says why"
        else:
            reason = str(error)
        if self._writes and not (folder / DESCRIPTION_NAME).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of no use, and it takes space that the next attempt needs
        last = read_tracker(self._directory).iteration
        return SaveError(
            f"the checkpoint of iteration {iteration} was not written: {reason}. Make room or mend the disk, and start "
            f"again with --load {self._directory}: the run then goes on from {last or 'its first sample'}",
            of_one_rank=isinstance(error, OSError),
        )

    def goes_on(self, iteration: int) -> None:
        """Notify the listeners that the run goes on."""
        for listener in self._listeners if iteration in self._averaged else []:
            listener(iteration)

    def _refuse_if_taken(self, iteration: int) -> None:
        """So it is where this run was taken for dead: its host was cut off, or the process was stopped for a minute."""
        other = taken_by(self._directory) if self._writes else None
        is_taken = other is not None
        if torch.distributed.is_initialized():
            told = torch.tensor([int(is_taken)], device=torch.cuda.current_device())
            torch.distributed.all_reduce(told)
            is_taken = bool(told.item())
        if is_taken:
            raise SaveError(
                f"--save {self._directory} was taken over by {other or 'another run: rank 0 says by which'}: this run "
                f"ends at iteration {iteration} and writes nothing more"
            )

    def _warn_of_launcher(self, seconds: float) -> None:
        """Once, where a save takes longer than the launcher would wait for one after a stop signal."""
        if self._writes and not self._is_warned and may_be_killed_after(seconds):
            self._is_warned = True
            print(
                f"\nWARNING: this save took {seconds:.0f} s, and torchrun kills its ranks 30 s after it is signalled: "
                "the last checkpoint would be lost. Start with python -m megatron_kaiyuan.host.torchrun in place of "
                "torchrun: it waits\n",
                file=sys.stderr,
                flush=True,
            )

    def _superfluous(self, iteration: int, keep: int) -> list[int]:
        """Return the complete checkpoints older than the newest `keep`.

        Iterations after the present one are of another attempt.
        """
        loaded = read_tracker(self._directory).iteration
        past = [number for number in saved_iterations(self._directory) if number <= iteration]
        complete = [n for n in past if (iteration_folder(self._directory, n) / DESCRIPTION_NAME).is_file()]
        if len(complete) <= keep:
            return []
        oldest = complete[-keep]
        return [number for number in past if number < oldest and not self.protects(number) and number != loaded]

    def _set_aside(self, iteration: int) -> Path:
        """At once and as a whole: what is left of a deletion that is interrupted is no checkpoint."""
        folder = iteration_folder(self._directory, iteration)
        print(
            f"  deleting the checkpoint of iteration {iteration} (--kaiyuan-keep-checkpoints {self._keep})", flush=True
        )
        return rename_durably(folder, folder.with_name(f".{folder.name}.deleted"))


def _reason(failure: BaseException) -> str:
    """What `checkpoints/writing.py` says, without what Megatron puts before it."""
    return str(failure.__cause__ or failure).removeprefix("Worker failure: ")


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def keep_checkpoints(args: argparse.Namespace) -> CheckpointKeeper | None:
    """Make the loop save, protect and delete as the arguments and the plan say.

    None where nothing is saved.

    Raises:
        ConfigError: a count below 1, nothing to keep, or two rules of deletion at once.
    """
    keep = args.kaiyuan_keep_checkpoints
    if keep is not None:
        if keep < 1 or not args.save:
            raise ConfigError(f"--kaiyuan-keep-checkpoints {keep}: give at least 1, and --save DIR")
        if args.save_retain_interval is not None:
            raise ConfigError("--kaiyuan-keep-checkpoints and --save-retain-interval both delete; give one of them")
    if not args.save:
        return None
    averaging = getattr(args, AVERAGING) or {"iterations": []}
    writes = args.rank == 0
    keeper = CheckpointKeeper(Path(args.save), tuple(averaging["iterations"]), keep, writes=writes)
    compat.keep_checkpoints(keeper)
    return keeper


def say_what_cannot_be_averaged(args: argparse.Namespace, start: int) -> None:
    """At the start of a run: which checkpoints its plan averages lie behind it and were not saved.

    So it is where averaging was added to a plan, or changed, after the run had passed them.

    Args:
        args: Megatron's validated arguments, `plan_averaging()` included.
        start: The iteration that the run continues from; 0: its first.
    """
    averaging = getattr(args, AVERAGING)
    if averaging is None or args.rank != 0:
        return
    iterations, saved = averaging["iterations"], saved_iterations(Path(args.save))
    lost = [number for number in iterations if number <= start and number not in saved]
    if lost:
        print(
            f"\nWARNING: the plan averages iterations {', '.join(map(str, iterations))}, but the run starts at {start} "
            f"and {', '.join(map(str, lost))} are not in --save {args.save}: this average cannot be made. Lower last "
            "or every of averaging in the plan and start again, or average others when the run is finished "
            f"({tool('average')} --iterations)\n",
            file=sys.stderr,
            flush=True,
        )


def say_how_to_average(args: argparse.Namespace) -> None:
    """At the end of a run, called on all ranks: the commands that are left to average and evaluate as its plan wants.

    A run that was to do both itself may have been cut off after its last checkpoint.
    """
    averaging = getattr(args, AVERAGING)
    if averaging is None:
        return
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the last rank writes what rank 0 looks for
    if args.rank != 0:
        return
    iterations, weights, output = averaging["iterations"], averaging["weights"], average_folder(args.save)
    lost = _lost(Path(args.save), iterations)
    left = [number for number in iterations if number not in lost]
    planned = f"> the plan averages iterations {', '.join(map(str, iterations))} ({weights})"
    if lost:
        planned += f", of which {', '.join(map(str, lost))} are not there"
    if len(left) < min(2, len(iterations)):
        print(f"{planned}: nothing is left to average", flush=True)
        return
    commands = [f"{tool_command('evaluate')} {shell_command(args.save, output, '--plan', args.plan)}"]
    if not is_average(output, left, weights, iteration_folder(Path(args.save), iterations[-1])):
        which = ["--iterations", *map(str, left), "--weights", weights] if lost else ["--planned"]
        words = shell_command(args.save, *which, "--output", output)
        commands.insert(0, f"{tool_command('average')} {words}")
    elif _was_evaluated(args, iterations[-1]):
        return
    print(f"{planned}{'; without them' if lost else ''}:", flush=True)
    for command in commands:
        print(f">   {command}", flush=True)


def _lost(save: Path, iterations: Sequence[int]) -> list[int]:
    """Return the iterations that a finished run never saved, or that somebody deleted.

    None of them where the run is not finished.
    """
    saved = saved_iterations(save)
    return [number for number in iterations if number not in saved] if iterations[-1] in saved else []


def _was_evaluated(args: argparse.Namespace, iteration: int) -> bool:
    metrics = metrics_path(args)
    return metrics is not None and any(entry["iteration"] == iteration for entry in read_metrics(average_path(metrics)))
