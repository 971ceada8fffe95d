"""Differences between slices with two sources of error, seeds and held-out items; Student's t; Holm's correction.

A measurement is `x[c, r, i]`: cell c (a slice), run r (a seed of it), item i (a held-out document or a task's
question). Runs are drawn anew in each cell, items are the same in all. For a contrast `D = sum_c k_c mean_c` of the
cells' means

    var(D) = s^2 sum_c k_c^2 / n_c  +  var_i(d_i) / m,     d_i = sum_c k_c mean_r x[c, r, i]

with s^2 the variance of runs around the mean of their cell, pooled over all cells, and the second term that of the mean
of the paired per-item differences. The noise between a run and an item is in both terms, so the sum is never too small
in expectation. `D / sd(D)` is compared with Student's t. Every part of the variance is an estimate with degrees of
freedom of its own, and those of the sum are Welch's and Satterthwaite's (Biometrics Bulletin 2, 1946): `(sum_p v_p)^2 /
sum_p v_p^2 / f_p`. Items that are weighted by their bytes count as `1 / sum_i share_i^2` equal ones.

Why not a permutation or a bootstrap over seeds: 3 runs against 3 have 20 arrangements, so no permutation test of a pair
can fall below 0.05, and a bootstrap of 3 runs understates their variance by a third. Pooling over cells is what gives
power; its price is the assumption of one variance for all cells, which `variance_ratio` lets a reader judge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

__all__ = [
    "Composite",
    "Estimate",
    "Measure",
    "Score",
    "contrast",
    "holm",
    "mean_estimate",
    "pooled_variance",
    "student_t_cdf",
    "student_t_quantile",
    "variance_ratio",
    "variance_ratio_bound",
]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A contrast of cell means with its error."""

    value: float
    """Positive: the cells with positive coefficients are better."""
    error: float
    """Standard error."""
    freedom: float
    """Degrees of freedom; 0 when there is only one run a cell."""

    @property
    def probability_positive(self) -> float:
        """Probability that the true value is above 0, by Student's t (flat prior)."""
        if self.freedom <= 0:
            return math.nan
        if self.error == 0:
            return 0.5 + 0.5 * float(np.sign(self.value))
        return student_t_cdf(self.value / self.error, self.freedom)

    @property
    def p_value(self) -> float:
        """Two-sided; 1 when there are no degrees of freedom."""
        if self.freedom <= 0:
            return 1.0
        positive = self.probability_positive
        return 2.0 * min(positive, 1.0 - positive)

    def half_width(self, confidence: float) -> float:
        """Half the width of the confidence interval; NaN without degrees of freedom."""
        if self.freedom <= 0:
            return math.nan
        return self.error * student_t_quantile(0.5 + confidence / 2, self.freedom)


class Score(Protocol):
    """Something that cells are compared by; higher is better."""

    @property
    def run_means(self) -> list[NDArray[np.float64]]:
        """Of each cell, the value of each of its runs."""

    def item_variances(self, coefficients: NDArray[np.float64]) -> list[tuple[float, float]]:
        """Independent parts of the variance of a contrast that come from the choice of items, with their freedoms."""


@dataclass(frozen=True)
class Measure:
    """One metric, item by item."""

    name: str
    values: Sequence[NDArray[np.float64]]
    """Of each cell `[runs, items]`, oriented so that higher is better."""
    weights: NDArray[np.float64]
    """Of the items, `[items]`; the value of a run is the weighted mean."""

    @cached_property
    def run_means(self) -> list[NDArray[np.float64]]:
        """Of each cell, the weighted mean of each run, `[runs]`."""
        share = self.weights / self.weights.sum()
        return [cell @ share for cell in self.values]

    @cached_property
    def _item_covariance(self) -> NDArray[np.float64]:
        """Covariance of the cells' weighted means over the choice of items, `[cells, cells]`; one for all contrasts."""
        share = self.weights / self.weights.sum()
        means = np.stack([cell.mean(axis=0) for cell in self.values])
        centred = share * (means - (means @ share)[:, None])
        # squares around the sample's own mean are too small by this factor: 1 - 1 / m where all weights are equal
        squares = (share**2).sum()
        shrinkage = 1 + squares - 2 * (share**3).sum() / squares
        return np.asarray(centred @ centred.T / shrinkage, dtype=np.float64)

    def item_variances(self, coefficients: NDArray[np.float64]) -> list[tuple[float, float]]:
        """Of the weighted mean of the per-item contrasts (ratio estimator, Cochran 1977); none for a single item."""
        share = self.weights / self.weights.sum()
        freedom = float(1 / (share**2).sum()) - 1
        if np.count_nonzero(share) < 2:
            return []
        # the square form of a contrast without variance may come out a rounding error below zero
        return [(max(0.0, float(coefficients @ self._item_covariance @ coefficients)), freedom)]


@dataclass(frozen=True)
class Composite:
    """The mean of several scores, each in units of its own spread between seeds.

    Where no cell has two runs there is no such spread, and the unit is the spread between the cells: enough for a look.
    """

    name: str
    parts: Sequence[Score]

    @cached_property
    def _scales(self) -> list[float]:
        if any(len(cell) > 1 for cell in self.parts[0].run_means):
            spreads = [math.sqrt(pooled_variance(part.run_means)[0]) for part in self.parts]
        else:
            spreads = [float(np.std([cell.mean() for cell in part.run_means])) for part in self.parts]
        return [1.0 / spread / len(self.parts) if spread > 0 else 0.0 for spread in spreads]

    @cached_property
    def run_means(self) -> list[NDArray[np.float64]]:
        """Of each cell, the mean over the parts of each run."""
        scaled = [
            [scale * cell for cell in part.run_means] for scale, part in zip(self._scales, self.parts, strict=True)
        ]
        return [np.sum(cells, axis=0) for cells in zip(*scaled, strict=True)]

    def item_variances(self, coefficients: NDArray[np.float64]) -> list[tuple[float, float]]:
        """Items of different parts are drawn independently, so their variances add."""
        return [
            (scale**2 * variance, freedom)
            for scale, part in zip(self._scales, self.parts, strict=True)
            for variance, freedom in part.item_variances(coefficients)
        ]


def pooled_variance(cells: Sequence[NDArray[np.float64]]) -> tuple[float, int]:
    """Variance of runs around their cell's mean, and its degrees of freedom."""
    freedom = sum(len(cell) - 1 for cell in cells)
    squares = sum(float(((cell - cell.mean()) ** 2).sum()) for cell in cells)
    return (squares / freedom if freedom else 0.0), freedom


def contrast(score: Score, coefficients: NDArray[np.float64]) -> Estimate:
    """Estimate `sum_c coefficients[c] * mean_c`."""
    cells = score.run_means
    variance, freedom = pooled_variance(cells)
    value = float(sum(k * cell.mean() for k, cell in zip(coefficients, cells, strict=True)))
    of_runs = variance * float(sum(k**2 / len(cell) for k, cell in zip(coefficients, cells, strict=True)))
    parts = [(of_runs, float(freedom)), *score.item_variances(coefficients)]
    return Estimate(value, math.sqrt(sum(part for part, _ in parts)), _freedom(parts) if freedom else 0.0)


def _freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Welch's and Satterthwaite's degrees of freedom of a sum of variances, each with its own."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return parts[0][1]
    # as shares, because the square of a tiny variance is zero
    return 1.0 / sum((variance / total) ** 2 / freedom for variance, freedom in parts)


def mean_estimate(score: Score, cell: int) -> Estimate:
    """A cell's mean with the error that other seeds would make; the items are taken as they are."""
    cells = score.run_means
    variance, freedom = pooled_variance(cells)
    return Estimate(float(cells[cell].mean()), math.sqrt(variance / len(cells[cell])), float(freedom))


def variance_ratio(score: Score) -> float:
    """Largest over smallest variance between the runs of a cell; NaN when a cell has one run or no variance."""
    variances = [float(cell.var(ddof=1)) for cell in score.run_means if len(cell) > 1]
    return max(variances) / min(variances) if variances and min(variances) > 0 else math.nan


def variance_ratio_bound(counts: Sequence[int], confidence: float = 0.95, draws: int = 20_000) -> float:
    """What `variance_ratio` stays below with this confidence when all cells have one variance (Hartley), simulated.

    Args:
        counts: Runs of each cell; a cell of one run has no variance.
        confidence: As a share.
        draws: Simulated studies; the generator's seed is fixed, so the bound repeats exactly.
    """
    freedoms = np.array([count - 1 for count in counts if count > 1])
    if len(freedoms) < 2:
        return math.nan
    variances = np.random.default_rng(0).chisquare(freedoms, size=(draws, len(freedoms))) / freedoms
    return float(np.quantile(variances.max(axis=1) / variances.min(axis=1), confidence))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values: rejecting those up to a level keeps the chance of any false one below it."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for position, index in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def student_t_cdf(value: float, freedom: float) -> float:
    """Distribution function of Student's t."""
    return float(stdtr(freedom, value))


def student_t_quantile(probability: float, freedom: float) -> float:
    """The value below which Student's t lies with this probability."""
    return float(stdtrit(freedom, probability))
