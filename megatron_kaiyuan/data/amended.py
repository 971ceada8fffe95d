"""A curriculum whose length was changed after it had begun: what was shown stays, the rest is thinned anew.

The rest of each ascending stream is what lies above the last window shown. It is thinned evenly to the samples that are
left, so that it still ends with the best data. Streams in random order go on where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.interleave import prefix_counts
from megatron_kaiyuan.data.parts import Part, fitted_stream, most_windows
from megatron_kaiyuan.data.phase import Phase
from megatron_kaiyuan.data.plan_phases import AmendmentSpec
from megatron_kaiyuan.data.stream import Stream
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.terminal import counted

__all__ = ["AmendedPhase", "amended_phase"]


@dataclass(frozen=True)
class AmendedPhase(Phase):
    """A phase in several stretches, each with an order of its own over the same streams."""

    stretches: tuple[Phase, ...] = ()
    planned_samples: int = 0
    """Before the first amendment."""

    def block(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Stream number and window of the phase's samples, stretch by stretch."""
        numbers, windows = [], []
        for stretch in self.stretches:
            first = stretch.first_sample - self.first_sample
            low, high = max(start, first), min(stop, first + stretch.num_samples)
            if low < high:
                found = stretch.block(low - first, high - first)
                numbers.append(found[0])
                windows.append(found[1])
        return np.concatenate(numbers), np.concatenate(windows)

    def sample(self, sample: int) -> tuple[int, int]:
        """Stream number and window of one sample of the phase."""
        stretch = self.stretch_of(sample)
        return stretch.sample(self.first_sample + sample - stretch.first_sample)

    def stretch_of(self, sample: int) -> Phase:
        """The stretch that a sample of the phase belongs to."""
        return next(one for one in reversed(self.stretches) if self.first_sample + sample >= one.first_sample)


def amended_phase(phase: Phase, parts: Sequence[Part], amendments: Sequence[AmendmentSpec]) -> Phase:
    """The phase with its amendments, in turn.

    Raises:
        PlanError: an amendment outside the phase as it was then, or a length that the rest cannot have.
    """
    stretches: list[Phase] = []
    used, current = np.zeros_like(phase.used), phase
    for amendment in amendments:
        kept = amendment.at - current.first_sample
        if not 0 < kept < current.num_samples:
            raise PlanError(
                f"phase {phase.name!r}: amended at sample {amendment.at:,}, which is not inside of samples "
                f"{current.first_sample:,} to {current.first_sample + current.num_samples:,}, where it could be; give "
                "the samples that the run had consumed"
            )
        counts = prefix_counts(current.rates, kept)
        stretches.append(replace(current, num_samples=kept))
        used = used + counts
        current = _rest(current, parts, amendment, counts, phase)
    stretches.append(current)
    streams = {
        name: phase.streams[name] if stream.ascending else replace(stream, seen=phase.streams[name].seen)
        for name, stream in current.streams.items()
    }
    samples = current.first_sample + current.num_samples - phase.first_sample
    return AmendedPhase(
        phase.spec,
        phase.first_sample,
        samples,
        streams,
        phase.rates,
        used + current.used,
        stretches=tuple(stretches),
        planned_samples=phase.num_samples,
    )


def _rest(
    current: Phase, parts: Sequence[Part], amendment: AmendmentSpec, counts: NDArray[np.int64], phase: Phase
) -> Phase:
    """What follows the samples that were consumed."""
    seq_length = parts[0].plan.seq_length
    consumed = amendment.at - phase.first_sample
    left = amendment.tokens // seq_length - consumed
    if left < 1:
        raise PlanError(
            f"phase {phase.name!r}: amended to tokens {amendment.tokens:,}, which are "
            f"{counted(left + consumed, 'sample')}, "
            f"when {consumed:,} had been consumed; give it at least {(consumed + 1) * seq_length:,}"
        )
    used = prefix_counts(current.rates, left)
    begun = [
        _after(stream, int(count), int(planned))
        for stream, count, planned in zip(current.stream_list, counts, current.used, strict=True)
    ]
    for part, stream, count in zip(parts, begun, used.tolist(), strict=True):
        most = stream.available if stream.ascending else most_windows(stream, part.spec.max_repeat)
        if count > most or (count > stream.available and stream.extra is not None):
            raise PlanError(
                f"phase {phase.name!r}: amended to tokens {amendment.tokens:,}, which asks source {part.name!r} for "
                f"{count:,} more samples; at sample {amendment.at:,} it has {min(most, stream.available):,} left. Give "
                "it fewer tokens, or add a phase"
            )
    streams = [
        stream if stream.ascending else fitted_stream(part, stream, count)
        for part, stream, count in zip(parts, begun, used.tolist(), strict=True)
    ]
    return Phase(phase.spec, amendment.at, left, dict(zip(phase.streams, streams, strict=True)), current.rates, used)


def _after(stream: Stream, count: int, planned: int) -> Stream:
    """The stream from its `count`-th sample on, of the `planned` ones that it was thinned to."""
    seen = stream.seen
    if not stream.ascending:
        return replace(stream, seen=replace(seen, samples=seen.samples + count))
    return replace(stream, seen=replace(seen, skipped=seen.skipped + count * stream.available // max(planned, 1)))
