"""Connects the run monitor and the report of held-out losses to Megatron's loop: arguments, writers, log line."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import print_rank_0, print_rank_last

from megatron_kaiyuan.checkpoints.identity import AVERAGING
from megatron_kaiyuan.checkpoints.lineage import this_start
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.monitoring.branch_scale import branch_scale_of
from megatron_kaiyuan.monitoring.held_out_losses import HeldOutLosses
from megatron_kaiyuan.monitoring.held_out_report import HeldOutReport
from megatron_kaiyuan.monitoring.metrics_file import (
    average_path,
    check_metrics_place,
    held_out_path,
    metrics_path,
    read_metrics,
)
from megatron_kaiyuan.monitoring.monitor import MonitorOptions, RunMonitor, StepReport
from megatron_kaiyuan.monitoring.outputs import check_place, keep_event_file
from megatron_kaiyuan.monitoring.source_counters import SourceCounters
from megatron_kaiyuan.training import loop_observers
from megatron_kaiyuan.training.average_evaluation import AverageEvaluation
from megatron_kaiyuan.training.checkpoint_keeping import CheckpointKeeper

__all__ = ["build_held_out", "build_monitor", "check_event_place", "keep_events"]

_OF_AVERAGE = " of the average"


def check_event_place(args: argparse.Namespace) -> None:
    """Refuse a `--tensorboard-dir` that cannot be written, on the rank that would.

    Parsed arguments are enough.

    Raises:
        MetricsError: names the folder.
    """
    folder = args.tensorboard_dir
    if folder and "://" not in folder and args.rank == args.world_size - 1:
        check_place(Path(folder) / ".can_be_written", "choose another --tensorboard-dir")


def keep_events() -> None:
    """Let the run go on where TensorBoard's file cannot be written, as where that of the metrics cannot."""
    if (writer := get_tensorboard_writer()) is not None:
        keep_event_file(writer)


def build_monitor(args: argparse.Namespace, plan: Plan | None) -> RunMonitor:
    """Return a monitor of every step of the loop that follows.

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
        branch_scale_bits=args.kaiyuan_branch_scale_bits,
        start=this_start(args),
    )
    counters = SourceCounters(() if plan is None else tuple(plan.sources))
    monitor = RunMonitor(
        options, counters, _write_scalar if is_logging_rank else None, print_rank_last, branch_scale_of(args)
    )
    # At construction it is not yet known where the run starts: the checkpoint is loaded later.
    loop_observers.observe_loop(lambda _: monitor.resume(args.iteration, _trained_samples(args)))
    loop_observers.observe_steps(_Observer(args, monitor))
    return monitor


def build_held_out(
    args: argparse.Namespace, plan: Plan, batches: Callable[[], Any], keeper: CheckpointKeeper | None
) -> HeldOutLosses | None:
    """Return the counter of held-out losses, which reports them after each evaluation.

    None where the plan holds no documents out.

    Args:
        args: Megatron's validated arguments.
        plan: The plan of the run.
        batches: See `PlanDatasetsProvider.evaluation_batches`.
        keeper: Notifies when a checkpoint is saved that the plan averages.
    """
    if not plan.validation:
        return None
    losses = HeldOutLosses(tuple(plan.sources))
    path = metrics_path(args)
    write_scalar = _write_scalar if args.rank == args.world_size - 1 else None
    report = HeldOutReport(losses, held_out_path(path) if path else None, write_scalar, print_rank_last)
    average = _build_average(args, losses, batches, keeper) if args.kaiyuan_evaluate_average else None

    def observe(evaluation: loop_observers.Evaluation) -> None:
        report.after_evaluation(evaluation.iteration, args.consumed_train_samples)
        if average is not None and evaluation.is_last:
            average.at_end(evaluation)

    loop_observers.observe_evaluations(observe)
    return losses


def _build_average(
    args: argparse.Namespace, losses: HeldOutLosses, batches: Callable[[], Any], keeper: CheckpointKeeper | None
) -> AverageEvaluation:
    """Evaluates the average at the end of the run and, where it is to, after each checkpoint that the plan averages."""
    metrics, planned = metrics_path(args), getattr(args, AVERAGING)
    path = average_path(metrics) if metrics else None
    write_scalar = _write_scalar if args.rank == args.world_size - 1 else None
    report = HeldOutReport(losses, path, write_scalar, print_rank_last, _OF_AVERAGE)

    def tell(iterations: Sequence[int]) -> None:
        report.after_evaluation(iterations[-1], args.consumed_train_samples, averaged=list(iterations))

    average = AverageEvaluation(
        args.save, planned["iterations"], planned["weights"], batches, tell, losses.take, print_rank_0
    )
    if args.kaiyuan_evaluate_average == "always" and keeper is not None:
        keeper.listen(average.when_saved)
        loop_observers.observe_loop(
            lambda loop: average.start(
                loop, args.iteration, told=write_scalar is not None and _holds(path, args.iteration)
            )
        )
    return average


def _holds(path: Path | None, iteration: int) -> bool:
    return path is not None and any(entry["iteration"] == iteration for entry in read_metrics(path))


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
        loss = loss_dict.get("lm loss")
        self._monitor.after_step(
            StepReport(
                iteration=iteration,
                consumed_samples=self._args.consumed_train_samples,
                trained_samples=_trained_samples(self._args),
                skipped=bool(skipped_iter),
                loss_scale=float(loss_scale),
                learning_rate=learning_rate,
                grad_norm=None if grad_norm is None else float(grad_norm),
                loss=None if loss is None else float(loss),
            )
        )


def _trained_samples(args: argparse.Namespace) -> int:
    """Megatron counts the samples of `--iterations-to-skip` as consumed, and again as skipped."""
    return int(args.consumed_train_samples - args.skipped_train_samples)
