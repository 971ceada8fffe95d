"""Connects the run monitor and the report of held-out losses to Megatron's loop: arguments, writers, log line."""

import argparse
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import print_rank_0, print_rank_last

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.training import compat
from megatron_kaiyuan.training.average_evaluation import AverageEvaluation
from megatron_kaiyuan.training.held_out_losses import HeldOutLosses
from megatron_kaiyuan.training.held_out_report import HeldOutReport
from megatron_kaiyuan.training.metrics_file import average_path, check_metrics_place, held_out_path, metrics_path
from megatron_kaiyuan.training.monitor import MonitorOptions, RunMonitor, StepReport
from megatron_kaiyuan.training.source_counters import SourceCounters

__all__ = ["build_held_out", "build_monitor"]

_OF_AVERAGE = " of the average"


def build_monitor(args: argparse.Namespace, plan: Plan | None) -> RunMonitor:
    """A monitor that is told of every step of the loop that follows.

    Args:
        args: Megatron's validated arguments.
        plan: Names the sources; a run without a plan has none to count.

    Raises:
        MetricsError: on the last rank: its file cannot be written.
    """
    is_logging_rank = args.rank == args.world_size - 1  # the process group does not exist yet
    metrics = metrics_path(args)
    if is_logging_rank and metrics is not None:
        check_metrics_place(metrics)
    options = MonitorOptions(
        log_interval=args.log_interval,
        activation_interval=args.kaiyuan_activation_interval,
        max_skipped_steps=args.kaiyuan_max_skipped_steps,
        min_loss_scale=args.min_loss_scale if args.loss_scale is None else args.loss_scale,
        metrics=metrics,
        seq_length=args.seq_length,
    )
    counters = SourceCounters(() if plan is None else tuple(plan.sources))
    monitor = RunMonitor(options, counters, _write_scalar if is_logging_rank else None, print_rank_last)
    compat.observe_steps(_Observer(args, monitor))
    return monitor


def build_held_out(args: argparse.Namespace, plan: Plan | None) -> HeldOutLosses | None:
    """Counts the held-out losses of the loop that follows, and tells them after each evaluation.

    None without a plan that holds documents out.
    """
    if plan is None or not plan.validation:
        return None
    losses = HeldOutLosses(tuple(plan.sources))
    path = metrics_path(args)
    write_scalar = _write_scalar if args.rank == args.world_size - 1 else None
    report = HeldOutReport(losses, held_out_path(path) if path else None, write_scalar, print_rank_last)
    of_average = HeldOutReport(losses, average_path(path) if path else None, write_scalar, print_rank_last, _OF_AVERAGE)
    average = AverageEvaluation(args.save, print_rank_0) if args.kaiyuan_evaluate_average else None

    def observe(evaluation: compat.Evaluation) -> None:
        report.after_evaluation(evaluation.iteration, args.consumed_train_samples)
        if average is not None and evaluation.is_last and average(evaluation):
            of_average.after_evaluation(evaluation.iteration, args.consumed_train_samples)

    compat.observe_evaluations(observe)
    return losses


def _write_scalar(name: str, value: float, iteration: int) -> None:
    """To TensorBoard and wandb, where Megatron has set them up (on the last rank)."""
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is not None:
        writer.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log({name: value}, iteration)


class _Observer:
    """Called with the arguments of Megatron's `training_log`."""

    def __init__(self, args: argparse.Namespace, monitor: RunMonitor) -> None:
        self._args = args
        self._monitor = monitor
        self._resumed = False

    def __call__(
        self,
        loss_dict: dict[str, Any],
        _total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        _report_memory_flag: object,
        skipped_iter: int,
        grad_norm: float | None,
        *_others: object,
        **_more: object,
    ) -> None:
        if not self._resumed:
            # The loop's own count; at construction it is not yet known, since the checkpoint is loaded later.
            self._resumed = True
            self._monitor.resume(iteration - 1, self._args.consumed_train_samples - self._args.global_batch_size)
        loss = loss_dict.get("lm loss")
        self._monitor.after_step(
            StepReport(
                iteration=iteration,
                consumed_samples=self._args.consumed_train_samples,
                skipped=bool(skipped_iter),
                loss_scale=float(loss_scale),
                learning_rate=learning_rate,
                grad_norm=None if grad_norm is None else float(grad_norm),
                loss=None if loss is None else float(loss),
            )
        )
