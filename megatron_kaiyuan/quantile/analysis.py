"""What the results of a study show: trends, bends, pairs, reversals and ranks, claims under one bound on false ones.

A capability's score is the mean of its held-out sets and tasks, each in units of its spread between seeds; `overall` is
the mean of the capabilities. `inference.py` tests, this module prepares its scores and keeps what it says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.quantile.inference import (
    LEAST_RUNS,
    OVERALL,
    PAIRS_SHARE,
    SHAPES_SHARE,
    Design,
    Pair,
    Shape,
    pairs_of,
    shapes_of,
    unsteady_of,
)
from megatron_kaiyuan.quantile.paired import without_trunks
from megatron_kaiyuan.quantile.results import RunResult, bits_per_byte, groups_of
from megatron_kaiyuan.quantile.runs import Run, SlicedStudy
from megatron_kaiyuan.quantile.statistics import Composite, Estimate, Measure, Score
from megatron_kaiyuan.quantile.study import Study

__all__ = ["OVERALL", "Analysis", "Cell", "Metric", "Pair", "Shape", "analyse"]


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


@dataclass(frozen=True)
class Analysis:
    """Everything that a report says, before it is words."""

    cells: tuple[Cell, ...]
    reaches: tuple[tuple[Fraction, Fraction], ...]
    """Of each cell, from where to where the documents of its runs lie, as fractions from the best document.

    Not around its nominal quantile at the ends, where a slice is moved inwards.
    """
    lowest_scores: tuple[float, ...]
    """Of each cell, the lowest score of its documents."""
    seeds: tuple[int, ...]
    """Runs of each cell."""
    metrics: tuple[Metric, ...]
    scores: Mapping[str, Score]
    """`overall` first, then capabilities."""
    design: Design
    trends: tuple[Shape, ...]
    bends: tuple[Shape, ...]
    pairs: tuple[Pair, ...]
    unsteady: Mapping[str, tuple[int, ...]]
    """Of each score, cells whose runs spread out of line or are too few: no pair with them is claimed."""
    refusals: tuple[str, ...]
    """Why some or all conclusions are not drawn."""
    warnings: tuple[str, ...]
    level: float
    controls: tuple[str, ...] = ()
    """Names of further cells, after `cells`, that slices of a branch design are compared with."""
    against_controls: tuple[Pair, ...] = ()
    """Each slice, first, against each control, which are numbered after the slices."""

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
        """Return the estimate of the first cell less the second."""
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

    def trend(self, source: str, score: str) -> Shape | None:
        """Return the trend of a source, None where none is tested."""
        return next((trend for trend in self.trends if (trend.source, trend.score) == (source, score)), None)

    def effects(self, score: str, first: int, second: int) -> dict[str, float]:
        """Return the first cell's mean less the second's by unit, as a reader knows it: bits per byte, accuracy.

        Means over the capabilities of a score, each the mean of its metrics of that unit.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for metric in self.metrics:
            shown = metric.decides or metric.unit == "accuracy"
            if shown and (score not in self.capabilities or metric.capability == score):
                difference = float(metric.shown(first).mean() - metric.shown(second).mean())
                found.setdefault(metric.unit, {}).setdefault(metric.capability, []).append(difference)
        return {
            unit: float(np.mean([np.mean(own) for own in differences.values()])) for unit, differences in found.items()
        }

    @property
    def capabilities(self) -> list[str]:
        """Scores but for `overall`."""
        return [name for name in self.scores if name != OVERALL]


def analyse(study: Study, sliced: SlicedStudy, results: Mapping[str, RunResult]) -> Analysis:
    """Compare all cells of a study.

    Args:
        study: The study.
        sliced: What `slice` wrote.
        results: By run name; they compare (see `check_comparable`).

    Raises:
        StudyError: fewer than two cells have results.
    """
    groups, controls = _group(sliced.runs, results), _control_groups(sliced.runs, results)
    if len(groups) < 2:
        raise StudyError("fewer than two slices have results; there is nothing to compare")
    cells = tuple(groups)
    reaches = tuple(_reach(runs) for runs in groups.values())
    everybody = [*groups.values(), *controls.values()]
    metrics = _metrics(study, [[results[run.name] for run in runs] for runs in everybody])
    if study.design == "branch":
        metrics = _within_trunks(metrics, everybody)
    scores = _scores(metrics)
    seeds = tuple(len(runs) for runs in groups.values())
    refusals = _refusals(study, seeds)
    level = study.level if max(seeds) >= 2 else 0.0
    design = _design(study, [*(cell.source for cell in cells), *controls], everybody)
    pairs = pairs_of(scores, PAIRS_SHARE * level)
    shapes = shapes_of(design, scores, SHAPES_SHARE * level) if level and study.slices.documents != "shared" else ()
    warnings = (*_warnings(study, sliced, seeds, results), *_about_scores(metrics, cells, scores, design, seeds))
    return Analysis(
        cells=cells,
        reaches=reaches,
        lowest_scores=tuple(min(run.score_low for run in runs) for runs in groups.values()),
        seeds=seeds,
        metrics=metrics,
        scores=scores,
        design=design,
        trends=tuple(shape for shape in shapes if shape.kind == "trend"),
        bends=tuple(shape for shape in shapes if shape.kind == "bend"),
        pairs=tuple(pair for pair in pairs if pair.second < len(cells)),
        unsteady=_unsteady_slices(scores, len(cells)) if level else dict.fromkeys(scores, ()),
        refusals=refusals,
        warnings=warnings,
        level=study.level,
        controls=tuple(controls),
        against_controls=tuple(pair for pair in pairs if pair.first < len(cells) <= pair.second),
    )


def _unsteady_slices(scores: Mapping[str, Score], slices: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(cell for cell in cells if cell < slices) for name, cells in unsteady_of(scores).items()}


def _within_trunks(metrics: Sequence[Metric], groups: Sequence[Sequence[Run]]) -> tuple[Metric, ...]:
    """The metrics without what the branches of one trunk share."""
    seeds = [[run.seed for run in runs] for runs in groups]
    return tuple(
        replace(metric, measure=replace(metric.measure, values=without_trunks(metric.measure.values, seeds)))
        for metric in metrics
    )


def _design(study: Study, sources: Sequence[str], groups: Sequence[Sequence[Run]]) -> Design:
    places = [np.array(_places([run.reach for run in runs])) for runs in groups]
    return Design(sources, places, study.slices.documents == "spread")


def _about_scores(
    metrics: Sequence[Metric],
    cells: Sequence[Cell],
    scores: Mapping[str, Score],
    design: Design,
    seeds: Sequence[int],
) -> list[str]:
    """What to beware of in the measures and in the claims about them."""
    if max(seeds) < 2:
        return []
    same = [metric.name for metric in metrics if metric.decides and not metric.measure.steady]
    found = [f"Equal in all seeds, and so without a unit: {', '.join(same)}. Left out of the scores."] if same else []
    for name, numbers in _unsteady_slices(scores, len(cells)).items():
        wild = [cells[number].name for number in numbers if seeds[number] >= LEAST_RUNS]
        if wild:
            found.append(
                f"{name}: the seeds of {', '.join(wild)} spread more than those of the other slices by more than "
                "chance. Nothing is claimed about pairs with such a slice; more seeds of it would tell."
            )
    if not design.spread and min(_quantiles(design)) < 4:
        found.append(
            "With documents: own, the roughness of a source between its quantiles is known from its quantiles alone, "
            "and few of them are poor evidence for a trend. documents: spread puts the seeds apart instead."
        )
    return found


def _quantiles(design: Design) -> list[int]:
    found = [len(design.cells_of(source)) for source in dict.fromkeys(design.sources)]
    return [count for count in found if count > 1] or found  # a control is one cell


def _group(runs: Sequence[Run], results: Mapping[str, RunResult]) -> dict[Cell, list[Run]]:
    groups: dict[Cell, list[Run]] = {}
    for run in runs:
        if run.name in results and not run.control:
            groups.setdefault(Cell(run.source, Fraction(str(run.top))), []).append(run)
    return groups


def _control_groups(runs: Sequence[Run], results: Mapping[str, RunResult]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.name in results and run.control:
            groups.setdefault(run.cell_name, []).append(run)
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
        everywhere = [result.tasks[task].metrics for runs in cells for result in runs]
        for metric in (name for name in everywhere[0] if all(name in one for one in everywhere)):
            values = [np.array([result.tasks[task].metrics[metric] for result in runs]) for runs in cells]
            name = f"{task}: {metric.replace('_', ' ')}"
            metrics.append(Metric(name, capability, metric, False, False, Measure(name, values, weights)))
    return tuple(metrics)


def _held_out_metric(study: Study, name: str, cells: Sequence[Sequence[RunResult]]) -> Metric:
    pairs = [[bits_per_byte(result.held_out[name]) for result in runs] for runs in cells]
    weights = pairs[0][0][1]
    values = [-np.stack([value for value, _ in runs]) for runs in pairs]
    unit = "bits/byte" if sum(cells[0][0].held_out[name].bytes) else "bits/token"
    groups = groups_of(cells[0][0].held_out[name])
    title = f"{name}: bits per {unit.removeprefix('bits/')} of held-out text"
    measure = Measure(name, values, weights, groups)
    return Metric(title, study.evaluation.capability_of(name), unit, True, True, measure)


def _scores(metrics: Sequence[Metric]) -> dict[str, Score]:
    """Return the scores of `overall` and the capabilities, or of `overall` alone for one capability."""
    some = [metric for metric in metrics if metric.decides]
    deciding = [metric for metric in some if metric.measure.steady] or some
    parts = {
        name: Composite(name, [metric.measure for metric in deciding if metric.capability == name])
        for name in dict.fromkeys(metric.capability for metric in deciding)
    }
    if len(parts) == 1:
        return {OVERALL: next(iter(parts.values()))}
    return {OVERALL: Composite(OVERALL, list(parts.values())), **parts}


def _refusals(study: Study, seeds: Sequence[int]) -> tuple[str, ...]:
    found = []
    if max(seeds) < 2:
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
        found.append(f"Incomplete: {len(results)} of {counted(len(sliced.runs), 'run')} have results.")
    few = sum(count < LEAST_RUNS for count in seeds)
    if few and max(seeds) > 1:
        found.append(
            f"{few} of {counted(len(seeds), 'slice')} have fewer than {LEAST_RUNS} seeds: no pair with them is claimed."
        )
    failed = {task: reason for result in results.values() for task, reason in result.not_evaluated.items()}
    found += [f"Task {task} was not evaluated: {reason}" for task, reason in failed.items()]
    some = next(iter(results.values()))
    for name, held_out in some.held_out.items():
        if not sum(held_out.bytes):
            found.append(
                f"The bytes of the tokens of {name} are unknown: its losses are bits per token, of this tokenizer only."
            )
    found += sliced.warnings
    if study.slices.documents != "shared" and study.slice_budget > study.slices.tokens:
        found.append(f"Each slice was seen {float(study.slice_budget / study.slices.tokens):.3g} times.")
    return tuple(found)
