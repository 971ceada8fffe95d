"""Lengths of documents that do not exist, with a mean, a trend and a heavy tail, and no array of them.

Every document has one token, and the others are dealt out in two steps. Groups of 64 neighbours get what the trend
gives them, plus or minus a bit: the border between two groups is shifted by up to a quarter of a group, so that their
tokens vary as sums of 64 independent lengths do, up to that. Within a group the tokens are dealt out in proportion to
the trend and to 64 weights of a log-normal distribution, one of 1,024 sets. Which set a group has, and how its borders
are shifted, are hashes of its number, so the tokens before a document cost three hashes and one look-up, whatever the
size of the source.

So single lengths scatter as those of real documents do (log-normal with the given spread, at the default up to some
twenty times the mean), and the total is exact. What real lengths do and these do not: the tokens of a range of
documents differ from what the trend says by less than two groups at either end, where independent lengths would differ
by the root of their number: by a thousandth in a million documents.
"""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.permutation import KeyedPermutation, derive_key, mix64_array

__all__ = ["GROUP", "InventedLengths"]

GROUP = 64
"""Documents whose lengths are invented together."""

_SETS = 1024
_QUANTILES = 8192  # different weights; each occurs eight times
_MOST_SHIFT = 0.25  # of a group: two borders that come together leave half of it
_PROBES = 1024  # of one round of a search


class InventedLengths:
    """Tokens before each document of an order.

    Args:
        documents: how many.
        tokens: of all documents, at least one each.
        trend: `(1 + trend (2 q - 1))` times the mean are the tokens, less one, expected of a document at quantile `q`.
        spread: standard deviation of the logarithm of lengths at one quantile; 0: all are as long as the trend says.
        key: decides the scatter.
    """

    def __init__(self, documents: int, tokens: int, *, trend: float, spread: float, key: int) -> None:
        self.documents = documents
        self._dealt = tokens - documents
        self._trend = trend
        # a group between two uniform shifts up to `a` varies by a * sqrt(2 / 3), the mean of 64 lengths by 1/8 of one's
        self._shift = min(_MOST_SHIFT, math.sqrt(1.5 * math.expm1(spread * spread) / GROUP))
        self._weights = _weights(spread)
        self._keys = [np.uint64(derive_key(key, part)) for part in ("border", "set")]

    def before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens before each position, int64 `[n]`, exact at both ends.

        `0 <= position <= documents`.
        """
        groups = np.minimum(positions // GROUP, (self.documents - 1) // GROUP)
        offsets: NDArray[np.int64] = positions + self._border(groups)
        inside = np.flatnonzero(positions != groups * GROUP)
        if len(inside):
            offsets[inside] += self._dealt_within(groups[inside], positions[inside] - groups[inside] * GROUP)
        return offsets

    def _dealt_within(self, groups: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens dealt out to the first `places` documents of each group, int64 `[n]`."""
        start, end = self._border(groups), self._border(groups + 1)
        weights = self._weights[self._hash(groups, 1) % np.uint64(_SETS)]
        rows, sizes = np.arange(len(groups)), np.minimum(self.documents - groups * GROUP, GROUP)
        part: NDArray[np.float64] = weights[rows, places] / weights[rows, sizes]
        first = np.asarray(groups * (GROUP / self.documents), dtype=np.float64)
        size: NDArray[np.float64] = np.asarray(sizes / self.documents, dtype=np.float64)
        share = part * self._rising(first, part * size) / self._rising(first, size)
        dealt: NDArray[np.int64] = ((end - start) * share).astype(np.int64)
        return dealt

    def _rising(self, first: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what the trend gives, relative to the mean, to quantiles from `first` on, `[n]`."""
        return 1 + self._trend * (2 * first + size - 1)

    def locate(self, token: int) -> int:
        """The document that holds a token."""
        low, high = 0, self.documents
        while high - low > 1:  # tokens before `low` <= token < tokens before `high`
            count = min(high - low, _PROBES)
            probes = low + (high - low) * np.arange(count + 1) // count
            found = int(self.before(probes).searchsorted(token, side="right"))
            low, high = int(probes[found - 1]), int(probes[min(found, count)])
        return low

    def _border(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens dealt out before each group, int64 `[n]`.

        They never fall, and are 0 and all of them at the ends.
        """
        share = np.minimum(groups * GROUP, self.documents) / self.documents
        expected = self._dealt * (share + self._trend * (share * share - share))
        inside = (groups > 0) & (groups < self.documents // GROUP)
        chance = (self._hash(groups, 0) >> np.uint64(11)).astype(np.float64) / (1 << 52) - 1
        local = GROUP * self._dealt / self.documents * (1 + self._trend * (2 * share - 1))
        shifted = expected + np.where(inside, self._shift * chance * local, 0.0)
        return np.minimum(shifted.astype(np.int64), self._dealt)

    def _hash(self, groups: NDArray[np.int64], which: int) -> NDArray[np.uint64]:
        return mix64_array(groups.astype(np.uint64) ^ self._keys[which])


@lru_cache(maxsize=8)
def _weights(spread: float) -> NDArray[np.float64]:
    """Cumulated weights of sets of documents, the last of each is 1: float64 `[_SETS, GROUP + 1]`."""
    normal = NormalDist()
    deviations = np.array([normal.inv_cdf((number + 0.5) / _QUANTILES) for number in range(_QUANTILES)])
    dealt = KeyedPermutation(_SETS * GROUP, derive_key("lengths")).many(np.arange(_SETS * GROUP)) % _QUANTILES
    sets = np.exp(spread * deviations)[dealt].reshape(_SETS, GROUP)
    cumulated = np.zeros((_SETS, GROUP + 1))
    np.cumsum(sets, axis=1, out=cumulated[:, 1:])
    cumulated /= cumulated[:, -1:]
    return cumulated
