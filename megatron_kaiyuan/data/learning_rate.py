"""Learning-rate shapes over the progress of a phase."""

import math

__all__ = ["rate_at"]


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
