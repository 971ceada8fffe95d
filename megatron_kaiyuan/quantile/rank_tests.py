"""Exact tests: a linear statistic of ranks under permutation of runs, and the range of all cells' means.

The permutation test takes the runs of a source as exchangeable when its score means nothing. It needs no common
variance: a slice whose runs spread ten times as far as the others' can only take the outer ranks.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, ndtr
from scipy.stats import rankdata

__all__ = ["range_p_value", "rank_permutation_p_value"]

_DRAWS = 60_000
"""Arrangements of a design too large to list. With the observed one added the test stays exact (Phipson and Smyth,
Stat. Appl. Genet. Mol. Biol. 9, 2010); its smallest p-value is 1 / 60 001."""
_TOLERANCE = 1e-9


def rank_permutation_p_value(
    values: NDArray[np.float64], coefficients: NDArray[np.float64], blocks: Sequence[int] | None = None
) -> float:
    """Return the two-sided p-value of `sum_j coefficients[j] * rank(values[j])` when runs are exchangeable.

    Args:
        values: Of the runs, `[runs]`; equal ones share their mean rank.
        coefficients: `[runs]`, with sum 0 in each block.
        blocks: Numbers of the blocks within which runs may be exchanged, `[runs]`; None: all of them are one.
    """
    numbers = tuple(blocks) if blocks is not None else (0,) * len(values)
    ranks = np.empty(len(values))
    for block in set(numbers):
        inside = np.array(numbers) == block
        ranks[inside] = rankdata(values[inside]) - (inside.sum() + 1) / 2
    key = tuple(np.round(coefficients, 12).tolist())
    null = _null_distribution(key, numbers, _ties(ranks, numbers))
    observed = abs(float(coefficients @ ranks))
    slack = _TOLERANCE * max(1.0, observed)
    beyond = len(null) - int(np.searchsorted(null, observed - slack))
    return beyond / len(null) if _is_complete(numbers) else (1 + beyond) / (1 + len(null))


def _ties(ranks: NDArray[np.float64], numbers: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """The ranks of each block, ascending: what its null distribution depends on."""
    return tuple(
        tuple(sorted(rank for rank, number in zip(ranks.tolist(), numbers, strict=True) if number == block))
        for block in sorted(set(numbers))
    )


def _is_complete(numbers: tuple[int, ...]) -> bool:
    return math.prod(math.factorial(numbers.count(block)) for block in set(numbers)) <= _DRAWS


@functools.lru_cache(maxsize=256)
def _null_distribution(
    coefficients: tuple[float, ...], numbers: tuple[int, ...], ranks: tuple[tuple[float, ...], ...]
) -> NDArray[np.float64]:
    """Absolute values of the statistic under all arrangements, or many drawn ones, ascending."""
    total = np.zeros(1)
    complete = _is_complete(numbers)
    rng = np.random.default_rng(0)
    for block, some in zip(sorted(set(numbers)), ranks, strict=True):
        own = np.array([value for value, number in zip(coefficients, numbers, strict=True) if number == block])
        if complete:
            sums = _all_orders(len(own), np.array(some)) @ own
            total = (total[:, None] + sums[None, :]).ravel()
        else:
            total = total + rng.permuted(np.tile(np.array(some), (_DRAWS, 1)), axis=1) @ own
    return np.sort(np.abs(total))


def _all_orders(size: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """All orders of the values, `[size!, size]`."""
    orders = np.zeros((1, 0), dtype=np.int64)
    for number in range(size):
        orders = np.concatenate([np.insert(orders, place, number, axis=1) for place in range(number + 1)])
    return values[orders]


def range_p_value(statistic: float, freedom: float, cells: int) -> float:
    """Return the chance that any two of so many equal means differ by this many standard errors of a difference.

    Tukey's studentized range at `statistic * sqrt(2)`. It covers the comparison of the best with all others although
    the data chose the best. `scipy.stats.studentized_range` gives the same number in 15 ms; a report needs hundreds.
    """
    if freedom <= 0:
        return 1.0
    spreads = _spreads(round(freedom, 3))
    grid, tails = _range_table(cells)
    return float(np.mean(np.interp(abs(statistic) * math.sqrt(2) * spreads, grid, tails)))


@functools.lru_cache(maxsize=4096)
def _spreads(freedom: float) -> NDArray[np.float64]:
    """400 quantiles of an estimated standard deviation that is 1 in truth."""
    return np.asarray(np.sqrt(chdtri(freedom, 1 - (np.arange(400) + 0.5) / 400) / freedom), dtype=np.float64)


@functools.lru_cache(maxsize=64)
def _range_table(cells: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    grid = np.linspace(0.0, 14.0, 1401)
    places = np.linspace(-9.0, 9.0, 721)
    density = np.exp(-(places**2) / 2) / math.sqrt(2 * math.pi) * (places[1] - places[0])
    inside = ndtr(places[None, :] + grid[:, None]) - ndtr(places[None, :])
    tails = 1 - cells * (inside ** (cells - 1)) @ density
    return grid, np.clip(np.where(grid < grid[-1], tails, 0.0), 0.0, 1.0)
