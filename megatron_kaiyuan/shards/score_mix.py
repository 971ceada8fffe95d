"""A score made of several: `0.7*edu + 0.3*dclm`, of their values or of the documents' ranks by each."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ScoreError
from megatron_kaiyuan.host.atomic import atomic_file
from megatron_kaiyuan.shards.score_files import check_score_name, score_path
from megatron_kaiyuan.shards.source import Source

__all__ = ["ScoreMix", "is_mix", "parse_mix", "quantile_ranks", "write_mix"]

_TERM = re.compile(r"\s*(?P<sign>[+-])?\s*(?:(?P<weight>\d+\.?\d*|\.\d+)\s*\*\s*)?(?P<name>[^\s*+]+)\s*")


@dataclass(frozen=True, slots=True)
class ScoreMix:
    """A weighted sum of scores."""

    terms: tuple[tuple[float, str], ...]
    """Weight and name of each."""


def is_mix(text: str) -> bool:
    """Whether a text is a sum or a product rather than the name of one score."""
    return "*" in text or "+" in text


def parse_mix(text: str) -> ScoreMix:
    """Read `0.7*edu + 0.3*dclm`.

    Raises:
        ScoreError: not a sum of names with weights, or a name that stands twice.
    """
    terms: list[tuple[float, str]] = []
    place = 0
    while place < len(text):
        match = _TERM.match(text, place)
        if match is None or (terms and not match["sign"]):
            raise ScoreError(f"--score {text!r}: not a sum of scores; write it as '0.7*edu + 0.3*dclm'")
        weight = float(match["weight"] or 1) * (-1 if match["sign"] == "-" else 1)
        terms.append((weight, check_score_name(match["name"])))
        place = match.end()
    names = [name for _, name in terms]
    if len(set(names)) < len(names) or not any(weight for weight, _ in terms):
        raise ScoreError(f"--score {text!r}: a score stands in it twice, or all weights are 0; write each score once")
    return ScoreMix(tuple(terms))


def quantile_ranks(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the rank of each score among all, from 0 (lowest) to 1, float64 `[n]`.

    Equal scores get the middle of their ranks.
    """
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    first = np.append(True, ascending[1:] != ascending[:-1])
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(scores))
    middles = (starts + ends - 1) / 2
    ranks = np.empty(len(scores))
    ranks[order] = middles[np.cumsum(first) - 1]
    return ranks / max(len(scores) - 1, 1)


def write_mix(source: Source, mix: ScoreMix, name: str, *, of_ranks: bool) -> None:
    """Store the sum of each document beside its shard, as the score `name`, in float32.

    Args:
        source: the shards, with all the scores that the sum has.
        mix: the sum.
        name: of the new score.
        of_ranks: sum `quantile_ranks` rather than the values, which may be of any size.

    Raises:
        ScoreError: a score is missing or damaged, the sum is not finite, or the new name is one of its scores.
    """
    if name in {term for _, term in mix.terms}:
        raise ScoreError(f"--as {name}: the sum would replace one of its own scores; give it another name")
    total = np.zeros(source.num_documents)
    for weight, term in mix.terms:
        scores = source.load_scores(term)
        total += weight * (quantile_ranks(scores) if of_ranks else scores.astype(np.float64))
    with np.errstate(over="ignore"):
        stored = total.astype(np.float32)
    if not np.isfinite(stored).all():
        document = int(np.flatnonzero(~np.isfinite(stored))[0])
        raise ScoreError(
            f"--as {name}: the sum of document {document:,} is {total[document]:g}, no number of 32 bits; use "
            "--combine ranks"
        )
    for number, shard in enumerate(source.shards):
        first, last = source.document_offsets[number : number + 2].tolist()
        with atomic_file(score_path(shard.prefix, name)) as stream:
            np.save(stream, stored[first:last])
