"""Histograms and quantiles of billions of numbers in bounded memory.

Up to `EXACT_VALUES` numbers are kept as they are, and everything about them is exact. Past that they are counted in
about a million bins: the sign, the exponent and the first 11 bits of the mantissa of their float32 value. A bin is at
most 0.05 % wide whatever the range, and every whole number below 4,096 has a bin of its own. Count, mean, minimum,
maximum and the number of NaN are exact in either case.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXACT_VALUES", "Distribution", "Histogram"]

EXACT_VALUES = 1 << 22
_DROPPED_BITS = 12
_HALF = 1 << (31 - _DROPPED_BITS)


@dataclass(frozen=True)
class Histogram:
    """Numbers counted between edges.

    The last bin includes its upper edge.
    """

    edges: NDArray[np.float64]
    """Ascending, float64 `[bins + 1]`."""
    counts: NDArray[np.int64]
    """Numbers in each bin, int64 `[bins]`."""
    weights: NDArray[np.float64]
    """Sum of the weights of these numbers, float64 `[bins]`."""


class Distribution:
    """A growing collection of numbers, each with a weight.

    Args:
        exact_values: how many numbers to keep before counting them in bins.
    """

    def __init__(self, exact_values: int = EXACT_VALUES) -> None:
        self.count = 0
        """Numbers, NaN not counted."""
        self.nan = 0
        self.minimum = np.inf
        self.maximum = -np.inf
        self._sum = 0.0
        self._exact_values = exact_values
        self._kept: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        self._num_kept = 0
        self._bins: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None
        self._table: tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]] | None = None

    @property
    def exact(self) -> bool:
        """Whether quantiles and histograms are exact rather than within 0.05 %."""
        return self._bins is None

    @property
    def mean(self) -> float:
        """Return the mean of the finite and infinite numbers, NaN for none."""
        return self._sum / self.count if self.count else np.nan

    def add(self, values: NDArray[np.number], weights: NDArray[np.number]) -> None:
        """Add numbers.

        Args:
            values: any real dtype, `[n]`; NaN are counted and left out.
            weights: what each stands for (tokens of a document), `[n]`.
        """
        numbers, heavy = values.astype(np.float64), weights.astype(np.float64)
        missing = np.isnan(numbers)
        if missing.any():
            self.nan += int(missing.sum())
            numbers, heavy = numbers[~missing], heavy[~missing]
        if not len(numbers):
            return
        self.count += len(numbers)
        self.minimum = min(self.minimum, float(numbers.min()))
        self.maximum = max(self.maximum, float(numbers.max()))
        with np.errstate(invalid="ignore"):  # both infinities: the mean is NaN
            self._sum += float(numbers.sum())
        self._kept.append((numbers, heavy))
        self._num_kept += len(numbers)
        self._table = None
        if self._num_kept > self._exact_values:
            self._fold()

    def quantile(self, fraction: float) -> float:
        """The smallest number that at least this fraction of all numbers does not exceed.

        Raises:
            ValueError: there are no numbers.
        """
        if not self.count:
            raise ValueError("the quantile of no numbers")
        numbers, counts, _ = self._sorted()
        below = np.cumsum(counts)
        wanted = min(max(1, int(np.ceil(fraction * self.count))), self.count)
        found = float(numbers[np.searchsorted(below, wanted)])
        return min(max(found, self.minimum), self.maximum)

    def fraction_below(self, value: float) -> float:
        """Which fraction of the numbers is smaller than this."""
        numbers, counts, _ = self._sorted()
        return float(counts[: np.searchsorted(numbers, value)].sum() / max(self.count, 1))

    def weight_by_band(self, bands: int) -> NDArray[np.float64]:
        """Return the weight of each band of equally many numbers, smallest numbers first.

        float64 `[bands]`. Equal numbers that a band's edge divides give each band its share.
        """
        numbers, counts, weights = self._sorted()
        if not len(numbers):
            return np.zeros(bands)
        edges = np.linspace(0, self.count, bands + 1)
        return np.diff(np.interp(edges, np.append(0, np.cumsum(counts)), np.append(0, np.cumsum(weights))))

    def distinct(self, most: int) -> NDArray[np.float64] | None:
        """The numbers that occur, ascending, or None where there are more than `most`."""
        numbers, _, _ = self._sorted()
        return numbers if len(numbers) <= most else None

    def histogram(self, edges: NDArray[np.float64]) -> Histogram:
        """Count the numbers between these edges.

        Those outside are counted in no bin.
        """
        numbers, counts, weights = self._sorted()
        return Histogram(
            edges,
            np.histogram(numbers, edges, weights=counts)[0].astype(np.int64),
            np.histogram(numbers, edges, weights=weights)[0],
        )

    def _sorted(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Distinct numbers in ascending order, how often each occurs, and the weight of all its occurrences."""
        if self._table is None:
            if not self.exact:
                self._fold()
            self._table = self._exact_table() if self._bins is None else _binned_table(*self._bins)
        return self._table

    def _exact_table(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        if not self._kept:
            return np.empty(0), np.empty(0, dtype=np.int64), np.empty(0)
        numbers = np.concatenate([part for part, _ in self._kept])
        weights = np.concatenate([part for _, part in self._kept])
        distinct, where, counts = np.unique(numbers, return_inverse=True, return_counts=True)
        return distinct, counts.astype(np.int64), np.bincount(where, weights, len(distinct))

    def _fold(self) -> None:
        """Move what is kept into the bins."""
        if self._bins is None:
            self._bins = np.zeros(2 * _HALF, dtype=np.int64), np.zeros(2 * _HALF)
        if self._kept:
            keys = _bin_of(np.concatenate([part for part, _ in self._kept]))
            weights = np.concatenate([part for _, part in self._kept])
            self._bins[0][:] += np.bincount(keys, minlength=2 * _HALF)
            self._bins[1][:] += np.bincount(keys, weights, minlength=2 * _HALF)
        self._kept, self._num_kept = [], 0


def _bin_of(numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    with np.errstate(over="ignore"):  # beyond float32: counted as infinite
        bits = (numbers.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0: -0.0 is 0.0
    magnitude = ((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(_DROPPED_BITS)).astype(np.int64)
    return np.where(bits >> np.uint32(31), _HALF - 1 - magnitude, _HALF + magnitude)


def _binned_table(
    counts: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """The bins in use, each by the end that is nearer to zero: exact for numbers with short mantissas."""
    used = np.flatnonzero(counts)
    negative = used < _HALF
    magnitude = np.where(negative, _HALF - 1 - used, used - _HALF).astype(np.uint32) << np.uint32(_DROPPED_BITS)
    numbers = magnitude.view(np.float32).astype(np.float64)
    return np.where(negative, -numbers, numbers), counts[used], weights[used]
