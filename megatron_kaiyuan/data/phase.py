"""A phase with its sources opened: which stream each source contributes, and how the streams are merged."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.interleave import merged_block, merged_sample
from megatron_kaiyuan.data.plan_schema import LearningRateSpec, PhaseSpec
from megatron_kaiyuan.data.stream import Stream
from megatron_kaiyuan.data.unseen import thinned
from megatron_kaiyuan.documents.packing import PackedOrder
from megatron_kaiyuan.documents.shuffled import ShuffledOrder

__all__ = ["Phase", "stored_orders"]

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
    """Windows of each stream in this phase, int64 `[streams]`; sums to `num_windows`."""
    samples_per_window: int = 1
    """Samples that a window is read as, one after another: above 1 where the phase has a longer `seq_length`."""

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

    @property
    def num_windows(self) -> int:
        """Windows of all streams."""
        return self.num_samples // self.samples_per_window

    @property
    def seq_length(self) -> int:
        """Predicted tokens of a window."""
        return self.stream_list[0].seq_length

    def block(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Stream number and window of the phase's windows `start <= w < stop`, counted in the order of training."""
        numbers, samples = merged_block(self.rates, start, stop)
        ascending, available = self._stream_facts
        windows = thinned(samples, self.used[numbers], available[numbers])  # of ascending streams; others follow
        for number in self._lifted:
            where = np.flatnonzero(numbers == number)
            windows[where] = self.stream_list[number].seen.lifted(windows[where])
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
        """Stream number and window of one window of the phase, counted in the order of training."""
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
        """Return whether each stream is ascending, and the windows that it may show, `[streams]` each."""
        ascending = np.array([stream.ascending for stream in self.stream_list])
        return ascending, np.array([stream.available for stream in self.stream_list], dtype=np.int64)

    @cached_property
    def _lifted(self) -> list[int]:
        """Return the numbers of the ascending streams that go on with what earlier phases left, mostly none."""
        return [number for number, stream in enumerate(self.stream_list) if stream.ascending and stream.seen.windows]


def stored_orders(phases: Iterable[Phase]) -> Iterator[ShuffledOrder | PackedOrder]:
    """Orders of documents, as the phases pack them, whose sums are too many to be made at each start."""
    for phase in phases:
        for stream in phase.streams.values():
            orders = stream.shuffled_orders() if stream.packed is None else [stream.packed]
            yield from (order for order in orders if not order.is_small)
