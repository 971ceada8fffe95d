"""The loss that a plan's learning rates promise, from the curves of short runs with other schedules.

What is fitted is the loss as a function of the rates alone. A plan whose data differ from those of the runs, as where a
curriculum ends on better text, ends elsewhere: that difference is the data's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.learning_rate import rate_at
from megatron_kaiyuan.errors import MetricsError, PlanError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.loss_law import Curve, fit_law
from megatron_kaiyuan.reporting.run_metrics import Run, read_runs

__all__ = ["predict_loss", "prediction_lines", "prediction_table"]

_LEAST_LINES = 30
"""Log lines with a loss after the warm-up, of each run."""
_FARTHEST = 2.0
"""Largest sum of rates that is predicted, in units of the largest that was fitted: as far as it was validated."""
_ALIKE = 0.01
"""Relative difference of two highest rates, or share of the highest rate, that counts as none."""


def predict_loss(plan: Plan, paths: Sequence[Path], global_batch_size: int) -> dict[str, Any]:
    """Return the loss at the end of each phase of a plan, by the multi-power law of these runs.

    Args:
        plan: Every phase has a learning rate.
        paths: Two or more runs of the same model and batch: folders with `metrics.jsonl`, or such files.
        global_batch_size: Sequences a step, of the plan and the runs.

    Raises:
        MetricsError: the runs do not determine the law.
        PlanError: the plan has no rates, or lies outside what the runs support.
    """
    if len(paths) < 2:
        raise MetricsError("--predict-loss: one run is named; the law needs two or more with different schedules")
    planned = _planned(plan, global_batch_size)
    curves = [_measured(run, plan.seq_length, global_batch_size) for run in read_runs(paths)]
    _check_together(curves)
    _check_supported(planned, curves, global_batch_size * plan.seq_length)
    law = fit_law(curves)
    left_out = {}
    for curve in curves if len(curves) > 2 else []:
        others = [other for other in curves if other is not curve]
        left_out[curve.name] = fit_law(others).error(curve)
    ends = np.array([(phase.first_sample + phase.num_samples) // global_batch_size for phase in plan.phases])
    losses = law.loss(planned, np.clip(ends, 1, len(planned.rates)))
    return {
        "phases": [
            {"phase": phase.name, "step": int(end), "tokens": int(end) * global_batch_size * plan.seq_length,
             "learning_rate": float(planned.rates[max(0, end - 1)]), "loss": float(loss)}
            for phase, end, loss in zip(plan.phases, ends, losses, strict=True)
        ],
        "fit_error": {curve.name: law.error(curve) for curve in curves},
        "left_out_error": left_out,
        "reach": planned.sum_of_rates / max(curve.sum_of_rates for curve in curves),
        "farthest_reach": _FARTHEST,
    }  # fmt: skip


def prediction_table(prediction: Mapping[str, Any]) -> Table:
    """Return the predicted losses as a table."""
    table = Table(title="Predicted training loss (multi-power law)", title_justify="left")
    for name in ("at the end of phase", "step", "tokens", "learning rate", "loss, nats/token"):
        table.add_column(name, justify="left" if name.startswith("at") else "right")
    for row in prediction["phases"]:
        table.add_row(
            Text(row["phase"]),
            f"{row['step']:,}",
            f"{row['tokens']:,}",
            f"{row['learning_rate']:.3g}",
            f"{row['loss']:.3f}",
        )
    return table


def prediction_lines(prediction: Mapping[str, Any]) -> list[str]:
    """Return what to know of a prediction: its errors and its reach."""
    fits = ", ".join(f"{name} {error:.2%}" for name, error in prediction["fit_error"].items())
    outs = ", ".join(f"{name} {error:.2%}" for name, error in prediction["left_out_error"].items())
    return [
        f"error on the runs that were fitted (root mean square of the smoothed curve): {fits}",
        f"error on each run, predicted from the others alone: {outs}"
        if outs
        else "with two runs none is left to check the law on; name a third with another schedule to see its error",
        f"the plan's rates sum to {prediction['reach']:.2f} of the longest run's; up to "
        f"{prediction['farthest_reach']:g} is predicted",
        "the law knows the rates alone: what a run of this plan differs by is the data's",
    ]


def _planned(plan: Plan, global_batch_size: int) -> Curve:
    if plan.phases[0].lr is None:
        raise PlanError("--predict-loss: the plan has no lr; give every phase its lr, as the law predicts from rates")
    rates = []
    starts = range(0, plan.num_samples - global_batch_size + 1, global_batch_size)
    phases = iter(plan.phases)
    phase = next(phases)
    for sample in starts:
        while sample >= phase.first_sample + phase.num_samples:
            phase = next(phases)
        assert phase.lr is not None, "a plan gives rates in all phases or in none"
        progress = (sample - phase.first_sample) / phase.num_samples
        rates.append(rate_at(phase.lr.shape, phase.lr.start, phase.lr.end, progress))
    curve = Curve("the plan", np.array(rates), np.empty(0, dtype=np.int64), np.empty(0))
    if not rates or max(rates) <= 0:
        raise PlanError("--predict-loss: the plan's rates are all 0 or fill no step; nothing is learned by them")
    if _rises(curve):
        raise PlanError(
            "--predict-loss: the plan's rate rises again after its highest value was left; the law holds for rates "
            "that fall or stay after one warm-up"
        )
    return curve


def _measured(run: Run, seq_length: int, global_batch_size: int) -> Curve:
    """The curve of a run, its rates interpolated between log lines."""
    lines = [line for line in run.lines if line.learning_rate is not None]
    if not lines:
        raise MetricsError(f"{run.path}: no line has a learning rate; name a run that logs it")
    last = lines[-1]
    batch = last.consumed_samples / last.iteration
    if abs(batch - global_batch_size) > 1e-6 * batch:
        raise MetricsError(
            f"{run.path}: {batch:g} samples a step, and --global-batch-size is {global_batch_size}; the law counts "
            "steps of one size, so name runs with this batch"
        )
    if run.seq_length not in (None, seq_length):
        raise MetricsError(f"{run.path}: {counted(run.seq_length, 'token')} a sample, and the plan has {seq_length}")
    if lines[0].iteration > max(10, last.iteration // 20):
        raise MetricsError(
            f"{run.path}: its first line is of step {lines[0].iteration:,}, so the rates before it are unknown; name a "
            "run that logged from its start"
        )
    rates = np.interp(
        np.arange(1, last.iteration + 1),
        [line.iteration for line in lines],
        [line.learning_rate for line in lines if line.learning_rate is not None],
    )
    known = [(line.iteration, line.loss) for line in lines if line.loss is not None and line.loss > 0]
    curve = Curve(run.name, rates, np.array([step for step, _ in known]), np.array([loss for _, loss in known]))
    if rates.max() <= 0 or _rises(curve):
        raise MetricsError(
            f"{run.path}: its rate is 0 or rises again after its highest value was left; the law holds for rates that "
            "fall or stay after one warm-up"
        )
    after = int((curve.steps > curve.warm_up + 1).sum())
    if after < _LEAST_LINES:
        raise MetricsError(
            f"{run.path}: {counted(after, 'line')} with a loss after its warm-up; {_LEAST_LINES} are needed, so log "
            "more often or name a longer run"
        )
    return curve


def _rises(curve: Curve) -> bool:
    return bool((np.diff(curve.rates[curve.warm_up :]) > 1e-6 * curve.rates.max()).any())


def _check_together(curves: Sequence[Curve]) -> None:
    """Refuse runs that tell the law nothing of schedules."""
    peaks = [float(curve.rates.max()) for curve in curves]
    if max(peaks) > (1 + _ALIKE) * min(peaks):
        raise MetricsError(
            f"--predict-loss: the runs' highest rates differ ({min(peaks):g} to {max(peaks):g}); the law is of one "
            "highest rate, so name runs that share it"
        )
    first = curves[0]
    if all(
        len(curve.rates) == len(first.rates) and np.abs(curve.rates - first.rates).max() <= _ALIKE * peaks[0]
        for curve in curves
    ):
        raise MetricsError("--predict-loss: all runs have one schedule; name runs whose rates fall differently")


def _check_supported(planned: Curve, curves: Sequence[Curve], tokens: int) -> None:
    """Refuse a plan that the runs say nothing about; `tokens` are those of a step."""
    peak, fitted = float(planned.rates.max()), float(max(curve.rates.max() for curve in curves))
    if abs(peak / fitted - 1) > _ALIKE:
        raise PlanError(
            f"--predict-loss: the plan's highest rate is {peak:g} and the runs' is {fitted:g}; the law is of one "
            "highest rate, so name runs with the plan's"
        )
    lowest = min(float(curve.rates[curve.warm_up :].min()) for curve in curves)
    least = float(planned.rates[planned.warm_up :].min())
    if least < lowest - _ALIKE * fitted:
        raise PlanError(
            f"--predict-loss: the plan's rate falls to {least:.3g} and no run's below {lowest:.3g}; name a run that "
            "falls as far, or end the plan's rate higher"
        )
    farthest = _FARTHEST * max(curve.sum_of_rates for curve in curves)
    if planned.sum_of_rates > farthest * (1 + 1e-9):
        step = int(np.searchsorted(np.cumsum(planned.rates), farthest))
        raise PlanError(
            f"--predict-loss: the plan's rates sum to {planned.sum_of_rates / farthest * _FARTHEST:.3g} times the "
            f"longest run's, and the fit supports {_FARTHEST:g} times: up to step {step:,} "
            f"({counted(step * tokens, 'token')}) of this plan; name longer runs"
        )
