"""What earlier phases have left of a stream: its windows that none of them showed, by arithmetic.

A phase that ascends shows window `floor((j + 1) n / u) - 1` of `n`, `0 <= j < u`. Of these up to window `w` there are
`ceil((w + 2) u / n) - 1`, so `floor((w + 2) (n - u) / n)` up to `w` were left out, and the `k`-th of them is window
`ceil((k + 1) n / (n - u)) - 2`. What several phases leave follows one from the other.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOTHING", "Seen", "left_out", "left_out_one", "thinned"]

_SAFE = math.isqrt(2**63 - 1)
"""3.04e9, the largest number whose square is an int64."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What earlier phases have shown of a stream."""

    levels: tuple[tuple[int, int], ...] = ()
    """Of each phase that ascended, in turn: windows that were left, and how many of them it showed."""
    samples: int = 0
    """Shown in random order, after those."""
    skipped: int = 0
    """Of what the phases left, the first ones that an ascent has passed, shown or not."""

    @property
    def windows(self) -> int:
        """How many in all."""
        return self.samples + self.skipped + sum(used for _, used in self.levels)

    def lifted(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows of the stream, by their numbers among those that are left."""
        places = places + self.skipped
        for available, used in reversed(self.levels):
            places = left_out(places, used, available)
        return places

    def lifted_one(self, place: int) -> int:
        """`lifted` for one window, in plain integers."""
        place += self.skipped
        for available, used in reversed(self.levels):
            place = left_out_one(place, used, available)
        return place


NOTHING = Seen()
"""Of a source that no earlier phase has shown, or that is shown anew."""


def left_out_one(place: int, used: int, available: int) -> int:
    """Window number `place` of those that a thinned phase leaves out of `available`."""
    return -(-(place + 1) * available // (available - used)) - 2


def left_out(places: NDArray[np.int64], used: int, available: int) -> NDArray[np.int64]:
    """Return `left_out_one` of several, without overflow, int64 `[n]`."""
    left = available - used
    quotient, remainder = divmod(available, left)
    counts = places + 1
    floors = counts * quotient + _scaled(counts, remainder, left)
    whole = counts % (left // math.gcd(remainder, left)) == 0 if remainder else np.ones(len(places), dtype=bool)
    result: NDArray[np.int64] = floors + ~whole - 2
    return result


def thinned(
    samples: NDArray[np.int64], used: int | NDArray[np.int64], available: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """`(j + 1) * available // used - 1` without overflow: even gaps, and the last sample shows the last window.

    Args:
        samples: sample numbers `j`, `0 <= j < used`, int64 `[n]`.
        used: samples of the stream, below 2**61; for all, or int64 `[n]`.
        available: windows of the stream; for all, or int64 `[n]`.
    """
    counts = samples + 1
    quotient, remainder = np.divmod(available, used)
    if int(np.max(used, initial=0)) <= _SAFE:  # count * remainder < used**2 < 2**63
        return counts * quotient + counts * remainder // used - 1
    return counts * quotient + _scaled(counts, remainder, used) - 1


def _scaled(
    counts: NDArray[np.int64], remainder: int | NDArray[np.int64], used: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """`counts * remainder // used`, for counts up to `used` and `remainder < used < 2**61`, int64 `[n]`.

    Long division: the remainder is taken in digits, the highest first, each so short that no product overflows.
    """
    digit_bits = 62 - int(np.max(used)).bit_length()
    digits = -(-int(np.max(remainder)).bit_length() // digit_bits)
    result = rest = np.zeros_like(counts)
    for number in range(digits - 1, -1, -1):
        digit = (remainder >> (number * digit_bits)) & ((1 << digit_bits) - 1)
        whole, rest = np.divmod((rest << digit_bits) + counts * digit, used)  # two numbers below 2**62
        result = (result << digit_bits) + whole
    return result
