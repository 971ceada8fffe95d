"""The ordering of the Kaiyuan-2B report, written from its description: documents, rescaled ranks, one global sort.

A reference to compare with, in tests and in `studies/order_study.py`; nothing else uses it. It orders documents; the
tokens of all of them, one after the other, are then cut into samples wherever the cuts fall.

Source: arXiv 2512.07612, algorithm 1, and the authors' preprocessing code: within a dataset of N_i documents rank
r = 1..N_i by ascending score; with N documents in all, sort everything by R = r N / N_i, ties at random.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["keep_strictly_above", "paper_order", "tokens_in_slices"]


def keep_strictly_above(scores: NDArray[np.float64], fraction: float) -> NDArray[np.int64]:
    """The paper's `top fraction`: documents whose score is strictly above the quantile `1 - fraction`.

    Returns:
        Document numbers, int64 `[n]`, in storage order.
    """
    threshold = np.quantile(scores, 1 - fraction, method="inverted_cdf")
    return np.flatnonzero(scores > threshold)


def paper_order(
    scores: Sequence[NDArray[np.float64]], rng: np.random.Generator, rank_shift: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order the documents of several datasets.

    Args:
        scores: of the documents of each dataset; random numbers for one without scores.
        rng: breaks ties. The authors' is unseeded.
        rank_shift: subtracted from every rank. The paper's is 0; with 1/2 a document sits in the middle of its share of
            the line instead of at its end.

    Returns:
        Dataset and document number of every document in training order, each int64 `[N]`.
    """
    sizes = [len(some) for some in scores]
    total = sum(sizes)
    datasets = np.repeat(np.arange(len(sizes)), sizes)
    documents = np.concatenate([np.lexsort((rng.random(len(some)), some)) for some in scores])
    rescaled = np.concatenate([(np.arange(1, size + 1) - rank_shift) * total / size for size in sizes])
    order = np.lexsort((rng.random(total), rescaled))
    return datasets[order], documents[order]


def tokens_in_slices(
    datasets: NDArray[np.int64], lengths: NDArray[np.int64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Tokens of each dataset between neighbouring edges of a sequence of documents.

    Args:
        datasets: dataset number of each document in order, int64 `[N]`.
        lengths: tokens of each document in order, int64 `[N]`, all above 0.
        edges: ascending places in the sequence, in tokens from its beginning, `[E + 1]`; they may split a document.

    Returns:
        float64 `[E, number of datasets]`.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    columns = [
        np.interp(edges, ends, np.concatenate([[0], np.cumsum(np.where(datasets == number, lengths, 0))]))
        for number in range(int(datasets.max()) + 1)
    ]
    return np.diff(np.stack(columns, axis=1), axis=0)
