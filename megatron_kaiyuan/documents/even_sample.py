"""Even samples: a part of a set that has its share of every range of ranks.

Version 1 of the plan drew them too.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.draws import draw_block
from megatron_kaiyuan.documents.permutation import mix64
from megatron_kaiyuan.documents.runs import DocumentRuns, nearest_count

__all__ = ["even_sample", "every_nth"]

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


def even_sample(runs: DocumentRuns, fraction: Fraction, by: str, key: int) -> DocumentRuns:
    """A part with an exact number of documents (or of tokens, to the nearest document), even over all ranks.

    Blocks of `order.block` neighbours are taken in the order of `block * golden_ratio + random offset` modulo 1, a
    sequence in which every prefix is spread evenly (gaps take at most three lengths, Steinhaus), hence any range of
    ranks gets its share. A larger fraction with the same key contains the smaller one. Two samples of different keys
    differ by the offset alone: their overlap is not that of independent draws.
    """
    blocks = _blocks(runs, key)
    if by == "documents":
        wanted = nearest_count(fraction, runs.num_documents)
        sizes = blocks.sizes
    else:
        wanted = nearest_count(fraction, runs.num_tokens)
        bounds = runs.tokens_before(np.append(blocks.firsts, blocks.lasts))
        sizes = bounds[len(blocks.firsts) :] - bounds[: len(blocks.firsts)]
    totals = np.cumsum(sizes[blocks.priority])
    whole = int(np.searchsorted(totals, wanted, side="right"))
    chosen = blocks.priority[:whole]
    firsts, lasts = blocks.firsts[chosen], blocks.lasts[chosen]
    missing = wanted - (int(totals[whole - 1]) if whole else 0)
    if missing and whole < len(totals):
        last_block = blocks.priority[whole]
        first = int(blocks.firsts[last_block])
        stop = _partial_stop(runs, first, missing, by)
        firsts, lasts = np.append(firsts, first), np.append(lasts, stop)
    ascending = np.argsort(firsts)
    return runs.at_indices(firsts[ascending], lasts[ascending])


def _partial_stop(runs: DocumentRuns, first: int, missing: int, by: str) -> int:
    if by == "documents":
        return first + missing
    before = int(runs.tokens_before(np.array([first]))[0])
    return runs.nearest_index(Fraction(before + missing))


def _blocks(runs: DocumentRuns, key: int) -> "_Blocks":
    firsts = np.arange(0, runs.num_documents, runs.order.block, dtype=np.int64)
    lasts = np.minimum(firsts + runs.order.block, runs.num_documents)
    places = np.arange(len(firsts), dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix64(key))
    return _Blocks(firsts, lasts, np.argsort(places, kind="stable"))


@dataclass(frozen=True)
class _Blocks:
    firsts: NDArray[np.int64]
    lasts: NDArray[np.int64]
    priority: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        return self.lasts - self.firsts


def every_nth(runs: DocumentRuns, count: int) -> DocumentRuns:
    """`count` documents at equal distances along a set, its last one among them: in any range to within one document.

    Of a large source blocks of neighbours at equal distances, as large as those of a draw.
    """
    total, block = runs.num_documents, draw_block(runs.order)
    blocks = -(-total // block)
    chosen = -(-count // block)
    while True:
        numbers = (np.arange(chosen, dtype=np.int64) + 1) * blocks // chosen - 1
        firsts = numbers * block
        lasts = np.minimum(firsts + block, total)
        missing = count - int((lasts - firsts).sum())
        if missing <= 0:
            break
        chosen += 1  # the last block is a short one
    firsts[0] = min(int(firsts[0]) - missing, int(lasts[0]))
    return runs.at_indices(firsts, lasts)
