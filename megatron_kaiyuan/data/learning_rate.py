"""Learning-rate shapes over the progress of a phase, the averages that stand for them, and what the best data meet."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.host.terminal import counted

__all__ = ["averaging_weights", "batch_warnings", "mean_rate", "rate_at", "rate_warnings"]

_BEST_FROM = 0.8
"""The best data of an ascending stream: its last fifth."""
_LOWEST_SHARE = 1 / 3
"""Of the run's highest rate. In arXiv 2511.18903 a decay to about a third left a curriculum its effect."""

_WEIGHTING = re.compile(r"mean|wma|decay:(?P<shape>linear|cosine|sqrt)|ema:(?P<alpha>(\d+\.?\d*|\.\d+)(e-?\d+)?)")


def rate_at(shape: str, start: float, end: float, progress: float) -> float:
    """The learning rate at `progress` of a phase, 0 = its first sample, 1 = its end.

    Shapes: `constant`; `linear` and `warmup` (the same line, the name says the intent); `cosine` (half a period);
    `sqrt`, the 1-sqrt decay `start * (1 - sqrt(r)) + end * sqrt(r)` of arXiv 2511.18903.
    """
    weights = {
        "constant": 0.0,
        "linear": progress,
        "warmup": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "sqrt": math.sqrt(progress),
    }
    weight = weights[shape]
    return start * (1 - weight) + end * weight


def averaging_weights(kind: str, count: int) -> NDArray[np.float64]:
    """Return the weights of `count` checkpoints, oldest first, summing to 1.

    They are float64 `[count]`.

    Args:
        kind: `mean`; `wma`, 1 to `count`; `ema:A` with 0 < A <= 1, each newer one `A * newer + (1 - A) * average`;
            `decay:SHAPE`, as if the rate had decayed to 0 between the oldest and the newest: an update between two of
            them keeps the rate's share in their middle (arXiv 2507.17634). SHAPE: `linear`, `cosine`, `sqrt`.
        count: at least 1.

    Raises:
        ValueError: an unknown kind.
    """
    words = _WEIGHTING.fullmatch(kind)
    alpha = float(words["alpha"] or 1) if words else 0.0
    if words is None or not 0.0 < alpha <= 1.0:
        raise ValueError(f"{kind!r} is not a weighting")
    if words["shape"]:
        middles = [(number - 0.5) / (count - 1) for number in range(1, count)]
        shares = np.array([1.0, *(rate_at(words["shape"], 1.0, 0.0, middle) for middle in middles), 0.0])
        return np.asarray(shares[:-1] - shares[1:], dtype=np.float64)
    if words["alpha"]:
        raw = alpha * (1.0 - alpha) ** np.arange(count - 1, -1, -1, dtype=np.float64)
        raw[0] /= alpha
    else:
        raw = np.ones(count) if kind == "mean" else np.arange(1, count + 1, dtype=np.float64)
    return np.asarray(raw / raw.sum(), dtype=np.float64)


def mean_rate(lr: Mapping[str, Any], first: float, last: float) -> float:
    """Mean rate between two places in a phase, by the midpoints of 64 equal parts.

    Args:
        lr: `start`, `end` and `shape`.
        first: Progress in [0, 1).
        last: Progress, above `first`.
    """
    places = [first + (last - first) * (part + 0.5) / 64 for part in range(64)]
    return sum(rate_at(lr["shape"], lr["start"], lr["end"], place) for place in places) / len(places)


def rate_warnings(description: Mapping[str, Any]) -> list[str]:
    """Return warnings about curricula whose best data, which comes last, meets a small rate.

    A rate that is low where the data are best undoes what their order gives: arXiv 2511.18903 measured an ascending
    curriculum under a full decay below the same data shuffled, and above it with a moderate decay or none.

    Args:
        description: What `Plan.describe` returns.
    """
    rates = [phase["lr"] for phase in description["phases"] if phase["lr"]]
    if not rates:
        return []
    peak = max(max(lr["start"], lr["end"]) for lr in rates)
    warnings = []
    for phase in description["phases"]:
        ascending = any(row["order"] == "ascending quality" for row in phase["sources"].values())
        if phase["lr"] is None or not ascending or peak == 0:
            continue
        rate = mean_rate(phase["lr"], _BEST_FROM, 1.0)
        if rate < _LOWEST_SHARE * peak:
            warnings.append(
                f"phase {phase['name']!r}: its best data, the last fifth of the curriculum, meets a mean learning rate "
                f"of {rate:.3g}, {rate / peak:.0%} of the run's highest ({peak:g}). A decay this strong can cancel a "
                "curriculum (arXiv 2511.18903): end at a third of the highest rate or above, or keep it constant, and "
                "average the last checkpoints"
            )
    return warnings


def batch_warnings(description: Mapping[str, Any], global_batch_size: int) -> list[str]:
    """Say what the last, partial global batch of a run holds, which is never trained on.

    Args:
        description: What `Plan.describe` returns.
        global_batch_size: Sequences a step.
    """
    lost = description["samples"] % global_batch_size
    last = description["phases"][-1]
    if not lost or description["samples"] < global_batch_size:
        return []
    best = any(row["order"] == "ascending quality" for row in last["sources"].values())
    what = ", the best data of its curriculum," if best else ""
    kept = last["samples"] - lost
    budgets = [kept * description["seq_length"], (kept + global_batch_size) * description["seq_length"]]
    remedy = f"{budgets[0]:,} or {budgets[1]:,}" if kept > 0 else f"{budgets[1]:,}"
    return [
        f"the last {counted(lost, 'sample')} of phase {last['name']!r}{what} fill no global batch of "
        f"{global_batch_size:,} and "
        f"are never trained on: give the phase tokens: {remedy}, which are whole batches"
    ]
