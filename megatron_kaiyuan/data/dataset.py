"""The training order as a map-style dataset: sample number in, tokens out, nothing in between is stored."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.phase import Phase
from megatron_kaiyuan.data.plan import Plan
from megatron_kaiyuan.data.stream import Stream
from megatron_kaiyuan.documents.bands import NUM_BANDS
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.source import Segment

__all__ = ["NUM_BANDS", "CurriculumDataset", "HeldOutDataset", "Provenance", "band_name"]

_BLOCK = 1024
_NEAR_IN_A_ROW = 3
"""So many samples, each near the one before, are no random access: in a small plan one or two happen to be near."""


def band_name(number: int) -> str:
    """Return the name of a quantile band for people, such as `90-100%`.

    Band 0 has the lowest scores.
    """
    step = 100 // NUM_BANDS
    return f"{number * step}-{(number + 1) * step}%"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a sample comes from."""

    phase: str
    source: str
    pass_number: int
    """0 for the first pass over the selection, in which the sample starts."""
    quantile: tuple[float, float] | None
    """Score quantiles of its lowest and highest ranked document, 0 = worst; None for an unscored source."""
    segments: list[Segment]


class CurriculumDataset:
    """Samples of a plan in training order.

    `dataset[s]` is a pure function of the plan and `s`: whatever reads it, with any number of workers and
    data-parallel ranks and from any sample on, sees the same order. It holds memory maps only, so forked and spawned
    workers share the page cache.
    """

    def __init__(self, plan: Plan | str | Path, *, parts: bool = False) -> None:
        """Open a plan.

        Args:
            plan: it, or its file.
            parts: whether the caller puts samples together that are parts of one window, as `place_in_window` tells.

        Raises:
            PlanError: also where phases differ in `seq_length` and the caller does not.
        """
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        if self.plan.longest > self.plan.seq_length and not parts:
            raise PlanError(
                f"phases of the plan have windows of up to {counted(self.plan.longest, 'token')}, which are "
                f"several samples of {self.plan.seq_length}: give all phases one seq_length, train with python -m "
                "megatron_kaiyuan.pretrain, or open it with CurriculumDataset(plan, parts=True) and join samples by "
                "place_in_window"
            )
        self._parts = parts
        self._source_numbers = {name: number for number, name in enumerate(self.plan.sources)}
        self._block: tuple[tuple[int, int], NDArray[np.int64], NDArray[np.int64]] | None = None
        self._last: tuple[int, tuple[Phase, int, int], int] | None = None
        self._read: tuple[tuple[int, int, int], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, sample: int) -> dict[str, NDArray[np.int64]]:
        """Return the tokens of a sample, int64 `[seq_length + 1]`: inputs and, shifted by one, targets.

        Raises:
            IndexError: `sample` outside `range(len(self))`. A negative number is outside too.
        """
        phase, number, window = self._place(sample)
        if phase.samples_per_window == 1:
            return {"tokens": phase.stream_list[number].read(window)}
        start, stop = self._part_of_window(phase, sample)
        return {"tokens": self._longer_window(phase, number, window)[start : stop + 1]}

    def window(self, sample: int) -> NDArray[np.int64]:
        """Return the tokens of the window that a sample is part of, int64 `[its seq_length + 1]`."""
        return self._longer_window(*self._place(sample))

    def place_in_window(self, sample: int) -> tuple[int, int]:
        """Return which of the samples of its window a sample is, and how many of them there are.

        Samples of one window follow one another. Where a phase has the plan's `seq_length`, windows are single samples.
        """
        phase = self._place(sample)[0]
        return (int(sample) - phase.first_sample) % phase.samples_per_window, phase.samples_per_window

    def _part_of_window(self, phase: Phase, sample: int) -> tuple[int, int]:
        """The predicted tokens of a sample, counted in its window."""
        length = self.plan.seq_length
        start = (int(sample) - phase.first_sample) % phase.samples_per_window * length
        return start, start + length

    def _longer_window(self, phase: Phase, number: int, window: int) -> NDArray[np.int64]:
        """The tokens of a window of several samples, which are asked for one after the other."""
        kept, place = self._read, (phase.first_sample, number, window)
        if kept is None or kept[0] != place:
            kept = place, phase.stream_list[number].read(window)
            self._read = kept
        return kept[1]

    def padding(self, sample: int) -> int:
        """Tokens at the end of a sample that are padding: as many targets, the last ones, do not count."""
        phase, number, window = self._place(sample)
        free = phase.stream_list[number].padding(window)
        if not free:
            return 0
        _, stop = self._part_of_window(phase, sample)
        return min(max(0, free - (phase.seq_length - stop)), self.plan.seq_length)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(CurriculumDataset, parts=self._parts), (self.plan,)

    def source_index(self, sample: int) -> int:
        """Number of the sample's source in `list(plan.sources)`."""
        phase, number, _ = self._place(sample)
        return self._source_numbers[phase.source_list[number]]

    def provenance(self, sample: int) -> Provenance:
        """Phase, source, pass, quantile range and documents of a sample."""
        phase, number, window = self._place(sample)
        name, stream = phase.source_list[number], phase.stream_list[number]
        return Provenance(
            phase=phase.name,
            source=name,
            pass_number=int(stream.pass_of_window(np.array([window]))[0]),
            quantile=self._quantile(name, stream, window),
            segments=_cut(stream.segments(window), *self._part_of_window(phase, sample)),
        )

    def band_tokens(self, sample: int) -> NDArray[np.int64]:
        """Input tokens of a sample by quantile band of the document they are from.

        Returns:
            int64 `[NUM_BANDS]`, lowest scores first; it sums to `seq_length` less padding, or to 0 for an
            unscored source.
        """
        phase, number, window = self._place(sample)
        name, stream = phase.source_list[number], phase.stream_list[number]
        opened = self.plan.opened[name]
        if opened.spec.score is None:
            return np.zeros(NUM_BANDS, dtype=np.int64)
        if phase.samples_per_window > 1:
            return self._band_tokens_of_part(stream, window, opened, self._part_of_window(phase, sample))
        counts = np.zeros(NUM_BANDS)  # of float64, as bincount adds: exact far beyond the tokens of a window
        ranked, total = stream.selected.order.ranked, opened.source.num_documents
        for pieces in stream.pieces(window):
            bands = pieces.positions * NUM_BANDS // total if ranked else opened.bands_of(pieces.documents)
            counts += np.bincount(bands, weights=pieces.sizes, minlength=NUM_BANDS)
        counts[bands[-1]] -= 1  # the last token is a target only
        return counts.astype(np.int64)

    def _band_tokens_of_part(
        self, stream: Stream, window: int, opened: OpenedSource, part: tuple[int, int]
    ) -> NDArray[np.int64]:
        """`band_tokens` of some of a window's tokens."""
        ranked, total = stream.selected.order.ranked, opened.source.num_documents
        bands = [
            np.repeat(one.positions * NUM_BANDS // total if ranked else opened.bands_of(one.documents), one.sizes)
            for one in stream.pieces(window)
        ]
        inputs = np.concatenate(bands)[:-1][part[0] : part[1]]  # the last token is a target only
        return np.bincount(inputs, minlength=NUM_BANDS).astype(np.int64)

    def _quantile(self, name: str, stream: Stream, window: int) -> tuple[float, float] | None:
        source = self.plan.opened[name]
        if source.spec.score is None:
            return None
        ranks = self._ranks(name, stream, window)
        return float(ranks.min() / source.source.num_documents), float((ranks.max() + 1) / source.source.num_documents)

    def _ranks(self, name: str, stream: Stream, window: int) -> NDArray[np.int64]:
        if stream.selected.order.ranked:
            return np.array(stream.positions(window))
        return self.plan.opened[name].ranked_order.positions_of(stream.documents(window))

    def _place(self, sample: int) -> tuple[Phase, int, int]:
        """Phase, stream number and window of a sample."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of a plan with {counted(len(self), 'sample')}")
        sample = int(sample)
        last = self._last  # one attribute, read once and set once: threads may share the dataset
        if last is not None and last[0] == sample:  # its tokens, its source and its bands are asked for one by one
            return last[1]
        near = last[2] + 1 if last is not None and abs(sample - last[0]) < _BLOCK else 0
        place = self._find(sample, ordered=near >= _NEAR_IN_A_ROW)
        self._last = sample, place, near
        return place

    def _find(self, sample: int, *, ordered: bool) -> tuple[Phase, int, int]:
        """Return the phase of a sample, its stream, and its window in the stream.

        `ordered`: samples seem to be asked for in order, and others of the block will follow.
        """
        phase = self.plan.phase_of(sample)
        local = (sample - phase.first_sample) // phase.samples_per_window
        block = (phase.first_sample, local // _BLOCK)
        current = self._block
        if current is None or current[0] != block:
            if not ordered:  # random access: one sample is cheaper than its block
                return phase, *phase.sample(local)
            start = block[1] * _BLOCK
            current = (block, *phase.block(start, min(start + _BLOCK, phase.num_windows)))
            self._block = current
        _, numbers, windows = current
        return phase, int(numbers[local % _BLOCK]), int(windows[local % _BLOCK])


def _cut(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """The pieces of documents in the tokens `start` to `stop`, the target after them too."""
    found, end = [], 0
    for segment in segments:
        begin, end = end, end + segment.stop - segment.start
        low, high = max(begin, start), min(end, stop + 1)
        if low < high:
            shift = segment.start - begin
            found.append(segment._replace(start=low + shift, stop=high + shift))
    return found


class HeldOutDataset:
    """Held-out documents of one source of a plan, packed in storage order.

    The windows are the same in every run.
    """

    def __init__(self, plan: Plan | str | Path, source: str) -> None:
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        self.source = source
        if source not in self.plan.validation:
            raise PlanError(
                f"validation.{source}: the plan holds out no documents of it; it holds out some of "
                f"{', '.join(self.plan.validation) or 'no source'}"
            )
        runs = self.plan.opened[source].held_out_runs
        self._stream = Stream(runs, 1, None, Fraction(1), self.plan.seq_length, ascending=False, key=0)

    def __len__(self) -> int:
        return self._stream.num_windows

    def __getitem__(self, sample: int) -> dict[str, NDArray[np.int64]]:
        """Tokens of a window, int64 `[seq_length + 1]`."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)} held-out windows of {self.source!r}")
        return {"tokens": self._stream.read(int(sample))}

    def segments(self, sample: int) -> list[Segment]:
        """The pieces of documents that a window is made of."""
        return self._stream.segments(int(sample))

    def documents(self, sample: int) -> NDArray[np.int64]:
        """Return the document of each predicted token of a window, int64 `[seq_length]`.

        Documents are numbered within the source.
        """
        pieces = self._stream.pieces(int(sample))
        return np.concatenate([np.repeat(some.documents, some.sizes) for some in pieces])[1:]

    def bands(self, sample: int) -> NDArray[np.int8]:
        """The quantile band of the document of each predicted token, among all documents of the source.

        Returns:
            int8 `[seq_length]`, 0 for the lowest scores to `NUM_BANDS - 1`; -1 everywhere in an unscored source.
        """
        if self._band_of_held_out is None:
            return np.full(self.plan.seq_length, -1, dtype=np.int8)
        held_out = self.plan.opened[self.source].held_out
        return self._band_of_held_out[np.searchsorted(held_out, self.documents(sample))]

    @cached_property
    def _band_of_held_out(self) -> NDArray[np.int8] | None:
        """Return the band of each held-out document, int8 `[H]` by place in `held_out`.

        None where there are no scores.
        """
        opened = self.plan.opened[self.source]
        if opened.spec.score is None:
            return None
        return opened.bands_of(opened.held_out).astype(np.int8)

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldOutDataset, (self.plan, self.source)
