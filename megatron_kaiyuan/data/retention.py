"""What the schedule does to the data: the weight that each phase and quality band keeps in the final weights.

AdamW is an exponential average of its updates: with rate `lr` and decoupled weight decay `wd` the update of step `t` is
in the final weights with weight `lr(t) wd prod(1 - lr(s) wd)` over all steps `s` that follow (arXiv 2509.25380). An
average of checkpoints is the same sum for each of them, weighted as they are. All is relative to the step that
keeps most.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.description import quality_at
from megatron_kaiyuan.data.learning_rate import averaging_weights, rate_at
from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.phase import Phase
from megatron_kaiyuan.data.plan_phases import AveragingSpec

__all__ = [
    "effective_tokens",
    "kept_weights",
    "repetition_notes",
    "repetition_warnings",
    "retained_by_band",
    "retention_warnings",
]

_PLACES = 64
"""Equal parts of a phase for which the rate, the quality and the weight are reported."""
_LEAST_SHARE = 1 / 3
"""Of the largest weight: below, the best band of a curriculum is warned of."""
_WORTH = 15.387756
"""Repetitions after which another one is worth 1/e of new data: `R_D*` of Muennighoff et al. (2023)."""
_REPEATED = 1.005
"""Passes from which data count as repeated."""
_HARMLESS = 4
"""Passes up to which repeated data were nearly as good as new ones there."""


@dataclass(frozen=True, slots=True)
class _Bins:
    """Equal parts of every phase, in the order of the run, `[phases * _PLACES]` each."""

    starts: NDArray[np.float64]
    """First step of each and, last, the end of the run; one more than bins."""
    rates: NDArray[np.float64]


def _bins(phases: Sequence[Phase], global_batch_size: int) -> _Bins:
    starts: list[float] = []
    rates = []
    for phase in phases:
        assert phase.lr is not None
        for place in range(_PLACES):
            starts.append((phase.first_sample + phase.num_samples * place / _PLACES) / global_batch_size)
            rates.append(rate_at(phase.lr.shape, phase.lr.start, phase.lr.end, (place + 0.5) / _PLACES))
    end = (phases[-1].first_sample + phases[-1].num_samples) / global_batch_size
    return _Bins(np.array([*starts, end]), np.array(rates))


def kept_weights(
    phases: Sequence[Phase], global_batch_size: int, weight_decay: float, averaging: AveragingSpec | None
) -> NDArray[np.float64]:
    """Return the weight, in the final weights, of a step in the middle of each 64th of each phase.

    float64 `[phases, 64]`.

    Args:
        phases: of a plan with learning rates.
        global_batch_size: samples of a step.
        weight_decay: Megatron's `--weight-decay`.
        averaging: which checkpoints the final weights average; None: they are the last ones.
    """
    bins = _bins(phases, global_batch_size)
    widths = np.diff(bins.starts)
    fading = np.append(0.0, np.cumsum(widths * np.log1p(-bins.rates * weight_decay)))
    middles = (bins.starts[:-1] + bins.starts[1:]) / 2
    kept = np.zeros(len(middles))
    ends, shares = [bins.starts[-1]], np.ones(1)
    if averaging is not None:
        ends = [bins.starts[-1] - averaging.every * number for number in reversed(range(averaging.last))]
        shares = averaging_weights(averaging.weights, averaging.last)
    at_middle = np.interp(middles, bins.starts, fading)
    for end, share in zip(ends, shares.tolist(), strict=True):
        faded = np.exp(np.interp(end, bins.starts, fading) - at_middle)
        kept += np.where(middles < end, share * bins.rates * weight_decay * faded, 0.0)
    return kept.reshape(len(phases), _PLACES)


def retained_by_band(
    phases: Sequence[Phase], opened: Mapping[str, OpenedSource], kept: NDArray[np.float64], bands: int
) -> list[dict[str, Any]]:
    """The weight that a token of each band keeps, phase by phase and source by source, 1 for the step that keeps most.

    A band that the phase does not show has None. All bands of a source in random order keep alike.
    """
    relative = kept / kept.max() if kept.max() > 0 else kept
    rows = []
    for phase, weights in zip(phases, relative, strict=True):
        for number, name in enumerate(phase.source_list):
            stream, row = phase.stream_list[number], {"phase": phase.name, "source": name, "ascending": False}
            mean = float(weights.mean())
            if stream.ascending:
                row["ascending"] = True
                places = [int(phase.num_samples * (place + 0.5) / _PLACES) for place in range(_PLACES)]
                shown = [min(int(quality_at(phase, opened[name], at) * bands), bands - 1) for at in places]
                found = [weights[[one == band for one in shown]] for band in range(bands)]
                rows.append(
                    row | {"kept": mean, "bands": [float(some.mean()) if len(some) else None for some in found]}
                )
            else:
                rows.append(row | {"kept": mean, "bands": [mean] * bands})
    return rows


def effective_tokens(unique: int, shown: int) -> float:
    """Return how many tokens that are shown once would lower the loss as much, by Muennighoff et al. (2023).

    `R` repetitions of `U` tokens are worth `U (1 + r (1 - exp(-R / r)))`, `r` = 15.39. Fitted on about 400 models of
    10M to 9B parameters and up to 900B tokens of web text, repeated as a whole; in a mix it is an approximation.

    Args:
        unique: different tokens.
        shown: tokens in all, at least as many.
    """
    if not unique:
        return 0.0
    repetitions = max(shown / unique - 1, 0.0)
    return min(shown, unique) * (1 + _WORTH * -math.expm1(-repetitions / _WORTH))


def repetition_notes(description: Mapping[str, Any]) -> list[str]:
    """Return the parts that repeat data, and what their tokens are worth.

    `description` is what `Plan.describe` returned.
    """
    lines = []
    for phase in description["phases"]:
        for name, row in phase["sources"].items():
            unique = sum(one["tokens"] for one in row["shown"] or () if one["times"])
            shown = sum(one["tokens"] * one["times"] for one in row["shown"] or ())
            if shown > unique * _REPEATED:
                worth = effective_tokens(unique, shown) / shown
                lines.append(
                    f"phase {phase['name']!r}: {name} is shown {shown / unique:.2f} times on the average, which is "
                    f"worth {worth:.1%} of as many new tokens (Muennighoff et al. 2023: models up to 9B, up to "
                    "900B tokens of web text, repeated as a whole)"
                )
    return lines


def repetition_warnings(description: Mapping[str, Any]) -> list[str]:
    """Sources of which some tenth is seen more than four times in the run."""
    lines = []
    for name, source in description["sources"].items():
        times = max((band["epochs"] for band in source["bands"]), default=source["epochs"])
        if times > _HARMLESS:
            where = "its most repeated band" if source["bands"] else "it"
            lines.append(
                f"source {name!r}: {where} is seen {times:.1f} times in the run. Up to 4 times were nearly as good as "
                "new data, and with more the worth of another one decays towards nothing (Muennighoff et al. 2023); "
                "keep more of it, or repeat less"
            )
    return lines


def retention_warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Curricula whose best band keeps less than a third of what the step that keeps most does."""
    lines = []
    for row in rows:
        best = next((kept for kept in reversed(row["bands"]) if kept is not None), None)
        if row["ascending"] and best is not None and not math.isnan(best) and best < _LEAST_SHARE:
            lines.append(
                f"phase {row['phase']!r}, source {row['source']!r}: a token of its best band keeps {best:.0%} of the "
                "weight that the step which keeps most has in the final weights; decay less where the best data is, "
                "average over a shorter stretch, or show it earlier"
            )
    return lines
