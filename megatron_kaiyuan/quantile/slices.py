"""Slices at score quantiles: bands of ranked documents, equal in tokens, disjoint, exact to one document.

A slice at quantile q (from the top) lies around rank (1 - q) N of a source's trainable documents, moved inwards at the
ends. It is the shortest such run of documents that fills `tokens` predicted tokens, so it has fewer tokens too many
than its last document has; a run trains on exactly `tokens` of them. With `documents: own` the seeds of a quantile get
neighbouring slices, turned by one from quantile to quantile, so that no seed is always nearest to the top. With
`documents: spread` they lie evenly over the quantile's stratum, which reaches half way to its neighbours, so that what
a source changes by from place to place is a spread between runs and not a difference between quantiles.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, pairwise
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.opened import OpenedSource, open_plan_source
from megatron_kaiyuan.data.plan_schema import SourceSpec, ValidationSpec
from megatron_kaiyuan.documents.order import RankedOrder
from megatron_kaiyuan.documents.runs import DocumentRuns
from megatron_kaiyuan.errors import PlanError, StudyError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.quantile.held_out import LEAST_HELD_OUT
from megatron_kaiyuan.quantile.study import Study, top_name
from megatron_kaiyuan.shards.shard import resolve_prefixes

__all__ = ["Slice", "choose_slices", "cut_band", "open_sources", "scores_at", "stratum_centres"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Documents `first <= rank < last` of a source's trainable documents in ascending score."""

    source: str
    top: Fraction
    """Quantile from the best document."""
    part: int
    """Number of the slice among those of its quantile; 0 where all seeds share one."""
    first: int
    last: int
    of: int
    """Trainable documents of the source."""
    tokens: int
    """All tokens of these documents; at most one document more than asked for."""
    score_low: float
    score_high: float

    @property
    def keep(self) -> str:
        """The selection in the plan's grammar, exact."""
        return f"band [{self.first}/{self.of}, {self.last}/{self.of})"

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.source} {top_name(self.top)}" + (f" part {self.part + 1}" if self.part else "")


def open_sources(study: Study) -> dict[str, OpenedSource]:
    """Open the benchmarked sources, then the sets that are only evaluated on.

    Raises:
        ShardError, ScoreError, RankIndexError: files are missing or damaged.
        StudyError: a shard is in two sources, or too few documents are held out.
    """
    held_out = study.evaluation.held_out
    for name, told in held_out.items():
        if told.documents < LEAST_HELD_OUT:
            raise StudyError(
                f"evaluation.held_out.{name}.documents: {told.documents} are too few to tell the spread between "
                f"documents; hold out at least {LEAST_HELD_OUT}"
            )
    specs = {
        name: SourceSpec(shards=source.shards, score=source.score, domain=source.domain, rank_index=source.rank_index)
        for name, source in study.sources.items()
    }
    datasets = {name: study.dataset_of(name) for name in study.sources}
    evaluated = {name: SourceSpec(shards=told.shards) for name, told in held_out.items() if told.shards is not None}
    _check_shared_shards(
        {datasets[name]: spec.shards for name, spec in specs.items()}
        | {name: spec.shards for name, spec in evaluated.items()}
    )
    opened = {}
    for name, spec in (specs | evaluated).items():
        dataset = datasets.get(name, name)  # which documents are held out depends on its name, not on the score
        own = held_out.get(dataset)
        part = None if own is None else ValidationSpec(documents=own.documents, groups=own.groups)
        try:
            opened[name] = replace(open_plan_source(dataset, spec, part, study.seed), name=name)
        except PlanError as error:  # by its place in a plan, which is not where the user wrote it
            raise StudyError(str(error).replace("validation.", "evaluation.held_out.", 1)) from error
    return opened


def _check_shared_shards(shards: Mapping[str, str | list[str]]) -> None:
    # by the file behind a path: it may be written in two ways, or be a link
    files = {
        name: {os.path.realpath(f"{prefix}.bin"): prefix for prefix in resolve_prefixes(value)}
        for name, value in shards.items()
    }
    for first, second in combinations(files, 2):
        shared = sorted(files[first].keys() & files[second].keys())
        if shared:
            one, other = files[first][shared[0]], files[second][shared[0]]
            raise StudyError(
                f"{first!r} and {second!r} both name the shard {one}{'' if one == other else f' (as {other})'}: their "
                "slices would hold the same documents, or be evaluated on what they were trained on; give every set "
                "shards of its own"
            )


def choose_slices(study: Study, opened: Mapping[str, OpenedSource]) -> list[Slice]:
    """All slices of a study, source by source, from the best quantile to the worst.

    Raises:
        StudyError: a source is too small, its scores are constant, or two slices overlap or hold equal scores.
    """
    found: list[Slice] = []
    for name in study.sources:
        slices = _source_slices(study, opened[name])
        _check_disjoint(study, opened[name], slices)
        _check_scores(opened[name], slices)
        found += slices
    return found


def cut_band(runs: DocumentRuns, centre: int, parts: int, need: int) -> list[int] | None:
    """Boundaries of `parts` neighbouring runs of documents around a document, each with at least `need` tokens.

    Args:
        runs: The documents, ascending.
        centre: Index of the document in the middle.
        parts: How many runs.
        need: Tokens of each.

    Returns:
        `parts + 1` document indices, ascending; None when the documents do not have so many tokens.
    """
    if runs.num_tokens < parts * need:
        return None
    middle = int(runs.tokens_before(np.array([centre]))[0])
    start = _last_at_most(runs, min(max(middle - parts * need // 2, 0), runs.num_tokens - parts * need))
    forward = _walk(runs, start, parts, need)
    return forward if forward is not None else _walk_back(runs, parts, need)


def _walk(runs: DocumentRuns, start: int, parts: int, need: int) -> list[int] | None:
    edges = [start]
    for _ in range(parts):
        wanted = int(runs.tokens_before(np.array([edges[-1]]))[0]) + need
        if wanted > runs.num_tokens:
            return None
        edges.append(_first_at_least(runs, wanted))
    return edges


def _walk_back(runs: DocumentRuns, parts: int, need: int) -> list[int] | None:
    """From the best document downwards."""
    edges = [runs.num_documents]
    for _ in range(parts):
        wanted = int(runs.tokens_before(np.array([edges[-1]]))[0]) - need
        if wanted < 0:
            return None
        edges.append(_last_at_most(runs, wanted))
    return edges[::-1]


def _first_at_least(runs: DocumentRuns, tokens: int) -> int:
    """The first boundary with this many tokens before it."""
    index = runs.nearest_index(Fraction(tokens))
    while int(runs.tokens_before(np.array([index]))[0]) < tokens:
        index += 1
    return index


def _last_at_most(runs: DocumentRuns, tokens: int) -> int:
    """The last boundary with at most this many tokens before it."""
    index = runs.nearest_index(Fraction(tokens))
    while int(runs.tokens_before(np.array([index]))[0]) > tokens:
        index -= 1
    return index


def _parts(study: Study) -> int:
    return 1 if study.slices.documents == "shared" else len(study.training.seeds)


def stratum_centres(study: Study, top: Fraction) -> list[tuple[Fraction, int]]:
    """Return the middles of a quantile's runs of documents, from the best document, and the slices in each."""
    if study.slices.documents != "spread":
        return [(top, _parts(study))]
    tops = sorted(study.slices.tops)
    place = tops.index(top)
    best = (tops[place - 1] + top) / 2 if place else Fraction(0)
    worst = (top + tops[place + 1]) / 2 if place + 1 < len(tops) else Fraction(1)
    parts = _parts(study)
    # from the worst to the best, as neighbouring slices are numbered
    return [(best + (worst - best) * Fraction(2 * part + 1, 2 * parts), 1) for part in reversed(range(parts))]


def _cut_top(study: Study, runs: DocumentRuns, top: Fraction, tokens: int) -> list[tuple[int, int]] | None:
    """Return first and last document of each slice of a quantile, None when they do not fit."""
    found: list[tuple[int, int]] = []
    for centre, parts in stratum_centres(study, top):
        edges = cut_band(runs, round((1 - centre) * runs.num_documents), parts, tokens + 1)
        if edges is None:
            return None
        found += pairwise(edges)
    return found


def _source_slices(study: Study, source: OpenedSource) -> list[Slice]:
    runs = source.trainable(ranked=True)
    if len(study.slices.tops) * _parts(study) * (study.slices.tokens + 1) > runs.num_tokens:
        _refuse_small(study, source)
    slices = []
    for top in sorted(study.slices.tops):
        bands = _cut_top(study, runs, top, study.slices.tokens)
        if bands is None:
            _refuse_small(study, source)
        slices += [_make(source, runs, top, part, ends) for part, ends in enumerate(bands)]
    for piece in slices:
        if piece.last - piece.first < study.slices.min_documents:
            raise StudyError(
                f"slice {piece.name}: {counted(study.slices.tokens, 'token')} are only "
                f"{counted(piece.last - piece.first, 'document')}, "
                f"fewer than slices.min_documents {study.slices.min_documents}; make slices.tokens larger, or lower "
                "that bound"
            )
    return slices


def _make(source: OpenedSource, runs: DocumentRuns, top: Fraction, part: int, ends: tuple[int, int]) -> Slice:
    band = runs.between(*ends)
    low, high = scores_at(source, np.array([int(band.starts[0]), int(band.stops[-1]) - 1]))
    return Slice(source.name, top, part, *ends, runs.num_documents, band.num_tokens, low, high)


def scores_at(source: OpenedSource, ranks: NDArray[np.int64]) -> list[float]:
    """Scores of the documents at these ranks."""
    assert source.spec.score is not None, "benchmarked sources are scored"
    assert isinstance(source.ranked_order, RankedOrder), "so their order is by rank"
    documents = source.ranked_order.index.order[ranks].astype(np.int64)
    scores: list[float] = source.source.scores_of(source.spec.score, documents).tolist()
    return scores


def _check_disjoint(study: Study, source: OpenedSource, slices: Sequence[Slice]) -> None:
    ascending = sorted(slices, key=lambda piece: piece.first)
    for lower, upper in pairwise(ascending):
        if upper.first < lower.last:
            largest = _largest_tokens(study, source)
            raise StudyError(
                f"slices {lower.name} and {upper.name} overlap by {counted(lower.last - upper.first, 'document')} "
                "(ranks "
                f"{upper.first:,} to {lower.last:,} of {lower.of:,}); {_remedy(study, largest)}"
            )


def _refuse_small(study: Study, source: OpenedSource) -> NoReturn:
    runs = source.trainable(ranked=True)
    wanted = len(study.slices.tops) * _parts(study) * study.slices.tokens
    raise StudyError(
        f"source {source.name!r}: {counted(len(study.slices.tops), 'quantile')} x {counted(_parts(study), 'slice')} x "
        f"{counted(study.slices.tokens, 'token')} are {counted(wanted, 'token')}, and it has {runs.num_tokens:,} that "
        "are not held out; "
        f"{_remedy(study, _largest_tokens(study, source))}"
    )


def _remedy(study: Study, largest: int) -> str:
    shared = ", or slices.documents: shared (all seeds on the same documents)" if _parts(study) > 1 else ""
    if not largest:
        return f"not even one window fits: name fewer or other quantiles in slices.tops{shared}"
    return f"lower slices.tokens to at most {largest:,}, name other quantiles in slices.tops{shared}"


def _largest_tokens(study: Study, source: OpenedSource) -> int:
    """Return the largest slices that fit between the study's quantiles, in whole windows.

    0 when none does.
    """
    runs = source.trainable(ranked=True)

    def fits(windows: int) -> bool:
        bands = [_cut_top(study, runs, top, windows * study.seq_length) for top in study.slices.tops]
        ends = sorted(end for band in bands if band is not None for end in band)
        return None not in bands and all(lower[1] <= upper[0] for lower, upper in pairwise(ends))

    low, high = 0, study.slices.tokens // study.seq_length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * study.seq_length


def _check_scores(source: OpenedSource, slices: Sequence[Slice]) -> None:
    last = source.source.num_documents - 1
    lowest, highest = scores_at(source, np.array([0, last]))
    if lowest == highest:
        raise StudyError(
            f"source {source.name!r}: all {counted(last + 1, 'document')} have the score {lowest:g}, so its quantiles "
            "mean "
            "nothing; score it, or leave it out"
        )
    for one, other in combinations(slices, 2):
        if one.top != other.top and one.score_low == one.score_high == other.score_low == other.score_high:
            raise StudyError(
                f"slices {one.name} and {other.name} hold documents of the one score {one.score_low:g} only: the score "
                f"{source.spec.score!r} does not tell them apart; name quantiles further apart in slices.tops"
            )
