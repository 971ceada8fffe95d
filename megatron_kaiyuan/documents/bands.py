"""The quantile band of a document: which tenth of its source, by rank, it belongs to.

A rank takes a bisection of some twenty look-ups, one after another. A band needs one look-up. Bands begin at nine
documents, and a document belongs to the band of the last of them that is not ranked above it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.ranking import tie_hash
from megatron_kaiyuan.host.maps import look_up

__all__ = ["NUM_BANDS", "BandEdges", "band_edges"]

NUM_BANDS = 10
"""Quantile bands in which training counts its tokens: tenths of a source's documents by score."""


@dataclass(frozen=True)
class BandEdges:
    """The first document of each band but the lowest, as what documents are ranked by."""

    scores: NDArray[np.float64]
    """`[edges]`, ascending."""
    hashes: NDArray[np.uint64]
    """Of the documents' numbers; they rank equal scores. `[edges]`."""
    total: int
    """Documents of the source."""
    seed: int
    """Of the hash."""

    def bands_of(self, documents: NDArray[np.int64], scores: NDArray[np.floating]) -> NDArray[np.int64]:
        """`rank * NUM_BANDS // total` of these documents, int64 `[n]`.

        Args:
            documents: their numbers in the source, `[n]`.
            scores: their scores, `[n]`.
        """
        bands: NDArray[np.int64] = self.scores.searchsorted(scores, side="left")
        above = self.scores.searchsorted(scores, side="right")
        tied = np.flatnonzero(bands != above)  # as good as the first document of a band, or of several
        if len(tied):
            edges, hashes = np.arange(len(self.scores)), tie_hash(documents[tied], self.total, self.seed)
            equal = (bands[tied, None] <= edges) & (edges < above[tied, None])
            bands[tied] += np.count_nonzero(equal & (self.hashes <= hashes[:, None]), axis=1)
        return bands


def band_edges(
    order: NDArray[np.unsignedinteger], scores_of: Callable[[NDArray[np.int64]], NDArray[np.floating]], seed: int
) -> BandEdges:
    """The edges of the bands of a ranked source.

    Args:
        order: document numbers in ascending score, `[N]`.
        scores_of: gives the scores of an array of documents.
        seed: of the ranking.
    """
    total = len(order)
    ranks = np.array([-(-band * total // NUM_BANDS) for band in range(1, NUM_BANDS)], dtype=np.int64)
    first = look_up(order, ranks[ranks < total]).astype(np.int64)  # fewer documents than bands: the last ones are empty
    return BandEdges(scores_of(first).astype(np.float64), tie_hash(first, total, seed), total, seed)
