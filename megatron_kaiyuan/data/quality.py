"""Which quality a run shows when: the score quantile of a source at equal distances over the tokens of the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_kaiyuan.data.amended import AmendedPhase
from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.phase import Phase

__all__ = ["QUALITY_COLUMNS", "quality_over_run"]

QUALITY_COLUMNS = 96
"""Places at which a description tells the quality of each scored source."""


def quality_over_run(
    phases: Sequence[Phase], source: OpenedSource, bands: Sequence[Mapping[str, Any]], columns: int
) -> list[float | None]:
    """Score quantile (0 = worst, 1 = best) of what a scored source shows at the middle of `columns` equal parts.

    It is that of the document in the middle of the window shown there, where the stream ascends, and the mean of the
    phase where it comes in random order. None where the source is not shown.

    Args:
        phases: of the plan.
        source: one with scores.
        bands: as described: `low`, `high` and, by phase, `seen`.
        columns: how many places.
    """
    total = phases[-1].first_sample + phases[-1].num_samples
    values: list[float | None] = []
    for column in range(columns):
        sample = total * (2 * column + 1) // (2 * columns)
        phase = next(phase for phase in phases if sample < phase.first_sample + phase.num_samples)
        if source.name not in phase.streams:
            values.append(None)
        elif phase.streams[source.name].ascending:
            values.append(_at(phase, source, sample - phase.first_sample))
        else:
            values.append(_mean(phase, bands))
    return values


def _at(phase: Phase, source: OpenedSource, sample: int) -> float:
    """Of the window that an ascending stream shows nearest to a sample of its phase."""
    if isinstance(phase, AmendedPhase):
        stretch = phase.stretch_of(sample)
        phase, sample = stretch, sample + phase.first_sample - stretch.first_sample
    number = phase.source_list.index(source.name)
    stream, used = phase.stream_list[number], int(phase.used[number])
    own = int(sample * phase.rates[number] / phase.rates.sum())
    return stream.middle_position(stream.window(min(own, used - 1), used)) / source.source.num_documents


def _mean(phase: Phase, bands: Sequence[Mapping[str, Any]]) -> float | None:
    tokens = [band["seen"].get(phase.name, 0) for band in bands]
    middles = [(band["low"] + band["high"]) / 2 for band in bands]
    total = sum(tokens)
    return sum(middle * count for middle, count in zip(middles, tokens, strict=True)) / total if total else None
