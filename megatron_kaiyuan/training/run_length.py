"""At which iteration a run ends: counted from the samples that are left.

Megatron divides all samples by the present batch, though the steps of a run that is resumed were made with the batch
it had then. Resumed with a batch twice as large it would leave half of its data out, with one half as large it would
ask for more than there is.
"""

import argparse
from collections.abc import Collection

from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.terminal import counted

__all__ = ["check_batch_arguments", "check_skipped_steps", "final_iteration", "is_complete"]


def check_batch_arguments(args: argparse.Namespace, saved: argparse.Namespace | None, *, planned: bool) -> None:
    """Refuse what would end the run at another sample than the last.

    Args:
        args: Validated arguments.
        saved: Arguments of the run to continue, if there is one.
        planned: The run has a plan.

    Raises:
        ConfigError: `--train-iters` for a plan that is not shown in batches of one size.
    """
    if not planned or not args.train_iters:
        return
    if args.step_batch_size_schedule is not None:
        what = f"--step-batch-size-schedule {args.step_batch_size_schedule!r} changes the batch"
    elif saved is not None and saved.iteration * args.global_batch_size != saved.consumed_train_samples:
        what = (
            f"--load {args.load} made its {counted(saved.iteration, 'step')} with "
            f"{counted(saved.consumed_train_samples, 'sample')}, not "
            f"with --global-batch-size {args.global_batch_size}"
        )
    else:
        return
    raise ConfigError(
        f"--train-iters {args.train_iters} tells the end of a plan for batches of one size only, but {what}: leave "
        "--train-iters out, and the run ends with the plan"
    )


def check_skipped_steps(args: argparse.Namespace, averaged: Collection[int]) -> None:
    """Refuse to skip a step at which something is to be done: Megatron does nothing at all after such a step.

    Steps that Megatron reads from its own file of rejected results are skipped all the same, so that a job that is
    queued again goes on.

    Args:
        args: Validated arguments.
        averaged: Steps whose checkpoints the plan averages.

    Raises:
        ConfigError: names the step and what would be missing.
    """
    intervals = {"--save-interval": args.save_interval if args.save else None, "--exit-interval": args.exit_interval}
    if args.eval_iters:
        intervals["--eval-interval"] = args.eval_interval
    asked = args.iterations_to_skip if args.result_rejected_tracker_filename is None else ()
    for step in sorted(asked):
        due = [f"{flag} {interval}" for flag, interval in intervals.items() if interval and step % interval == 0]
        due += ["averaging in the plan"] * (step in averaged)
        if due:
            raise ConfigError(
                f"--iterations-to-skip {step}: {' and '.join(due)} would be left out with that step; choose another "
                "interval, or skip the step before or after too and not this one"
            )


def final_iteration(args: argparse.Namespace, saved: argparse.Namespace | None) -> int:
    """The iteration whose batch is the last whole one.

    Args:
        args: Validated arguments.
        saved: Arguments of the run to continue, if there is one.
    """
    if args.train_iters:
        return int(args.train_iters)
    iteration, consumed = (0, 0) if saved is None else (int(saved.iteration), int(saved.consumed_train_samples))
    if args.step_batch_size_schedule is None:
        return iteration + max(0, int(args.train_samples) - consumed) // int(args.global_batch_size)
    # Megatron counts a last batch that is not full, and then has no data for it.
    while consumed + (batch := _scheduled_batch(consumed)) <= args.train_samples:
        consumed += batch
        iteration += 1
    _scheduled_batch(0)  # where Megatron's own count leaves its calculator, too
    return iteration


def _scheduled_batch(consumed: int) -> int:
    update_num_microbatches(consumed, consistency_check=False)
    return int(get_current_global_batch_size())


def is_complete(args: argparse.Namespace, saved: argparse.Namespace | None) -> bool:
    """Whether the run to continue has made its last step.

    A job that is queued again just after it has come to its end starts like this; Megatron's loader stops it with an
    assertion. Evaluating or converting its checkpoint is another job.
    """
    other_job = args.skip_train or args.ckpt_convert_format is not None
    return saved is not None and not other_job and final_iteration(args, saved) <= saved.iteration
