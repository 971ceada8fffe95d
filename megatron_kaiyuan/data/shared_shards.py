"""Documents that two sources of a plan share because both name the same shards: held out of one, held out of both."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["held_out_elsewhere"]


def held_out_elsewhere(
    parts: Mapping[str, Sequence[tuple[Hashable, int]]], held_out: Mapping[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.int64]]:
    """Documents of each source that another source holds out, and that it does not hold out itself.

    Args:
        parts: of each source, in storage order, what tells a shard from all others, and its number of documents.
        held_out: documents that each source holds out, by their numbers in it, ascending int64 `[n]`.

    Returns:
        Of each source the numbers of such documents in it, ascending int64 `[n]`; mostly none.
    """
    starts = {name: _starts(some) for name, some in parts.items()}
    holders: dict[Hashable, list[tuple[str, int]]] = {}
    for name, some in parts.items():
        for (shard, _), start in zip(some, starts[name].tolist(), strict=False):
            holders.setdefault(shard, []).append((name, start))
    found: dict[str, list[NDArray[np.int64]]] = {name: [] for name in parts}
    for name, documents in held_out.items():
        places = starts[name].searchsorted(documents, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), len(documents)]
        for first, stop in pairwise(edges if len(documents) else []):
            number = int(places[first])
            for other, start in holders[parts[name][number][0]]:
                if other != name:
                    found[other].append(documents[first:stop] - starts[name][number] + start)
    return {name: _without(some, held_out[name]) for name, some in found.items()}


def _starts(parts: Sequence[tuple[Hashable, int]]) -> NDArray[np.int64]:
    """Documents before each shard, int64 `[shards]`."""
    sizes = np.array([documents for _, documents in parts], dtype=np.int64)
    return np.cumsum(sizes) - sizes


def _without(documents: Sequence[NDArray[np.int64]], own: NDArray[np.int64]) -> NDArray[np.int64]:
    none = np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.concatenate([none, *documents]), own) if documents else none
