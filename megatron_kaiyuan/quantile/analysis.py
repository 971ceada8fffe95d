"""What the results of a study show: trends, pairs, reversals and ranks, each claim under one bound on false ones.

Claims are made about capabilities: a capability's score is the mean of its held-out sets and tasks, each in units of
its spread between seeds; `overall` is the mean of the capabilities. There are two families of tests, each at half of
the study's level with Holm's correction over the whole family: one trend for each source and score, and one comparison
for each pair of slices and score. So the chance of any false claim in a report is at most the level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.results import RunResult, bits_per_byte
from megatron_kaiyuan.quantile.runs import Run, SlicedStudy
from megatron_kaiyuan.quantile.statistics import (
    Composite,
    Estimate,
    Measure,
    Score,
    contrast,
    holm,
    variance_ratio,
    variance_ratio_bound,
)
from megatron_kaiyuan.quantile.study import Study

__all__ = ["OVERALL", "Analysis", "Cell", "Metric", "Pair", "Trend", "analyse"]

OVERALL = "overall"


@dataclass(frozen=True, slots=True)
class Cell:
    """A source at a quantile: what is compared."""

    source: str
    top: Fraction

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.source} top {float(self.top * 100):g}%"


@dataclass(frozen=True)
class Metric:
    """One number of each run, as it is shown."""

    name: str
    capability: str
    unit: str
    lower_is_better: bool
    decides: bool
    """Whether it is part of its capability's score; the others are only shown."""
    measure: Measure
    """Oriented: higher is better."""

    def shown(self, cell: int) -> NDArray[np.float64]:
        """Values of the runs of a cell as a reader knows them."""
        return self.measure.run_means[cell] * (-1.0 if self.lower_is_better else 1.0)


@dataclass(frozen=True, slots=True)
class Trend:
    """Whether a source's score orders its slices."""

    source: str
    score: str
    estimate: Estimate
    """Rise of the straight line from the worst quantile to the best, in the score's units."""
    adjusted: float
    """p-value after Holm's correction over all trends."""
    claim: str
    """`rises`, `falls` or `none`."""


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


@dataclass(frozen=True)
class Analysis:
    """Everything that a report says, before it is words."""

    cells: tuple[Cell, ...]
    reaches: tuple[tuple[Fraction, Fraction], ...]
    """Of each cell, from where to where the documents of its runs lie, as fractions from the best document.

    Not around its nominal quantile at the ends, where a slice is moved inwards.
    """
    seeds: tuple[int, ...]
    """Runs of each cell."""
    metrics: tuple[Metric, ...]
    scores: Mapping[str, Score]
    """`overall` first, then capabilities."""
    trends: tuple[Trend, ...]
    pairs: tuple[Pair, ...]
    refusals: tuple[str, ...]
    """Why some or all conclusions are not drawn."""
    warnings: tuple[str, ...]
    level: float

    @cached_property
    def _by_cells(self) -> dict[tuple[str, int, int], Pair]:
        return {(pair.score, pair.first, pair.second): pair for pair in self.pairs}

    @property
    def unit(self) -> str:
        """Of all scores."""
        return "seed spreads" if max(self.seeds) > 1 else "spreads between slices"

    @property
    def places(self) -> list[float]:
        """Of each cell, the middle of its documents, from 0 (the worst document) to 1 (the best)."""
        return _places(self.reaches)

    def pair(self, score: str, first: int, second: int) -> Pair:
        """The comparison of two cells, in whichever order it was made."""
        return self._by_cells.get((score, first, second)) or self._by_cells[(score, second, first)]

    def probability(self, score: str, first: int, second: int) -> float:
        """Probability that one cell is better than another."""
        if first == second:
            return 0.5
        return self.difference(score, first, second).probability_positive

    def difference(self, score: str, first: int, second: int) -> Estimate:
        """Estimate of the first cell less the second."""
        pair = self.pair(score, first, second)
        sign = 1.0 if pair.first == first else -1.0
        return Estimate(sign * pair.estimate.value, pair.estimate.error, pair.estimate.freedom)

    def claimed_better(self, score: str, first: int, second: int) -> bool:
        """Whether one cell is claimed to be better than another."""
        if first == second:
            return False
        pair = self.pair(score, first, second)
        return pair.claim == ("first" if pair.first == first else "second")

    def ranking(self, score: str) -> list[int]:
        """Cells from best to worst mean."""
        means = [float(runs.mean()) for runs in self.scores[score].run_means]
        return sorted(range(len(self.cells)), key=lambda cell: -means[cell])

    def rank_range(self, score: str, cell: int) -> tuple[int, int]:
        """Ranks that the claims leave open: all of them hold at once with the study's confidence."""
        others = [other for other in range(len(self.cells)) if other != cell]
        better = sum(self.claimed_better(score, other, cell) for other in others)
        worse = sum(self.claimed_better(score, cell, other) for other in others)
        return 1 + better, len(self.cells) - worse

    def reversals(self, score: str) -> list[tuple[int, int, bool]]:
        """(better-scored cell, worse-scored cell that did better, claimed), within a source.

        Neighbouring quantiles whose means are reversed are listed even when it may be chance; others only when claimed.
        """
        found = []
        means = [float(runs.mean()) for runs in self.scores[score].run_means]
        for upper, lower in combinations(range(len(self.cells)), 2):
            if self.cells[upper].source != self.cells[lower].source:
                continue
            claimed = self.claimed_better(score, lower, upper)
            if claimed or (lower == upper + 1 and means[lower] > means[upper]):
                found.append((upper, lower, claimed))
        return found

    def trend(self, source: str, score: str) -> Trend | None:
        """The trend of a source, None where none is tested."""
        return next((trend for trend in self.trends if (trend.source, trend.score) == (source, score)), None)


def analyse(study: Study, sliced: SlicedStudy, results: Mapping[str, RunResult]) -> Analysis:
    """Compare all cells of a study.

    Args:
        study: The study.
        sliced: What `slice` wrote.
        results: By run name; they compare (see `check_comparable`).

    Raises:
        StudyError: fewer than two cells have results.
    """
    groups = _group(sliced.runs, results)
    if len(groups) < 2:
        raise StudyError("fewer than two slices have results; there is nothing to compare")
    cells = tuple(groups)
    reaches = tuple(_reach(runs) for runs in groups.values())
    metrics = _metrics(study, [[results[run.name] for run in runs] for runs in groups.values()])
    scores = _scores(metrics)
    seeds = tuple(len(runs) for runs in groups.values())
    refusals = _refusals(study, seeds)
    conclude = min(seeds) >= 2
    trends = _trends(study, cells, _places(reaches), scores) if conclude and study.slices.documents == "own" else ()
    pairs = _pairs(cells, scores, study.level / 2 if conclude else 0.0)
    warnings = (*_warnings(study, sliced, seeds, results), *_uneven_spreads(scores, seeds))
    return Analysis(cells, reaches, seeds, metrics, scores, trends, pairs, refusals, warnings, study.level)


def _uneven_spreads(scores: Mapping[str, Score], seeds: Sequence[int]) -> list[str]:
    """Scores whose spread between seeds differs between slices by more than chance."""
    bound = variance_ratio_bound(seeds)
    return [
        f"{name}: the variance between seeds differs {ratio:.3g}-fold between slices, by chance at most "
        f"{bound:.3g}-fold in 95 % of studies; the claims pool it, so those about the slices that spread most are made "
        "too easily."
        for name, score in scores.items()
        if (ratio := variance_ratio(score)) > bound
    ]


def _group(runs: Sequence[Run], results: Mapping[str, RunResult]) -> dict[Cell, list[Run]]:
    groups: dict[Cell, list[Run]] = {}
    for run in runs:
        if run.name in results:
            groups.setdefault(Cell(run.source, Fraction(str(run.top))), []).append(run)
    return groups


def _reach(runs: Sequence[Run]) -> tuple[Fraction, Fraction]:
    ends = [run.reach for run in runs]
    return min(best for best, _ in ends), max(worst for _, worst in ends)


def _places(reaches: Sequence[tuple[Fraction, Fraction]]) -> list[float]:
    return [float(1 - (best + worst) / 2) for best, worst in reaches]


def _metrics(study: Study, cells: Sequence[Sequence[RunResult]]) -> tuple[Metric, ...]:
    first = cells[0][0]
    metrics = [_held_out_metric(study, name, cells) for name in first.held_out]
    for task in first.tasks:
        capability = study.evaluation.capability_of(task)
        bits = [np.array([result.tasks[task].answer_bits_per_byte for result in runs]) for runs in cells]
        weights = np.ones(bits[0].shape[1])
        measure = Measure(task, [-cell for cell in bits], weights)
        metrics.append(Metric(f"{task}: bits per byte of the answer", capability, "bits/byte", True, True, measure))
        for metric in first.tasks[task].metrics:
            values = [np.array([result.tasks[task].metrics[metric] for result in runs]) for runs in cells]
            name = f"{task}: {metric.replace('_', ' ')}"
            metrics.append(Metric(name, capability, metric, False, False, Measure(name, values, weights)))
    return tuple(metrics)


def _held_out_metric(study: Study, name: str, cells: Sequence[Sequence[RunResult]]) -> Metric:
    pairs = [[bits_per_byte(result.held_out[name]) for result in runs] for runs in cells]
    weights = pairs[0][0][1]
    values = [-np.stack([value for value, _ in runs]) for runs in pairs]
    unit = "bits/byte" if sum(cells[0][0].held_out[name].bytes) else "bits/token"
    title = f"{name}: bits per {unit.removeprefix('bits/')} of held-out text"
    return Metric(title, study.evaluation.capability_of(name), unit, True, True, Measure(name, values, weights))


def _scores(metrics: Sequence[Metric]) -> dict[str, Score]:
    """`overall` and the capabilities; with one capability, `overall` alone."""
    capabilities = list(dict.fromkeys(metric.capability for metric in metrics if metric.decides))
    parts = {
        name: Composite(name, [metric.measure for metric in metrics if metric.decides and metric.capability == name])
        for name in capabilities
    }
    if len(parts) == 1:
        return {OVERALL: next(iter(parts.values()))}
    return {OVERALL: Composite(OVERALL, list(parts.values())), **parts}


def _trends(
    study: Study, cells: Sequence[Cell], places: Sequence[float], scores: Mapping[str, Score]
) -> tuple[Trend, ...]:
    tested = [
        (source, name, contrast(score, coefficients))
        for source in study.sources
        if (coefficients := _slope(cells, places, source)) is not None
        for name, score in scores.items()
    ]
    adjusted = holm([estimate.p_value for _, _, estimate in tested])
    return tuple(
        Trend(source, name, estimate, p, _claim(estimate, p, study.level / 2, ("rises", "falls")))
        for (source, name, estimate), p in zip(tested, adjusted, strict=True)
    )


def _slope(cells: Sequence[Cell], places: Sequence[float], source: str) -> NDArray[np.float64] | None:
    """Coefficients of the rise from the worst to the best quantile of a source, by least squares."""
    inside = np.array([cell.source == source for cell in cells])
    along = np.array(places)
    if inside.sum() < 2:
        return None
    centred = np.where(inside, along - along[inside].mean(), 0.0)
    return np.asarray(centred / (centred**2).sum() * np.ptp(along[inside]), dtype=np.float64)


def _pairs(cells: Sequence[Cell], scores: Mapping[str, Score], level: float) -> tuple[Pair, ...]:
    tested = []
    for name, score in scores.items():
        for first, second in combinations(range(len(cells)), 2):
            coefficients = np.zeros(len(cells))
            coefficients[first], coefficients[second] = 1.0, -1.0
            won = float((score.run_means[first][:, None] > score.run_means[second][None, :]).mean())
            tested.append((name, first, second, contrast(score, coefficients), won))
    adjusted = holm([estimate.p_value for *_, estimate, _ in tested])
    return tuple(
        Pair(name, first, second, estimate, won, p, _claim(estimate, p, level, ("first", "second")))
        for (name, first, second, estimate, won), p in zip(tested, adjusted, strict=True)
    )


def _claim(estimate: Estimate, adjusted: float, level: float, names: tuple[str, str]) -> str:
    if adjusted > level or level == 0:
        return "none"
    return names[0] if estimate.value > 0 else names[1]


def _refusals(study: Study, seeds: Sequence[int]) -> tuple[str, ...]:
    found = []
    if min(seeds) < 2:
        found.append(
            "No conclusion is drawn: a slice with one seed has no spread to compare a difference with. Train at least "
            "two seeds of each, better three."
        )
    if study.slices.documents == "shared":
        found.append(
            "Nothing is said about scores as such: all seeds share the documents of a slice, so the luck of these "
            "documents cannot be told from their score. Comparisons are of these very documents. slices.documents: own "
            "would tell."
        )
    return tuple(found)


def _warnings(
    study: Study, sliced: SlicedStudy, seeds: Sequence[int], results: Mapping[str, RunResult]
) -> tuple[str, ...]:
    found = []
    if len(results) < len(sliced.runs):
        found.append(f"Incomplete: {len(results)} of {len(sliced.runs)} runs have results.")
    if min(seeds) == 2:
        found.append("Two seeds a slice: the spread between seeds is known poorly; three or more make claims likelier.")
    failed = {task: reason for result in results.values() for task, reason in result.not_evaluated.items()}
    found += [f"Task {task} was not evaluated: {reason}" for task, reason in failed.items()]
    some = next(iter(results.values()))
    for name, held_out in some.held_out.items():
        if not sum(held_out.bytes):
            found.append(
                f"The bytes of the tokens of {name} are unknown: its losses are bits per token, of this tokenizer only."
            )
    found += sliced.warnings
    if study.slices.documents == "own" and study.budget > study.slices.tokens:
        found.append(f"Each slice was seen {study.budget / study.slices.tokens:.3g} times.")
    return tuple(found)
