"""Groups of documents that belong together, such as the files of a package: their numbers, and a draw of whole groups.

The numbers lie beside the shards as a score sidecar does: a whole number a document, the same for all of a group.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.permutation import KeyedPermutation
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.shards.source import Source

__all__ = ["draw_groups", "group_numbers"]


def group_numbers(source: Source, sidecar: str, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of the group of each of these documents, int64 `[n]`.

    Args:
        source: The documents' source.
        sidecar: Name of the score sidecar with the numbers.
        documents: Numbers of the documents, int64 `[n]`.

    Raises:
        ScoreError: a shard has no such sidecar.
        PlanError: a number is not whole.
    """
    scores = source.scores_of(sidecar, documents)
    if not (np.isfinite(scores) & (scores == np.round(scores))).all():
        raise PlanError(
            f"the sidecar {sidecar!r} holds numbers that are not whole; a group is a whole number, one for "
            "all documents of one package, host or file"
        )
    return scores.astype(np.int64)


def draw_groups(groups: NDArray[np.int64], documents: int, key: int) -> NDArray[np.int64]:
    """Return the documents of whole groups, drawn until there are at least so many, ascending int64.

    Args:
        groups: The group of each document of a source, int64 `[documents of the source]`.
        documents: How many are wanted; the last group drawn may bring more.
        key: Of the draw.
    """
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = KeyedPermutation(len(sizes), key).many(np.arange(len(sizes)))
    taken = 1 + int(np.searchsorted(np.cumsum(sizes[order]), documents))
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:taken]] = True
    return np.flatnonzero(chosen[inverse]).astype(np.int64)
