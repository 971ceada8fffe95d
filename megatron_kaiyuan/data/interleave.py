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

__all__ = ["merged_block", "prefix_bound", "prefix_counts"]


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

    Cost: O(k + stop - start) memory, one sort of that size; nothing depends on `start`.
    """
    streams, samples, settled = _sorted_candidates(rates, start, stop)
    before = start - int(settled.sum())
    return streams[before : before + stop - start], samples[before : before + stop - start]


def prefix_counts(rates: NDArray[np.float64], samples: int) -> NDArray[np.int64]:
    """How often each stream occurs in the first `samples` merged samples; int64 `[k]`, sums to `samples`."""
    streams, _, settled = _sorted_candidates(rates, samples, samples)
    before = samples - int(settled.sum())
    return settled + np.bincount(streams[:before], minlength=len(rates))


def _sorted_candidates(
    rates: NDArray[np.float64], start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Candidates for `[start, stop)` in merged order, and per stream the number of samples that surely come before."""
    lowest, highest = _candidate_range(rates, start, stop)
    counts = highest - lowest
    streams = np.repeat(np.arange(len(rates)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts - lowest, counts)
    samples = np.arange(len(streams)) - firsts
    order = np.lexsort((streams, (samples + 0.5) / rates[streams]))
    return streams[order], samples[order], lowest


def _candidate_range(rates: NDArray[np.float64], start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per stream, a range of its samples that surely holds all of its merged samples in `[start, stop)`.

    A stream has `rate * x` samples left of position `x` up to 1/2, so `k` streams together are off by at most `k /
    2`. A margin of `k + 2` samples on both sides therefore covers the range, and the rounding of doubles too.
    """
    total = float(rates.sum())
    margin = len(rates) + 2
    low = np.floor(rates * ((start - margin) / total) - 0.5).astype(np.int64)
    high = np.ceil(rates * ((stop + margin) / total) + 0.5).astype(np.int64)
    return np.maximum(low, 0), np.maximum(high, 0)
