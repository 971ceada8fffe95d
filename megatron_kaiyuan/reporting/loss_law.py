"""The multi-power law: the loss of a run as a function of its learning rates, fitted to the curves of other runs.

Luo et al., arXiv 2503.12811. With `S(t)` the sum of the rates after the warm-up, `S_w` that of the warm-up and
`S_k(t)` the sum from step k to t,

    L(t) = L0 + A (S(t) + S_w)^-alpha - B sum_k (r_(k-1) - r_k) (1 - (C r_k^-gamma S_k(t) + 1)^-beta)

Rates are in units of the highest one, and sums in units of the largest sum of the fitted curves, so that all parameters
are of order one. Steps are of equal size: the curves share their batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

__all__ = ["Curve", "Law", "fit_law"]

_PARTS = 250
"""Pieces that a schedule is cut into; the fall of the rate within one counts at its middle."""
_POINTS = 60
"""Of a curve, spaced evenly in the logarithm of the step: losses between two are averaged."""
_LEAST_RATE = 1e-4
"""Of the highest; the law has a negative power of the rate, and a schedule may end at 0."""
_STARTS = ((0.5, 0.3, 1.0, 0.5), (0.3, 0.1, 10.0, 0.3), (0.8, 0.5, 0.3, 1.0))
"""Of alpha, B, C and beta, from which the fit begins; the best of them counts."""
_LOWEST = (1e-3, 1e-3, 0.05, 1e-4, 0.01, 0.05, 0.05)
_HIGHEST = (20.0, 20.0, 2.0, 10.0, 1e3, 3.0, 2.0)
"""Of all parameters. Few curves leave a valley of equally good fits, and its ends are no laws."""


@dataclass(frozen=True)
class Curve:
    """A run's rates, and its losses where they are known."""

    name: str
    rates: NDArray[np.float64]
    """Of each step from the first on, `[steps]`."""
    steps: NDArray[np.int64]
    """Steps with a loss, ascending, from 1; none of a run that is only planned."""
    losses: NDArray[np.float64]
    """Nats a token, as many."""

    @property
    def warm_up(self) -> int:
        """Steps before the highest rate is reached."""
        return int(np.argmax(self.rates >= self.rates.max() * (1 - 1e-6)))

    @property
    def sum_of_rates(self) -> float:
        """Sum of the rates of all steps."""
        return float(self.rates.sum())

    def averaged(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return steps after the warm-up with mean log losses around them, evenly spaced in the logarithm."""
        after = self.steps > self.warm_up + 1
        steps, logs = self.steps[after], np.log(self.losses[after])
        place = np.log(steps)
        number = np.minimum(_POINTS - 1, (place - place[0]) / max(np.ptp(place), 1e-9) * _POINTS).astype(np.int64)
        _, inverse, counts = np.unique(number, return_inverse=True, return_counts=True)
        means = [np.bincount(inverse, weights=values) / counts for values in (steps.astype(np.float64), logs)]
        return np.round(means[0]).astype(np.int64), means[1]


@dataclass(frozen=True)
class Law:
    """A fitted law."""

    parameters: NDArray[np.float64]
    """L0, A, alpha, B, C, beta, gamma: `[7]`."""
    peak: float
    """The rate that is 1."""
    unit: float
    """The sum of rates that is 1."""
    curves: tuple[Curve, ...]
    """What it was fitted to."""

    def loss(self, curve: Curve, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the loss at some steps of a schedule, nats a token, `[n]`."""
        return _losses(self.parameters, _terms(curve, steps, self.peak, self.unit))

    def error(self, curve: Curve) -> float:
        """Return the root mean square of the relative difference from a measured curve after its warm-up."""
        steps, logs = curve.averaged()
        return float(np.sqrt(np.mean((np.log(self.loss(curve, steps)) - logs) ** 2)))


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the law needs of a schedule at some steps."""

    sums: NDArray[np.float64]
    """Of all rates up to each step, `[n]`."""
    falls: NDArray[np.float64]
    """By how much the rate falls at each piece, `[pieces]`."""
    rates: NDArray[np.float64]
    """Of the pieces, `[pieces]`."""
    since: NDArray[np.float64]
    """Sum of the rates from each piece to each step, 0 before it, `[n, pieces]`."""


def _terms(curve: Curve, steps: NDArray[np.int64], peak: float, unit: float) -> _Terms:
    rates = curve.rates / peak
    sums = np.concatenate([[0.0], np.cumsum(curve.rates)]) / unit
    edges = np.unique(np.linspace(curve.warm_up, len(rates) - 1, _PARTS + 1).astype(np.int64))
    middles = (edges[:-1] + edges[1:] + 1) // 2
    since = np.maximum(0.0, sums[steps][:, None] - sums[middles][None, :])
    return _Terms(sums[steps], rates[edges[:-1]] - rates[edges[1:]], np.maximum(rates[middles], _LEAST_RATE), since)


def _losses(parameters: NDArray[np.float64], terms: _Terms) -> NDArray[np.float64]:
    floor, height, alpha, gain, speed, beta, gamma = parameters
    shares = 1 - (speed * terms.rates**-gamma * terms.since + 1) ** -beta
    return np.asarray(floor + height * terms.sums**-alpha - gain * shares @ terms.falls, dtype=np.float64)


def fit_law(curves: Sequence[Curve]) -> Law:
    """Fit the law to measured curves: least squares of the relative differences, robust against spikes."""
    peak = max(float(curve.rates.max()) for curve in curves)
    unit = max(curve.sum_of_rates for curve in curves)
    averaged = [curve.averaged() for curve in curves]
    terms = [_terms(curve, steps, peak, unit) for curve, (steps, _) in zip(curves, averaged, strict=True)]
    least = min(float(logs.min()) for _, logs in averaged)
    # the parameters are positive, so the search is in their logarithms

    def rest(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.exp(logs)
        return np.concatenate(
            [
                np.log(np.maximum(_losses(values, own), 1e-3)) - measured
                for own, (_, measured) in zip(terms, averaged, strict=True)
            ]
        )

    fits = []
    for alpha, gain, speed, beta in _STARTS:
        start = np.clip([0.8 * np.exp(least), 0.2 * np.exp(least), alpha, gain, speed, beta, 0.5], _LOWEST, _HIGHEST)
        bounds = (np.log(_LOWEST), np.log(_HIGHEST))
        fits.append(least_squares(rest, np.log(start), bounds=bounds, loss="soft_l1", f_scale=0.01, max_nfev=150))
    best = min(fits, key=lambda fit: float(fit.cost))
    return Law(np.exp(best.x), peak, unit, tuple(curves))
