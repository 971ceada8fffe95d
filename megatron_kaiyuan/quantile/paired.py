"""Branches compared within their trunks: what the runs of one trunk share is no difference between slices.

`x[b, t, i] = branch + trunk + rest`, item by item, fitted by least squares. The trunk's part is taken out, and what is
left of a branch around its mean is scaled by `sqrt((N - B) / (N - B - T + 1))`, so that variances which divide by the
`N - B` degrees of freedom of independent runs are unbiased again. All tests then apply as they are;
`tests/unit_tests/quantile/test_branches.py` simulates what they claim.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["without_trunks"]


def without_trunks(cells: Sequence[NDArray[np.float64]], trunks: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
    """Return the values of the branches without the deviations of their trunks.

    Args:
        cells: Of each branch, `[runs, items]`.
        trunks: Of each branch, the trunk of each run.

    Returns:
        In the same shape. Trunks that share no branch with another one cannot be separated from their branches.
        Those values stay as they are.
    """
    numbers, trunk = np.unique(np.concatenate([np.asarray(own) for own in trunks]), return_inverse=True)
    counts = [len(cell) for cell in cells]
    branch = np.repeat(np.arange(len(cells)), counts)
    columns = np.concatenate([np.eye(len(cells))[branch], np.eye(len(numbers))[trunk]], axis=1)
    values = np.concatenate(list(cells))
    fitted = np.linalg.pinv(columns) @ values
    of_trunks = fitted[len(cells) :]
    rest = values - columns @ fitted
    freedom = len(values) - len(cells)
    left = len(values) - int(np.linalg.matrix_rank(columns))
    scale = math.sqrt(freedom / left) if left > 0 else 1.0
    # a branch keeps its fitted mean at the mean of all trunks, which is its own mean where no run is missing
    means = fitted[: len(cells)] + of_trunks.mean(axis=0)
    return list(np.split(means[branch] + scale * rest, np.cumsum(counts)[:-1]))
