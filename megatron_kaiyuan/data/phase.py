"""A phase with its sources opened: which stream each source contributes, and how the streams are merged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.interleave import merged_block, merged_sample, prefix_counts
from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.parts import Part, build_stream, fitted_stream
from megatron_kaiyuan.data.plan_schema import LearningRateSpec, PhaseSpec, PlanSpec
from megatron_kaiyuan.data.stream import Stream, thinned
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.source import sources_at_once

__all__ = ["Phase", "build_phase"]

_MOST_SAMPLES = 1 << 45  # beyond, interleave.py would round positions too coarsely
_MOST_TOKENS = 1 << 62
_FEW = 16  # samples of a shuffled stream; below, plain integers are faster than arrays
_FEW_STREAMS = 48  # likewise for the merge of one sample


@dataclass(frozen=True)
class Phase:
    """One phase of a plan: samples `first_sample <= s < first_sample + num_samples`."""

    spec: PhaseSpec
    first_sample: int
    num_samples: int
    streams: Mapping[str, Stream]
    """By source name, in the plan's order."""
    rates: NDArray[np.float64]
    """Relative number of samples of each stream: its natural windows, or its weight."""
    used: NDArray[np.int64]
    """Samples of each stream in this phase, int64 `[streams]`; sums to `num_samples`."""

    @property
    def name(self) -> str:
        """Unique in the plan."""
        return self.spec.name

    @property
    def order(self) -> str:
        """`shuffled` or `curriculum`."""
        return self.spec.order

    @property
    def lr(self) -> LearningRateSpec | None:
        """Learning rate over the phase, if the plan gives one."""
        return self.spec.lr

    def block(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Stream number and window of the phase's samples `start <= s < stop`, counted from its first sample."""
        numbers, samples = merged_block(self.rates, start, stop)
        ascending, available = self._stream_facts
        windows = thinned(samples, self.used[numbers], available[numbers])  # of ascending streams; others follow
        shuffled = np.flatnonzero(~ascending[numbers])
        by_stream = shuffled[np.argsort(numbers[shuffled], kind="stable")]
        firsts = np.flatnonzero(np.diff(numbers[by_stream], prepend=-1))
        for where in np.split(by_stream, firsts[1:]) if len(by_stream) else []:
            number = int(numbers[where[0]])
            windows[where] = self._shuffled_windows(number, samples[where])
        return numbers, windows

    def _shuffled_windows(self, number: int, samples: NDArray[np.int64]) -> NDArray[np.int64] | list[int]:
        """Windows of one stream: all at once, or one by one where they are so few that this is faster."""
        stream, used = self.stream_list[number], int(self.used[number])
        if len(samples) > _FEW:
            return stream.windows(samples, used)
        return [stream.window(sample, used) for sample in samples.tolist()]

    def sample(self, sample: int) -> tuple[int, int]:
        """Stream number and window of one sample of the phase."""
        rates, total, used = self._plain_rates
        if len(rates) <= _FEW_STREAMS:
            number, own = merged_sample(rates, total, sample)
        else:
            numbers, samples = merged_block(self.rates, sample, sample + 1)
            number, own = int(numbers[0]), int(samples[0])
        return number, self.stream_list[number].window(own, used[number])

    @cached_property
    def stream_list(self) -> tuple[Stream, ...]:
        """The streams by number."""
        return tuple(self.streams.values())

    @cached_property
    def source_list(self) -> tuple[str, ...]:
        """Names of the streams' sources by number."""
        return tuple(self.streams)

    @cached_property
    def _plain_rates(self) -> tuple[list[float], float, list[int]]:
        """`rates`, their sum and `used` as plain numbers."""
        return self.rates.tolist(), float(self.rates.sum()), self.used.tolist()

    @cached_property
    def _stream_facts(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Whether each stream is ascending, and its windows; `[streams]` each."""
        ascending = np.array([stream.ascending for stream in self.stream_list])
        return ascending, np.array([stream.num_windows for stream in self.stream_list], dtype=np.int64)


def build_phase(spec: PhaseSpec, plan: PlanSpec, sources: Mapping[str, OpenedSource], first_sample: int) -> Phase:
    """Resolve the selections, repetitions and the token budget of a phase.

    Raises:
        PlanError: a selection that leaves less than one window, or a budget that the streams cannot fill.
    """
    parts = [Part(plan, spec.name, spec.order, name, part, sources[name]) for name, part in spec.sources.items()]
    most_at_once = sources_at_once(part.source.source for part in parts)
    streams = side_by_side(build_stream, parts, most=most_at_once)
    _refuse_too_many(spec, streams, plan.seq_length)
    natural = np.array([stream.num_windows for stream in streams], dtype=np.int64)
    weights = [part.weight for part in spec.sources.values()]
    rates = np.array([float(w) for w in weights if w is not None] or natural, dtype=np.float64)
    num_samples = int(natural.sum()) if spec.tokens is None else spec.tokens // plan.seq_length
    if num_samples == 0:
        raise PlanError(
            f"phase {spec.name!r}: tokens {spec.tokens} is less than one window of seq_length {plan.seq_length}; "
            "raise it"
        )
    used = prefix_counts(rates, num_samples)
    most = [_most_windows(stream, part.spec.max_repeat) for stream, part in zip(streams, parts, strict=True)]
    for part, stream, count, limit in zip(parts, streams, used.tolist(), most, strict=True):
        if count > limit:
            _refuse_budget(spec, part.name, stream, count, _largest_budget(rates, most, num_samples))
        if count == 0:
            raise PlanError(
                f"phase {spec.name!r}, source {part.name!r}: a budget of {num_samples:,} samples is too small to show "
                "it even once; raise tokens, or leave the source out of the phase"
            )
    fitted = side_by_side(lambda item: fitted_stream(*item), list(zip(parts, streams, used.tolist(), strict=True)))
    return Phase(spec, first_sample, num_samples, dict(zip(spec.sources, fitted, strict=True)), rates, used)


def _refuse_too_many(spec: PhaseSpec, streams: Sequence[Stream], seq_length: int) -> None:
    """More samples than the merge can place exactly, or more tokens than 64 bits count."""
    tokens = max(sum(stream.num_tokens for stream in streams), spec.tokens or 0)
    if tokens // seq_length > _MOST_SAMPLES or tokens > _MOST_TOKENS:
        raise PlanError(
            f"phase {spec.name!r}: {tokens:,} tokens are {tokens // seq_length:,} samples of {seq_length:,}; a phase "
            f"has at most {_MOST_SAMPLES:,} samples and {_MOST_TOKENS:,} tokens: lower repeat or tokens, or make "
            "several phases of it"
        )


def _most_windows(stream: Stream, max_repeat: Fraction | None) -> int:
    """How many windows of a stream a budget may ask for."""
    stretched = 0 if max_repeat is None else (math.floor(max_repeat * stream.selected.num_tokens) - 1)
    return max(stream.num_windows, stretched // stream.seq_length)


def _largest_budget(rates: NDArray[np.float64], most: Sequence[int], samples: int) -> int:
    """The largest number of samples below `samples` that asks no stream for more than it may show."""
    low, high = 0, samples
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.all(prefix_counts(rates, middle) <= most) else (low, middle)
    return low


def _refuse_budget(spec: PhaseSpec, name: str, stream: Stream, used: int, largest_budget: int) -> NoReturn:
    needed = Fraction(used * stream.seq_length + 1, stream.selected.num_tokens)
    allowed = spec.sources[name].max_repeat
    limit = "" if allowed is None else f", above its max_repeat {float(allowed):g}"
    raise PlanError(
        f"phase {spec.name!r}: tokens {spec.tokens:,} asks source {name!r} for {used * stream.seq_length:,} tokens, "
        f"its selection x{float(stream.repeat):g} has {stream.num_windows * stream.seq_length:,}: that is "
        f"{float(needed):.4g} passes{limit}. Lower the phase's tokens to {largest_budget * stream.seq_length:,}, or "
        f"set sources.{name}.max_repeat to at least {math.ceil(needed * 100) / 100:.2f}"
    )
