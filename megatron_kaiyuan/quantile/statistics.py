"""Differences between slices with two sources of error, runs and held-out items, and Holm's correction.

A measurement is `x[c, r, i]`: cell c (a slice), run r (a seed of it), item i (a held-out document or a task's
question). Runs are drawn anew in each cell, items are the same in all. For a contrast `D = sum_r k_r mean_i x[r, i]` of
the runs, which is one of the cells where the runs of a cell share its coefficient,

    var(D) = sum_r k_r^2 v_c(r)  +  max(0, var_g(d) - var_g(e))

The first part is the runs'. `v_c` is the cell's own variance drawn towards that of all cells, as in empirical Bayes
(Smyth, Stat. Appl. Genet. Mol. Biol. 3, 2004): `(d0 v0 + d_c s_c^2) / (d0 + d_c)` with `d0 + d_c` degrees of freedom.
Smyth estimates d0 from thousands of genes. A study has ten slices with two degrees of freedom each, which cannot
determine it, and an estimate that is too large makes false claims (docs/quantile-benchmark.md has the simulation). So
d0 is d_c, and never more than 2.

The second part is the items'. `d_g` are sums over a group of items of the paired differences, with their shares. The
noise between a run and an item is in `d` and also in the variance of the runs, so it is estimated (`e`: what is left of
a cell after its runs' and its items' means) and subtracted, as in the analysis of variance of a crossed design. Items
of one group, such as the files of one package, count as one draw (Liang and Zeger, Biometrika 73, 1986).

`D / sd(D)` is compared with Student's t. All parts are estimates, so the degrees of freedom are those of their sum
(Welch; Satterthwaite, Biometrics Bulletin 2, 1946): `(sum_p v_p)^2 / sum_p v_p^2 / f_p`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, fdtri, stdtr, stdtrit

__all__ = [
    "Composite",
    "Estimate",
    "Measure",
    "Score",
    "combined",
    "contrast",
    "holm",
    "mean_estimate",
    "moderated_variances",
    "own_variances",
    "pooled_variance",
    "run_contrast",
    "student_t_cdf",
    "student_t_quantile",
    "typical_variance",
    "unsteady_cells",
    "variance_ratio",
    "variance_ratio_bound",
]


_PRIOR_FREEDOM = 2.0
"""Most that the typical variance weighs beside a cell's own, in degrees of freedom: as much as three seeds."""
_EXTREME = 1e-4
_ROUNDING = 1e-9
"""Spread between runs, relative to their size, that is arithmetic and not a difference between models."""


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
        """Return the two-sided p-value, 1 when there are no degrees of freedom."""
        if self.freedom <= 0:
            return 1.0
        positive = self.probability_positive
        return 2.0 * min(positive, 1.0 - positive)

    def half_width(self, confidence: float) -> float:
        """Return half the width of the confidence interval, NaN without degrees of freedom."""
        if self.freedom <= 0:
            return math.nan
        return self.error * student_t_quantile(0.5 + confidence / 2, self.freedom)


class Score(Protocol):
    """A quantity that cells are compared by, higher being better."""

    @property
    def run_means(self) -> list[NDArray[np.float64]]:
        """Of each cell, the value of each of its runs."""

    @property
    def variances(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each cell, the moderated variance of its runs and its degrees of freedom."""

    def item_variances(self, coefficients: NDArray[np.float64]) -> list[tuple[float, float]]:
        """Independent parts of the variance of a contrast of runs that come from the choice of items, with freedoms."""


@dataclass(frozen=True)
class Measure:
    """One metric, item by item."""

    name: str
    values: Sequence[NDArray[np.float64]]
    """Of each cell `[runs, items]`, oriented so that higher is better."""
    weights: NDArray[np.float64]
    """Of the items, `[items]`; the value of a run is the weighted mean."""
    groups: NDArray[np.int64] | None = None
    """Of the items, `[items]`: those with one number are one draw; None: each item is."""

    @cached_property
    def run_means(self) -> list[NDArray[np.float64]]:
        """Of each cell, the weighted mean of each run, `[runs]`."""
        return [cell @ self._share for cell in self.values]

    @cached_property
    def variances(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each cell, the moderated variance of its runs and its degrees of freedom."""
        return moderated_variances(self.run_means)

    @property
    def steady(self) -> bool:
        """Return whether some runs of one cell differ by more than rounding.

        If none do, there is no spread to measure by.
        """
        size = max(float(np.abs(cell).max()) for cell in self.run_means)
        return any(len(cell) > 1 and float(np.ptp(cell)) > _ROUNDING * size for cell in self.run_means)

    @cached_property
    def _share(self) -> NDArray[np.float64]:
        return np.asarray(self.weights / self.weights.sum(), dtype=np.float64)

    @cached_property
    def _membership(self) -> NDArray[np.float64]:
        """Shares of the items in the columns of their groups, `[items, groups]`."""
        some = np.flatnonzero(self._share > 0)
        groups = np.arange(len(self._share)) if self.groups is None else self.groups
        numbers = np.unique(groups[some], return_inverse=True)[1]
        table = np.zeros((len(self._share), int(numbers.max()) + 1))
        table[some, numbers] = self._share[some]
        return table

    @cached_property
    def _correction(self) -> float:
        """What squares around the sample's own mean are too small by: `1 - 1 / m` where all groups are equal."""
        share = self._membership.sum(axis=0)
        squares = (share**2).sum()
        return float(1 + squares - 2 * (share**3).sum() / squares)

    @cached_property
    def _item_covariance(self) -> NDArray[np.float64]:
        """Return the covariance of the runs' weighted means over the choice of items, `[runs, runs]`.

        There is one for all contrasts.
        """
        runs = np.concatenate(list(self.values))
        sums = (runs - (runs @ self._share)[:, None]) @ self._membership
        return np.asarray(sums @ sums.T / self._correction, dtype=np.float64)

    @cached_property
    def _shared_noise(self) -> NDArray[np.float64]:
        """Variance of each run's mean that its cell's spread and the items' covariance both contain, `[runs]`."""
        return np.concatenate([np.full(len(cell), self._noise_of(cell)) for cell in self.values])

    def _noise_of(self, cell: NDArray[np.float64]) -> float:
        if len(cell) < 2:
            return 0.0
        rest = cell - cell.mean(axis=0)
        sums = (rest - (rest @ self._share)[:, None]) @ self._membership
        return float((sums**2).sum()) / self._correction / (len(cell) - 1)

    def item_variances(self, coefficients: NDArray[np.float64]) -> list[tuple[float, float]]:
        """Return variances of the weighted mean of the per-item contrasts (ratio estimator, Cochran 1977).

        None of them for a single group.
        """
        share = self._membership.sum(axis=0)
        if len(share) < 2:
            return []
        both = float(coefficients @ self._item_covariance @ coefficients)
        twice = float(coefficients**2 @ self._shared_noise)
        return [(max(0.0, both - twice), float(1 / (share**2).sum()) - 1)]


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
            spreads = [math.sqrt(typical_variance(part.run_means)[0]) for part in self.parts]
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

    @cached_property
    def variances(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each cell, the moderated variance of its runs and its degrees of freedom."""
        return moderated_variances(self.run_means)

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


def typical_variance(cells: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Return the variance that a cell's own is drawn towards, and its degrees of freedom.

    The pooled variance of all cells but those that are far out of line (1 in 10 000 by chance): one wild slice must not
    blind a study, and a moderately wild one must make it careful.
    """
    extreme = set(unsteady_cells(cells, _EXTREME))
    variance, freedom = pooled_variance([cell for number, cell in enumerate(cells) if number not in extreme])
    return variance, float(freedom)


def unsteady_cells(cells: Sequence[NDArray[np.float64]], level: float = 0.05) -> list[int]:
    """Return the cells whose runs spread more than those of the others by more than chance.

    Args:
        cells: Values of the runs of each cell.
        level: Chance of each cell to be listed where all spread alike. F test against the median of the variances,
            which half of the cells cannot move.
    """
    freedoms = np.array([len(cell) - 1 for cell in cells], dtype=np.float64)
    several = np.flatnonzero(freedoms > 0).tolist()
    if len(several) < 3:
        return []
    own = np.array([float(cells[number].var(ddof=1)) for number in several])
    degrees = freedoms[several]
    middle = float(np.median(own / (chdtri(degrees, 0.5) / degrees)))
    bounds = middle * fdtri(degrees, degrees.sum() - degrees, 1 - level)
    return [int(number) for number, variance, bound in zip(several, own, bounds, strict=True) if variance > bound]


def moderated_variances(cells: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the variance of the runs of each cell, drawn towards the typical one, and its degrees of freedom."""
    typical, of_typical = typical_variance(cells)
    freedoms = np.array([len(cell) - 1 for cell in cells], dtype=np.float64)
    weights = np.minimum(np.where(freedoms > 0, np.minimum(freedoms, _PRIOR_FREEDOM), 1.0), of_typical)
    own, _ = own_variances(cells)
    total = np.maximum(weights + freedoms, np.finfo(float).tiny)
    return (weights * typical + freedoms * own) / total, weights + freedoms


def own_variances(cells: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the variance of the runs of each cell and its degrees of freedom, 0 and 0 for one run."""
    own = np.array([float(cell.var(ddof=1)) if len(cell) > 1 else 0.0 for cell in cells])
    return own, np.array([len(cell) - 1 for cell in cells], dtype=np.float64)


def contrast(score: Score, coefficients: NDArray[np.float64], *, alone: bool = False) -> Estimate:
    """Estimate `sum_c coefficients[c] * mean_c`, a contrast of the cells.

    With `alone` each cell has its own variance, without help from the others (Welch).
    """
    counts = [len(cell) for cell in score.run_means]
    return run_contrast(score, np.repeat(coefficients / np.array(counts), counts), alone=alone)


def run_contrast(score: Score, coefficients: NDArray[np.float64], *, alone: bool = False) -> Estimate:
    """Estimate `sum_r coefficients[r] * mean_r` over all runs, cell after cell."""
    cells = score.run_means
    counts = np.array([len(cell) for cell in cells])
    value = float(coefficients @ np.concatenate(cells))
    of_items = score.item_variances(coefficients)
    total = float((counts - 1).sum())
    if total == 0:
        return Estimate(value, math.sqrt(sum(part for part, _ in of_items)), 0.0)
    variances, freedoms = own_variances(cells) if alone else score.variances
    squares = np.add.reduceat(coefficients**2, np.cumsum(counts) - counts)
    of_runs = list(zip((squares * variances).tolist(), freedoms.tolist(), strict=True))
    runs = (sum(part for part, _ in of_runs), min(total, _freedom(of_runs)))
    return combined(value, [runs, *of_items])


def combined(value: float, parts: Sequence[tuple[float, float]]) -> Estimate:
    """Return an estimate whose variance is the sum of these, each with its degrees of freedom."""
    return Estimate(value, math.sqrt(sum(part for part, _ in parts)), _freedom(parts))


def _freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Welch's and Satterthwaite's degrees of freedom of a sum of variances, each with its own."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return parts[0][1]
    # as shares, because the square of a tiny variance is zero
    return 1.0 / sum((variance / total) ** 2 / freedom for variance, freedom in parts if variance > 0)


def mean_estimate(score: Score, cell: int) -> Estimate:
    """Return a cell's mean with the error that other seeds would make.

    The items are taken as they are.
    """
    cells = score.run_means
    variances, freedoms = score.variances
    several = any(len(one) > 1 for one in cells)
    error = math.sqrt(float(variances[cell]) / len(cells[cell]))
    return Estimate(float(cells[cell].mean()), error, float(freedoms[cell]) if several else 0.0)


def variance_ratio(score: Score) -> float:
    """Return the largest over the smallest variance between the runs of a cell.

    NaN when a cell has one run or no variance.
    """
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
