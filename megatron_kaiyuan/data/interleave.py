"""Merging several streams into one order that keeps their mix in every window.

Sample `j` of stream `i` sits at position `(j + 1/2) / rate_i` on a line; the merged order is the order of positions,
ties by stream number. It is the rescaled-rank order of the Kaiyuan preprocessing code, applied to fixed-size token
windows instead of documents, so the mix it keeps is a mix of tokens.

Law (proved in docs/data-engine.md, tested by brute force): in the first `s` merged samples, stream `i` with share
`p = rate_i / sum(rates)` occurs `s * p` times, up to `(1 + p * (k - 2)) / 2` for `k` streams (`prefix_bound`); in any
window of consecutive samples, up to twice that.

Positions are IEEE doubles, `(j + 0.5) / rate` correctly rounded, hence the same on every machine. Nothing is stored
per sample.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["merged_block", "merged_sample", "prefix_bound", "prefix_counts"]

_ROUNDING = 1 / 64  # more than the rounding error of `rates * position` for streams below 2**45 samples


def prefix_bound(rates: Sequence[float], stream: int) -> float:
    """Largest deviation, in samples, of a stream's count in a prefix from its exact share."""
    share = rates[stream] / math.fsum(rates)
    return (1 + share * (len(rates) - 2)) / 2


def merged_block(rates: NDArray[np.float64], start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The merged samples `start <= s < stop`.

    Args:
        rates: samples per unit of line for each stream, float64 `[k]`, all positive.
        start: first merged sample number.
        stop: one past the last merged sample number.

    Returns:
        Stream number and sample number within the stream, each int64 `[stop - start]`.

    Cost: O(k + stop - start) memory; a sort of about `sqrt(k) + stop - start` positions, or of `k` more where many
    streams have equal ones. Nothing depends on `start`.
    """
    streams, samples, settled = _sorted_candidates(rates, start, stop)
    before = start - int(settled.sum())
    return streams[before : before + stop - start], samples[before : before + stop - start]


def merged_sample(rates: Sequence[float], total: float, sample: int) -> tuple[int, int]:
    """`merged_block` for one sample, in plain numbers: for a few dozen streams several times faster than arrays.

    Args:
        rates: as for `merged_block`.
        total: `float(rates.sum())`, as numpy adds them.
        sample: merged sample number.

    Returns:
        Stream number and sample number within the stream.
    """
    for margin in _margins(len(rates)):
        low, high = (sample - margin) / total, (sample + 1 + margin) / total
        before = sample
        found: list[tuple[float, int, int]] = []
        for stream, rate in enumerate(rates):
            lowest = max(math.ceil(rate * low - (0.5 + _ROUNDING)), 0)
            highest = max(math.floor(rate * high - (0.5 - _ROUNDING)) + 1, 0)
            before -= lowest
            found += [((own + 0.5) / rate, stream, own) for own in range(lowest, highest)]
        found.sort()
        if 0 <= before < len(found) and low <= found[before][0] <= high:
            return found[before][1:]
    raise AssertionError(f"sample {sample} is not where it must be")


def prefix_counts(rates: NDArray[np.float64], samples: int) -> NDArray[np.int64]:
    """Return how often each stream occurs in the first `samples` merged samples.

    int64 `[k]`, sums to `samples`.
    """
    streams, _, settled = _sorted_candidates(rates, samples, samples)
    before = samples - int(settled.sum())
    return settled + np.bincount(streams[:before], minlength=len(rates))


def _sorted_candidates(
    rates: NDArray[np.float64], start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Candidates for `[start, stop)` in merged order, and per stream the number of samples that come before them.

    All samples between two positions are taken, first between two near ones. Left of position `x` there are `sum(rates)
    * x` samples, up to half a one for each stream, but the halves mostly cancel. If the samples asked for turn out to
    lie between the two positions, whatever was left out comes before or after them; if not, `k / 2 + 2` samples to
    both sides always suffice.
    """
    total = float(rates.sum())
    for margin in _margins(len(rates)):
        low, high = (start - margin) / total, (stop + margin) / total
        lowest, highest = _between(rates, low, high)
        streams, samples, positions = _sorted_by_position(rates, lowest, highest)
        before = start - int(lowest.sum())
        last = before + stop - start - 1
        if (
            0 <= before < len(positions)
            and last < len(positions)
            and positions[before] >= low
            and (last < 0 or positions[last] <= high)
        ):
            return streams, samples, lowest
    raise AssertionError(f"samples {start} to {stop} are not where they must be")


def _margins(streams: int) -> tuple[float, float]:
    """Samples to both sides that nearly always suffice, and that always do."""
    return 2 + 1.25 * math.sqrt(streams), 2 + 0.5 * streams


def _between(rates: NDArray[np.float64], low: float, high: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per stream the range of samples that holds all those at positions from `low` to `high`, and hardly another."""
    lowest = np.ceil(rates * low - (0.5 + _ROUNDING)).astype(np.int64)
    highest = np.floor(rates * high - (0.5 - _ROUNDING)).astype(np.int64) + 1
    return np.maximum(lowest, 0), np.maximum(highest, 0)


def _sorted_by_position(
    rates: NDArray[np.float64], lowest: NDArray[np.int64], highest: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Stream, sample and position of all samples in these ranges, in merged order."""
    present = np.flatnonzero(highest > lowest)  # few of many streams, when few samples are asked for
    counts = highest[present] - lowest[present]
    streams = np.repeat(present, counts)
    firsts = np.repeat(np.cumsum(counts) - counts - lowest[present], counts)
    samples = np.arange(len(streams)) - firsts
    positions = (samples + 0.5) / rates[streams]
    order = np.argsort(positions, kind="stable")  # candidates stand by stream, so equal positions stay by stream
    return streams[order], samples[order], positions[order]
