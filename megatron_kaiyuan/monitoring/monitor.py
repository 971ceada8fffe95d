"""What a run says about itself beside Megatron's own log line, and when it should stop.

    every log line        loss and tokens by source, tokens by quantile band, throughput (log, TensorBoard, wandb,
                          metrics.jsonl)
    every so many steps   max |activation| of each layer and its distance from the end of FP16; where that is too
                          small, the branch scale may rise (`branch_scale.py`)
    at a skipped step     the weights whose gradient is not finite; the next step is metered to see if activations are
    too many of them      the run stops with a diagnosis, on all ranks, since all know the same skips and the same scale

Cost: a few sums of [b, s] a micro-batch, one all-reduce of a few hundred numbers a log line, and the meter's
reductions in one of `activation_interval` steps (docs/benchmarks.md).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kaiyuan.data import band_name
from megatron_kaiyuan.errors import TrainingStopped
from megatron_kaiyuan.host.terminal import agreed, counted
from megatron_kaiyuan.model.config import MAX_BRANCH_SCALE_BITS
from megatron_kaiyuan.model.numerics import ActivationMeter, ActivationPeak, first_non_finite
from megatron_kaiyuan.monitoring.branch_scale import BranchScale
from megatron_kaiyuan.monitoring.diagnosis import check_gradients, depth, merged
from megatron_kaiyuan.monitoring.metrics_file import append_metrics, read_metrics
from megatron_kaiyuan.monitoring.source_counters import NUM_BANDS, SourceCounters, SourceSums

__all__ = ["MonitorOptions", "RunMonitor", "StepReport"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorOptions:
    """When what is reported, and where to."""

    log_interval: int
    """Steps between two log lines (`--log-interval`)."""
    activation_interval: int = 100
    """Steps between two readings of the activation meter; 0 = never."""
    max_skipped_steps: int = 50
    """N; 0 = never. The run stops after N skipped steps in a row (from 2^32 down to 1 takes 33 halvings), or when N of
    the last 2N were skipped with the loss scale at its minimum: a step that succeeds in between does not raise it."""
    min_loss_scale: float = 1.0
    """The loss scale falls no further."""
    metrics: Path | None = None
    """`metrics.jsonl`; None: not written."""
    seq_length: int
    """Tokens a sample."""
    branch_scale_bits: int = 0
    """K at the start."""
    start: str | None = None
    """Names this start of the run, as its checkpoints do; None: they do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What Megatron's loop knows after a step.

    It is the same on all ranks but for `loss`, which the last stage has.
    """

    iteration: int
    consumed_samples: int
    trained_samples: int
    """Those of the consumed that the model has seen: without the steps of `--iterations-to-skip`."""
    skipped: bool
    """The optimizer did not step because a gradient was not finite."""
    loss_scale: float
    learning_rate: float | None
    grad_norm: float | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class _Reading:
    """Of the activation meter."""

    headroom: float
    entry: dict[str, Any]
    """As the next line of `metrics` will have it."""


@dataclass
class RunMonitor:
    """The monitor on one process.

    All processes have to call the same methods at the same steps.
    """

    options: MonitorOptions
    counters: SourceCounters
    write_scalar: Callable[[str, float, int], None] | None
    """Name, value, step; None on the ranks that log nothing. One rank has it, the one that also writes `metrics`."""
    say: Callable[[str], None]
    """Prints on that rank."""
    branch_scale: BranchScale | None = None
    """Of a run that raises it by itself."""
    totals: dict[str, list[int]] = field(default_factory=dict)
    """Tokens by source since the first step: all of them, then by band. Kept on the logging rank."""
    _models: list[Any] = field(default_factory=list)
    _meters: list[ActivationMeter] = field(default_factory=list)
    _metering: bool = False
    _peak_logit: Tensor | None = None
    _skipped_in_a_row: int = 0
    _skipped_at_minimum: deque[int] = field(default_factory=deque)
    """Those of the last steps that were skipped with the loss scale at its minimum."""
    _skipped_since_line: int = 0
    _diagnosis: str = "no activation was metered"
    _clock: float = field(default_factory=time.perf_counter)
    _samples_at_line: int | None = None
    _reading: _Reading | None = None
    """The tightest one since the last line."""

    def resume(self, iteration: int, trained_samples: int) -> None:
        """Take the totals over from the lines of the run's earlier part, and meter the next step if it is due."""
        self._samples_at_line = trained_samples
        self._clock = time.perf_counter()
        if self._is_due(iteration + 1):
            self._start_meters()
        if self.options.metrics is None or self.write_scalar is None:
            return
        for entry in read_metrics(self.options.metrics, last_iteration=iteration):
            for name, sums in entry.get("sources", {}).items():
                self._add_to_totals(name, int(sums["tokens"]), sums["bands"])

    def observe(self, model: Any) -> None:
        """Attach the monitor to a model chunk, once.

        Called with every micro-batch.
        """
        if any(known is model for known in self._models):
            return
        self._models.append(model)
        self._meters.append(ActivationMeter(model, training_only=True))  # evaluations come between two steps
        if self._metering:
            self._meters[-1].start()

    def count(self, batch: dict[str, Tensor | None], losses: Tensor, peak_logit: Tensor | None) -> None:
        """Count the losses [b, s] of a training micro-batch.

        Only ranks that loaded it know its sources.
        """
        source_ids, band_tokens, mask = batch.get("dataset_id"), batch.get("band_tokens"), batch["loss_mask"]
        if self._metering and peak_logit is not None:
            earlier = self._peak_logit
            self._peak_logit = peak_logit if earlier is None else torch.maximum(earlier, peak_logit)
        if source_ids is not None and band_tokens is not None and mask is not None:
            self.counters.add(source_ids, band_tokens, losses, mask)

    def after_step(self, step: StepReport) -> None:
        """Report what is due after this step.

        Raises:
            TrainingStopped: too many steps were skipped.
        """
        self._read_meters(step)
        self._count_skips(step)
        if step.skipped:
            self._explain_skip(step)
        if step.iteration % self.options.log_interval == 0:
            self._write_line(step)
        self._stop_if_stuck(step)
        if step.skipped or self._is_due(step.iteration + 1):
            self._start_meters()

    def _is_due(self, iteration: int) -> bool:
        """Whether a step is to be metered by its number."""
        interval = self.options.activation_interval
        return bool(interval) and iteration % interval == 0

    def _count_skips(self, step: StepReport) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if step.skipped else 0
        self._skipped_since_line += step.skipped
        recent = self._skipped_at_minimum
        if step.skipped and step.loss_scale <= self.options.min_loss_scale:
            recent.append(step.iteration)
        while recent and recent[0] <= step.iteration - 2 * self.options.max_skipped_steps:
            recent.popleft()

    def _stop_if_stuck(self, step: StepReport) -> None:
        limit, scale = self.options.max_skipped_steps, f"{step.loss_scale:g} at step {step.iteration}"
        if not limit:
            return
        if self._skipped_in_a_row >= limit:
            steps = f"{counted(limit, 'step')} in a row {agreed(limit, 'was', 'were')}"
            what = f"{steps} skipped, the loss scale is down to {scale}"
        elif len(self._skipped_at_minimum) >= limit:
            what = f"{limit} of the last {2 * limit} steps were skipped with the loss scale at its minimum, {scale}"
        else:
            return
        at_its_end = self.options.branch_scale_bits == MAX_BRANCH_SCALE_BITS
        more_room = (
            f"--kaiyuan-branch-scale-bits {MAX_BRANCH_SCALE_BITS}, which computes the same function with more room (it "
            "needs --kaiyuan-sandwich-norm), or with "
        )
        raise TrainingStopped(
            f"{what}: {self._diagnosis}. Resume from an earlier checkpoint with {'' if at_its_end else more_room}"
            "a lower learning rate; --kaiyuan-max-skipped-steps 0 goes on regardless"
        )

    def _start_meters(self) -> None:
        self._metering = True
        self._peak_logit = None
        for meter in self._meters:
            meter.reset()
            meter.start()

    def _read_meters(self, step: StepReport) -> None:
        """Peaks of all pipeline stages, if this step was metered."""
        if not self._metering:
            return
        self._metering = False
        peaks = [peak for meter in self._meters for peak in meter.read()]
        for meter in self._meters:
            meter.stop()
        if self._peak_logit is not None:
            peaks.append(ActivationPeak("output_layer", float(self._peak_logit)))
        everywhere = merged(_gathered(peaks))
        if not everywhere:
            return
        culprit = first_non_finite(everywhere)
        largest = max(everywhere, key=lambda entry: entry.peak if math.isfinite(entry.peak) else math.inf)
        if culprit is not None:
            self._diagnosis = f"the first activation that is not finite is that of {culprit}"
        else:
            self._diagnosis = (
                f"all activations are finite (the largest, {largest.peak:.4g} in {largest.name}, is "
                f"{largest.headroom:.3g} times below the end of FP16), so it is the scaled gradients that overflow"
            )
        self._keep_tightest(step.iteration, everywhere, largest.headroom)
        self._write("activations/largest", largest.peak, step.iteration)
        self._write("activations/FP16 headroom", largest.headroom, step.iteration)
        for entry in everywhere:
            self._write(f"activations/{entry.name}", entry.peak, step.iteration)
        if culprit is not None:
            self.say(f" step {step.iteration}: {self._diagnosis}")
        self._raise_branch_scale(everywhere, step.iteration)

    def _keep_tightest(self, iteration: int, peaks: list[ActivationPeak], headroom: float) -> None:
        if self._reading is not None and headroom >= self._reading.headroom:
            return
        entry: dict[str, Any] = {
            "activations": {entry.name: entry.peak if math.isfinite(entry.peak) else None for entry in peaks},
            "activations_step": iteration,
        }
        if self.branch_scale is not None:
            entry["activations_branch_scale_bits"] = self.branch_scale.bits
        self._reading = _Reading(headroom, entry)

    def _raise_branch_scale(self, peaks: list[ActivationPeak], iteration: int) -> None:
        if self.branch_scale is None:
            return
        before = self.branch_scale.bits
        if done := self.branch_scale.after_reading(peaks, self._models):
            self.say(f" step {iteration}: {done}")
        if self.branch_scale.bits > before:  # what was skipped so far says nothing of the new scale
            self._skipped_in_a_row = 0
            self._skipped_at_minimum.clear()
        self._write("activations/branch scale bits", self.branch_scale.bits, iteration)

    def _explain_skip(self, step: StepReport) -> None:
        """Say whether the forward pass overflowed or, in the order of the backward pass, where gradients first did."""
        checks = [check for part in _gathered([check_gradients(self._models)]) for check in part]
        names = [name for check in checks for name in check.non_finite]
        if not names:
            return
        # A finite loss acquits the forward pass, even where the scaled gradients overflow from the output layer on.
        everything = len(names) == sum(check.checked for check in checks)
        if everything if step.loss is None else not math.isfinite(step.loss):
            why = "the forward pass overflowed, after which no gradient tells where; the next one is metered"
        else:
            deepest = max(names, key=depth)
            gradients = f"{counted(len(names), 'gradient')} {agreed(len(names), 'is', 'are')}"
            why = f"{gradients} not finite, the deepest is that of {deepest}"
        self.say(f" step {step.iteration} was skipped: {why}; the loss scale is now {step.loss_scale:g}")

    def _write_line(self, step: StepReport) -> None:
        sums = self.counters.take()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        before = step.trained_samples if self._samples_at_line is None else self._samples_at_line
        tokens, self._samples_at_line = (
            (step.trained_samples - before) * self.options.seq_length,
            step.trained_samples,
        )
        skipped, self._skipped_since_line = self._skipped_since_line, 0
        reading, self._reading = self._reading, None
        if self.write_scalar is None:
            return
        for name, source in sums.items():
            self._write_source(name, source, step.iteration)
        if any(source.tokens for source in sums.values()):
            self.say(_line(step.iteration, sums))
        if any(any(source.bands) for source in sums.values()):
            self.say(_band_line(step.iteration, sums))
        if self.options.metrics is not None:
            entry = {
                "iteration": step.iteration,
                "consumed_samples": step.consumed_samples,
                "learning_rate": _finite(step.learning_rate),
                "loss": _finite(step.loss),
                "grad_norm": _finite(step.grad_norm),
                "loss_scale": step.loss_scale,
                "skipped_steps": skipped,
                "tokens": tokens,
                "seconds": round(seconds, 4),
                "sources": {
                    name: {"loss": _finite(source.loss), "tokens": source.tokens, "bands": list(source.bands)}
                    for name, source in sums.items()
                    if source.tokens
                },
            }
            start = {} if self.options.start is None else {"start": self.options.start}
            scale = {} if self.branch_scale is None else {"branch_scale_bits": self.branch_scale.bits}
            append_metrics(self.options.metrics, entry | (reading.entry if reading else {}) | scale | start)

    def _write_source(self, name: str, source: SourceSums, iteration: int) -> None:
        self._add_to_totals(name, source.tokens, source.bands)
        total, *bands = self.totals[name]
        self._write(f"source tokens/{name}", total, iteration)
        if source.loss is not None:
            self._write(f"source loss/{name}", source.loss, iteration)
        if any(bands):
            for number, band in enumerate(bands):
                self._write(f"band tokens/{name} {band_name(number)}", band, iteration)

    def _add_to_totals(self, name: str, tokens: int, bands: Sequence[int]) -> None:
        total = self.totals.setdefault(name, [0] * (1 + NUM_BANDS))
        for place, more in enumerate((tokens, *bands)):
            total[place] += int(more)

    def _write(self, name: str, value: float, iteration: int) -> None:
        if self.write_scalar is not None:
            self.write_scalar(name, value, iteration)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _line(iteration: int, sums: dict[str, SourceSums]) -> str:
    """Loss and share of the tokens, source by source."""
    total = sum(source.tokens for source in sums.values())
    parts = [
        f"{name} {source.loss:.4f} ({source.tokens / total:.1%})"
        for name, source in sums.items()
        if source.loss is not None
    ]
    return f" loss by source at step {iteration} (share of {counted(total, 'token')}): {', '.join(parts)}"


def _band_line(iteration: int, sums: dict[str, SourceSums]) -> str:
    """Where in the ranking of its source the text of these steps stood."""
    parts = []
    for name, source in sums.items():
        if total := sum(source.bands):
            parts.append(f"{name} {' '.join(f'{band / total:.0%}' for band in source.bands)}")
    return f" tokens by quantile band at step {iteration} (lowest scores first): {', '.join(parts)}"


def _gathered(value: list[Any]) -> list[list[Any]]:
    """This list of every rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, value)
    return everywhere
