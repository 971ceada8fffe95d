"""The claims of a study: which scores order quality, which bend, and which slices differ.

docs/quantile-benchmark.md ("What counts as shown") has the design, its reasons and its simulation. In short: one
share of the level goes to the shapes of the sources' curves, the other to pairs of slices. A trend or a bend is claimed
when both the exact permutation of runs and the t test reject, so unequal variances do not make it, and neither do few
held-out documents. Where the seeds of a quantile lie side by side, it has to stand out of the roughness between
quantiles as well. Pairs are
compared with moderated variances against Tukey's range of all means, and must stand on their own two variances too, so
that calm slices lend a wide one no certainty. A capability is asked only what `overall` has
answered, and pays for the number of capabilities.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr
from scipy.stats import rankdata

from megatron_kaiyuan.quantile.rank_tests import range_p_value, rank_permutation_p_value
from megatron_kaiyuan.quantile.statistics import Estimate, Score, combined, contrast, run_contrast, unsteady_cells

__all__ = [
    "LEAST_RUNS",
    "OVERALL",
    "PAIRS_SHARE",
    "SHAPES_SHARE",
    "Design",
    "Pair",
    "Shape",
    "pairs_of",
    "shapes_of",
    "trend_terms",
    "unsteady_of",
]

OVERALL = "overall"
LEAST_RUNS = 3
"""Of a cell in a claimed pair. Two runs lie close together by luck too often to show a slice that spreads widely."""
_SHARES = {"trend": 0.75, "bend": 0.25}
"""Of the level of the shapes: what a study is made for gets more of it."""
SHAPES_SHARE, PAIRS_SHARE = 0.5, 0.35
"""Of the level. The rest is a margin for slices that spread unequally; the page has the simulation."""


@dataclass(frozen=True)
class Design:
    """Where the runs of a study lie."""

    sources: Sequence[str]
    """Of each cell."""
    places: Sequence[NDArray[np.float64]]
    """Of each cell, where the documents of each of its runs lie: from 0, the source's worst document, to 1."""
    spread: bool
    """Whether the runs of a cell lie apart, so that the roughness of a source is in their variance."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Runs of each cell."""
        return np.array([len(cell) for cell in self.places])

    def cells_of(self, source: str) -> list[int]:
        """Numbers of the cells of a source."""
        return [number for number, name in enumerate(self.sources) if name == source]


@dataclass(frozen=True, slots=True)
class Shape:
    """How quality changes along a source's score: a trend, or a bend."""

    source: str
    score: str
    kind: str
    """`trend` or `bend`."""
    estimate: Estimate
    """Of a trend, the rise of the straight line from the worst place to the best; of a bend, the middle above the ends;
    in the score's units."""
    exact: float
    """p-value of the permutation of runs, before any correction."""
    rough: float
    """p-value against the roughness between quantiles; NaN where the runs' variance holds it."""
    adjusted: float
    """The largest of the p-values after correction for all shapes that were tested."""
    claim: str
    """Of a trend `rises` or `falls`, of a bend `peaks` or `dips`; `none`."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two cells compared by one score."""

    score: str
    first: int
    second: int
    estimate: Estimate
    """Of the first less the second."""
    seeds_won: float
    """Share of the pairs of runs, one of each, in which the first is better."""
    adjusted: float
    claim: str
    """`first`, `second` or `none`: which is better."""


_NAMES = {"trend": ("rises", "falls"), "bend": ("peaks", "dips")}


def shapes_of(design: Design, scores: Mapping[str, Score], level: float) -> tuple[Shape, ...]:
    """Test a trend and a bend of each source by each score."""
    tested = [
        (source, kind, coefficients)
        for source in dict.fromkeys(design.sources)
        for kind, make in _COEFFICIENTS.items()
        if (coefficients := make(design, source)) is not None
    ]
    counts = Counter(kind for _, kind, _ in tested)
    shares = {kind: _SHARES[kind] / sum(_SHARES[other] for other in counts) for kind in counts}
    found: list[Shape] = []
    for name, score in scores.items():
        for source, kind, coefficients in tested:
            shape = _shape(design, score, source, kind, coefficients)
            factor = counts[kind] / shares[kind] * (1 if name == OVERALL else len(scores) - 1)
            found.append(replace(shape, score=name, adjusted=min(1.0, shape.adjusted * factor)))
    parents = {(shape.source, shape.kind): shape.adjusted for shape in found if shape.score == OVERALL}
    gated = [replace(one, adjusted=max(one.adjusted, parents[one.source, one.kind])) for one in found]
    return tuple(
        replace(shape, claim=_claim(shape.estimate, shape.adjusted, level, _NAMES[shape.kind])) for shape in gated
    )


def _around_the_line(
    score: Score, coefficients: NDArray[np.float64], inside: NDArray[np.bool_], along: NDArray[np.float64], kind: str
) -> Estimate:
    """Estimate a shape with the variance of the source's runs around their line, or their parabola for a bend.

    Runs of a cell that lie apart differ by the shape itself, so their variance around the cell's mean is too large.
    """
    values = np.concatenate(score.run_means)
    places = along[inside] if kind == "trend" else rankdata(along[inside])
    powers = np.stack([(places - places.mean()) ** power for power in range(2 if kind == "trend" else 3)], axis=1)
    rest = values[inside] - powers @ np.linalg.lstsq(powers, values[inside], rcond=None)[0]
    freedom = len(places) - powers.shape[1]
    if freedom < 1:
        return Estimate(float(coefficients @ values), math.nan, 0.0)
    of_runs = float((rest**2).sum()) / freedom * float((coefficients**2).sum())
    return combined(float(coefficients @ values), [(of_runs, float(freedom)), *score.item_variances(coefficients)])


def trend_terms(design: Design) -> list[tuple[NDArray[np.float64], float]]:
    """Return, of each source with a trend, the coefficients of the runs and its share of the level by `overall`."""
    found = [one for source in dict.fromkeys(design.sources) if (one := _trend(design, source)) is not None]
    bends = any(_bend(design, source) is not None for source in dict.fromkeys(design.sources))
    share = SHAPES_SHARE * (_SHARES["trend"] if bends else 1.0)
    return [(coefficients, share / len(found)) for coefficients in found]


def _shape(design: Design, score: Score, source: str, kind: str, coefficients: NDArray[np.float64]) -> Shape:
    inside, along = _along(design, source)
    estimate = run_contrast(score, coefficients)
    if design.spread and estimate.freedom > 0:
        estimate = _around_the_line(score, coefficients, inside, along, kind)
    exact = rank_permutation_p_value(np.concatenate(score.run_means)[inside], coefficients[inside])
    rough = math.nan if design.spread else _roughness_p_value(design, score, kind, coefficients, estimate.value)
    worst = max(value for value in (exact, estimate.p_value, rough) if not math.isnan(value))
    return Shape(source, OVERALL, kind, estimate, exact, rough, worst, "none")


def _trend(design: Design, source: str) -> NDArray[np.float64] | None:
    """Coefficients of the runs for the rise from the worst to the best place of a source, by least squares."""
    inside, along = _along(design, source)
    if len(design.cells_of(source)) < 2:
        return None
    centred = np.where(inside, along - along[inside].mean(), 0.0)
    return np.asarray(centred / (centred**2).sum() * np.ptp(along[inside]), dtype=np.float64)


def _bend(design: Design, source: str) -> NDArray[np.float64] | None:
    """Return the coefficients for the middle of a source above its ends.

    They give 0 for every straight line over the order of places.
    """
    inside, along = _along(design, source)
    if len(design.cells_of(source)) < 3:
        return None
    order = rankdata(along[inside])
    centred = order - order.mean()
    rows = np.stack([np.ones_like(centred), centred])
    square = centred**2
    rest = square - rows.T @ np.linalg.lstsq(rows.T, square, rcond=None)[0]
    found = np.zeros(len(along))
    found[inside] = -rest / rest[rest > 0].sum()
    return found


_COEFFICIENTS: dict[str, Callable[[Design, str], NDArray[np.float64] | None]] = {"trend": _trend, "bend": _bend}


def _along(design: Design, source: str) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of all runs: whether they are of this source, and where they lie."""
    inside = np.repeat([name == source for name in design.sources], design.counts)
    return inside, np.concatenate(list(design.places))


def _roughness_p_value(
    design: Design, score: Score, kind: str, coefficients: NDArray[np.float64], value: float
) -> float:
    """Return the p-value against the roughness: quantiles' deviations from a line, or from a parabola for a bend.

    A t test; the deviations are pooled over the sources. They hold the noise of runs and items as well, so the test
    stands by itself. Where none is left nothing is known of the roughness, and nothing can be claimed.
    """
    means = np.array([float(cell.mean()) for cell in score.run_means])
    degree = 1 if kind == "trend" else 2
    squares, freedom = 0.0, 0
    for source in dict.fromkeys(design.sources):
        cells = design.cells_of(source)
        if len(cells) > degree + 1:
            places = np.array([float(design.places[cell].mean()) for cell in cells])
            powers = np.stack([(places - places.mean()) ** power for power in range(degree + 1)], axis=1)
            rest = means[cells] - powers @ np.linalg.lstsq(powers, means[cells], rcond=None)[0]
            squares, freedom = squares + float((rest**2).sum()), freedom + len(cells) - degree - 1
    if freedom == 0:
        return 1.0
    starts = np.cumsum(design.counts) - design.counts
    of_cells = np.add.reduceat(coefficients, starts)
    error = math.sqrt(squares / freedom * float((of_cells**2).sum()))
    return 1.0 if error == 0 else float(2 * stdtr(freedom, -abs(value) / error))


def unsteady_of(scores: Mapping[str, Score]) -> dict[str, tuple[int, ...]]:
    """Return the cells about which a score makes no claim: their spread is out of line, or they have too few runs."""
    found = {}
    for name, score in scores.items():
        few = [number for number, cell in enumerate(score.run_means) if len(cell) < LEAST_RUNS]
        found[name] = tuple(sorted({*few, *unsteady_cells(score.run_means)}))
    return found


def pairs_of(scores: Mapping[str, Score], level: float) -> tuple[Pair, ...]:
    """Compare all pairs of cells by each score.

    The range of all means is the price of comparing with the best, because the data choose which one that is. All other
    pairs are free at this price.
    """
    unsteady = unsteady_of(scores)
    found: list[Pair] = []
    parents: dict[tuple[int, int], float] = {}
    for name, score in scores.items():
        factor = 1 if name == OVERALL else len(scores) - 1
        for first, second in combinations(range(len(score.run_means)), 2):
            pair = _pair(score, name, first, second)
            adjusted = min(1.0, factor * pair.adjusted)
            if {first, second} & set(unsteady[name]):
                adjusted = 1.0
            adjusted = max(adjusted, parents.setdefault((first, second), adjusted))
            claim = _claim(pair.estimate, adjusted, level, ("first", "second"))
            found.append(replace(pair, adjusted=adjusted, claim=claim))
    return tuple(found)


def _pair(score: Score, name: str, first: int, second: int) -> Pair:
    cells = score.run_means
    coefficients = np.zeros(len(cells))
    coefficients[first], coefficients[second] = 1.0, -1.0
    estimate = contrast(score, coefficients)
    won = float((cells[first][:, None] > cells[second][None, :]).mean())
    p_value = 1.0
    if estimate.freedom > 0 and estimate.value != 0:
        statistic = estimate.value / estimate.error if estimate.error > 0 else math.inf
        alone = contrast(score, coefficients, alone=True).p_value
        p_value = max(alone, estimate.p_value, range_p_value(statistic, estimate.freedom, len(cells)))
    return Pair(name, first, second, estimate, won, p_value, "none")


def _claim(estimate: Estimate, adjusted: float, level: float, names: tuple[str, str]) -> str:
    if adjusted > level or level == 0:
        return "none"
    return names[0] if estimate.value > 0 else names[1]
