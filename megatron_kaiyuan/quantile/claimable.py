"""The smallest differences that a study can claim, known before anything runs."""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.inference import LEAST_RUNS, PAIRS_SHARE, Design, trend_terms
from megatron_kaiyuan.quantile.rank_tests import range_p_value
from megatron_kaiyuan.quantile.slices import stratum_centres
from megatron_kaiyuan.quantile.statistics import moderated_variances, typical_variance
from megatron_kaiyuan.quantile.study import Study

__all__ = ["Claimable", "known_spread", "planned_design", "smallest_claimable"]


@dataclass(frozen=True, slots=True)
class Claimable:
    """Observed differences from which on a study claims, in spreads between seeds.

    The uncertainty of held-out documents comes on top.
    """

    pair: float
    """Between two slices with all their seeds; infinite where no slice has enough of them."""
    trend: float
    """Rise of a line from the worst place of a source to its best; infinite where none can be claimed. With documents
    side by side the roughness of the source comes on top."""

    def lines(self, tops: Sequence[float], spread: float | None) -> list[str]:
        """Return lines of text for people.

        `spread` is that between seeds, in bits per byte, where it is known or expected.
        """
        gap = min(later - earlier for earlier, later in zip(sorted(tops), sorted(tops)[1:], strict=False))
        return [
            f"claimed are a difference between two slices from {_size(self.pair, spread)} on, and a rise along a score "
            f"from {_size(self.trend, spread)} on",
            f"thresholds can be told no finer than the quantiles lie apart: {gap:.4g} of a source",
        ]


def _size(value: float, spread: float | None) -> str:
    if math.isinf(value):
        return f"no size (fewer than {LEAST_RUNS} seeds)"
    return f"{value:.2g} seed spreads" + ("" if spread is None else f" ({value * spread:.2g} bits per byte)")


def planned_design(study: Study) -> Design:
    """Return where the runs of a study are to lie, without looking at its data."""
    seeds = len(study.training.seeds)
    names, places = [], []
    for source in study.sources:
        for top in sorted(study.slices.tops):
            centres = [float(centre) for centre, parts in stratum_centres(study, top) for _ in range(parts)]
            names.append(source)
            places.append(1 - np.resize(np.array(centres), seeds))
    if study.design == "branch":  # the controls: no curve of theirs is tested, but they are compared
        names += [*(f"{source}, random documents" for source in study.sources), "the mix alone"]
        places += [np.full(seeds, 0.5)] * (len(study.sources) + 1)
    return Design(names, places, study.slices.documents == "spread")


def known_spread(told: str) -> float:
    """Return the spread between seeds in bits per byte: a number, or the largest of a pilot's measures.

    Args:
        told: The number, or the path of the `report.json` of an earlier study.

    Raises:
        StudyError: neither of the two.
    """
    with contextlib.suppress(ValueError):
        if (number := float(told)) > 0 and math.isfinite(number):
            return number
    try:
        content = json.loads(Path(told).read_text(encoding="utf-8"))
        cells = [
            [np.array(values) for values in metric["seed_values"]]
            for metric in content["metrics"]
            if metric["decides"] and metric["unit"] == "bits/byte"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"--expected-spread {told}: give bits per byte above 0, or the report.json of an earlier study"
        ) from error
    spreads = [math.sqrt(typical_variance(values)[0]) for values in cells]
    if not spreads or max(spreads) == 0:
        raise StudyError(
            f"--expected-spread {told}: it has no measure in bits per byte with two seeds of a slice; give a number"
        )
    return max(spreads)


def smallest_claimable(design: Design, level: float) -> Claimable:
    """Return the differences that a study of this design claims when its slices all spread alike."""
    counts = [int(count) for count in design.counts]
    most, total = max(counts), sum(counts) - len(counts)
    if most < 2:
        return Claimable(math.inf, math.inf)
    unit = np.arange(most) - (most - 1) / 2
    alike = [np.resize(unit, count) for count in counts]
    freedom = float(moderated_variances(alike)[1].max())
    pair = math.inf
    if most >= LEAST_RUNS:
        wanted = PAIRS_SHARE * level
        own = min(float(total), 2 * freedom)
        statistic = brentq(lambda size: range_p_value(size, own, len(counts)) - wanted, 0.1, 200.0)
        alone = -float(stdtrit(2.0 * (most - 1), wanted / 2))  # by their own two variances, which are alike here
        pair = max(float(statistic), alone) * math.sqrt(2 / most)
    rises = []
    for coefficients, share in trend_terms(design):
        if design.spread:  # the runs of the source around their line
            own_freedom = float(np.count_nonzero(coefficients)) - 2
            rises.append(-float(stdtrit(own_freedom, share * level / 2)) * math.sqrt((coefficients**2).sum()))
            continue
        cells = float(((coefficients**2).sum()) ** 2 / sum(_squares(coefficients, counts))) * freedom
        rises.append(-float(stdtrit(min(float(total), cells), share * level / 2)) * math.sqrt((coefficients**2).sum()))
    return Claimable(pair, max(rises, default=math.inf))


def _squares(coefficients: np.ndarray, counts: Sequence[int]) -> list[float]:
    """Of each cell, the square of the sum of its squared coefficients: Satterthwaite's denominators."""
    starts = np.cumsum(counts) - np.array(counts)
    return [float(part) ** 2 for part in np.add.reduceat(coefficients**2, starts)]
