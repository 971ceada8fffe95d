"""A source of a plan with its files opened: its orders, and which of its documents are held out."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.plan_schema import SourceSpec, ValidationSpec
from megatron_kaiyuan.documents.bands import BandEdges, band_edges
from megatron_kaiyuan.documents.deny import read_denied
from megatron_kaiyuan.documents.even_sample import every_nth
from megatron_kaiyuan.documents.groups import draw_groups, group_numbers
from megatron_kaiyuan.documents.order import DocumentOrder, RankedOrder, StorageOrder
from megatron_kaiyuan.documents.permutation import KeyedPermutation, derive_key
from megatron_kaiyuan.documents.rank_index import RankIndex, content_digests, damaged_index, load_or_rank
from megatron_kaiyuan.documents.ranking import STRIDE
from megatron_kaiyuan.documents.runs import DocumentRuns, nearest_count, trainable_runs
from megatron_kaiyuan.errors import PlanError, ScoreError, ShardError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.shard import real_files
from megatron_kaiyuan.shards.source import Source, open_sources

__all__ = ["OpenedSource", "held_out_elsewhere", "leave_out_elsewhere", "open_plan_source", "open_plan_sources"]

_PROBES = 64


@dataclass(frozen=True)
class OpenedSource:
    """Documents of a source, in storage order and by rank, less the held-out ones."""

    name: str
    spec: SourceSpec
    source: Source
    held_out: NDArray[np.int64]
    """Document numbers that no phase may see, ascending, int64 `[H]`."""
    held_out_groups: str | None = None
    """Score sidecar by whose numbers whole groups are held out; None: documents are, one by one."""
    held_out_elsewhere: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Further ones: another source of the plan names the same shards and holds these documents out, int64 `[n]`."""
    denied: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Documents that the source's `deny` file, or that of another source with the same shards, names, int64 `[n]`."""
    rank_index: RankIndex | None = None
    """Of a source whose documents are scored."""

    @cached_property
    def storage_order(self) -> DocumentOrder:
        """Documents as stored."""
        return StorageOrder(self.source)

    @cached_property
    def ranked_order(self) -> DocumentOrder:
        """Documents in ascending score."""
        assert self.spec.score is not None
        return RankedOrder(self.source, self._rank_index, self.spec.score)

    def trainable(self, *, ranked: bool) -> DocumentRuns:
        """All documents but those held out of this source or of another with the same shards, by rank or as stored."""
        if self.spec.thin is not None:
            return self._thinned
        return self._trainable_ranked if ranked else self._trainable_stored

    @cached_property
    def _thinned(self) -> DocumentRuns:
        """Return the same documents for every phase, at equal distances.

        They are taken by rank where there are ranks, in either order.
        """
        assert self.spec.thin is not None
        some = self._trainable_ranked if self.spec.score is not None else self._trainable_stored
        return every_nth(some, max(1, nearest_count(self.spec.thin, some.num_documents)))

    @cached_property
    def _trainable_ranked(self) -> DocumentRuns:
        return trainable_runs(self.ranked_order, self._untrained)

    @cached_property
    def _trainable_stored(self) -> DocumentRuns:
        return trainable_runs(self.storage_order, self._untrained)

    @property
    def _untrained(self) -> NDArray[np.int64]:
        return np.unique(np.concatenate([self.held_out, self.held_out_elsewhere, self.denied]))

    @cached_property
    def held_out_runs(self) -> DocumentRuns:
        """The held-out documents, as stored."""
        return DocumentRuns(self.storage_order, self.held_out, self.held_out + 1)

    @cached_property
    def content(self) -> str:
        """Identifies the documents, however they are cut into shards.

        64 documents are probed for their first tokens, their length, and all tokens stored before them: a document
        that became longer or shorter is noticed unless another one between the same two probes made up for it.

        Raises:
            ShardError: a probed document does not end where the next one begins.
        """
        digest = sha256(f"{self.source.num_documents} {self.source.num_tokens}".encode())
        documents = np.unique(np.linspace(0, self.source.num_documents - 1, _PROBES).astype(np.int64))
        starts, lengths = self.source.token_starts(documents), self.source.lengths(documents)
        self._check_ends(documents, starts + lengths)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            tokens = self.source.probe_tokens(start, min(length, _PROBES))
            digest.update(start.to_bytes(8, "little") + length.to_bytes(8, "little") + tokens.tobytes())
        if self.spec.score is not None:
            digest.update(self.source.scores_of(self.spec.score, documents).tobytes())
        return digest.hexdigest()

    def _check_ends(self, documents: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        next_starts = self.source.token_starts(documents + 1)
        wrong = np.flatnonzero(ends != next_starts)
        if len(wrong):
            where = self.source.segment(int(documents[wrong[0]]), 0, 0)
            raise ShardError(
                f"{where.shard}.idx: document {where.document:,} does not end where the next one begins (they are "
                f"{counted(int(next_starts[wrong[0]] - ends[wrong[0]]), 'token')} apart); the file is damaged, copy "
                "it again or "
                f"rebuild the shard ({tool('inspect')} --verify says more)"
            )

    @cached_property
    def ranking(self) -> str:
        """Identifies the order by rank: the seed of its ties, and the documents and the tokens before 64 ranks."""
        index = self._rank_index
        ranks = np.unique(np.linspace(0, len(index.order) - 1, _PROBES).astype(np.int64))
        tokens = index.token_marks[ranks // STRIDE]
        return sha256(f"{index.seed} {index.order[ranks].tolist()} {tokens.tolist()}".encode()).hexdigest()[:16]

    def ranks_scored(self, at_least: tuple[float, bool] | None, at_most: tuple[float, bool] | None) -> tuple[int, int]:
        """First rank, and one past the last, of the documents whose scores lie between two limits.

        Args:
            at_least: the lower limit, and whether a document with that score belongs to them; None: no limit.
            at_most: the upper one.

        Raises:
            PlanError: the source is simulated, so that it has ranks and no scores.
        """
        order = self.ranked_order
        if not isinstance(order, RankedOrder):
            raise PlanError(
                f"source {self.name!r} is simulated: it has ranks and no scores to compare; plan with top 30% until "
                "its shards exist"
            )
        low = 0 if at_least is None else order.scored_below(at_least[0], or_equal=not at_least[1])
        high = order.num_documents if at_most is None else order.scored_below(at_most[0], or_equal=at_most[1])
        return low, high

    def bands_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The quantile band of each of these documents of a scored source, int64 `[n]`."""
        assert self.spec.score is not None
        return self._band_edges.bands_of(documents, self.source.scores_of(self.spec.score, documents))

    @cached_property
    def _band_edges(self) -> BandEdges:
        score, index = self.spec.score, self._rank_index
        assert score is not None
        try:
            return band_edges(index.order, lambda documents: self.source.scores_of(score, documents), index.seed)
        except IndexError as error:  # a document that the source does not have
            raise damaged_index(index, self.source, score) from error

    @property
    def _rank_index(self) -> RankIndex:
        assert self.rank_index is not None, "a source with a score is opened with its rank index"
        return self.rank_index


def open_plan_source(name: str, spec: SourceSpec, held_out: ValidationSpec | None, seed: int) -> OpenedSource:
    """Open the shards of a source and draw its held-out documents.

    Errors as `open_plan_sources`.
    """
    return open_plan_sources({name: spec}, {} if held_out is None else {name: held_out}, seed)[name]


def open_plan_sources(
    specs: Mapping[str, SourceSpec], held_out: Mapping[str, ValidationSpec], seed: int
) -> dict[str, OpenedSource]:
    """Open the shards of all sources of a plan and draw their held-out documents.

    Which documents are held out depends on the plan's seed, the source's name and its number of documents alone, or on
    their groups where whole groups are. What
    one source holds out is left out of every other source that names the same shards. A rank
    index is opened here, so that one that is missing stops a run before it starts and not at a report.

    Args:
        specs: the sources.
        held_out: what to hold out of each source; those without an entry are used whole.
        seed: of the plan.

    Raises:
        ShardError: shards are missing or damaged.
        ScoreError, RankIndexError: a source names a score, and its sidecars or its rank index are missing or stale.
        PlanError: fewer documents than are to be held out, none left by what other sources hold out, or groups whose
            numbers are missing or not whole.
    """
    sources = open_sources({name: spec.shards for name, spec in specs.items()})
    shared = bool(held_out) or any(spec.deny for spec in specs.values())
    files = _files(sources) if shared else {}
    denied = _denied(specs, sources, files)
    opened = {
        name: OpenedSource(
            name,
            spec,
            sources[name],
            np.setdiff1d(_draw(sources[name], held_out.get(name), seed), denied[name], assume_unique=True),
            held_out_groups=held_out[name].groups if name in held_out else None,
            denied=denied[name],
        )
        for name, spec in specs.items()
    }
    opened = leave_out_elsewhere(opened, files)
    scored = [source for source in opened.values() if source.spec.score is not None]
    digests = content_digests([(source.source, source.spec.score) for source in scored])
    indices = side_by_side(
        lambda pair: _load_index(pair[0].source, pair[0].spec, pair[1]), list(zip(scored, digests, strict=True))
    )
    indexed = zip(scored, indices, strict=True)
    return opened | {source.name: replace(source, rank_index=index) for source, index in indexed}


def leave_out_elsewhere(
    opened: Mapping[str, OpenedSource], files: Mapping[str, Sequence[tuple[Hashable, int]]]
) -> dict[str, OpenedSource]:
    """Leave out of each source what another one holds out of the shards that both name.

    `files` is the `parts` of `held_out_elsewhere`.

    Raises:
        PlanError: that leaves a source without a document.
    """
    others = held_out_elsewhere(files, {name: opened[name].held_out for name in files})
    for name, documents in others.items():
        untrained = np.concatenate([opened[name].held_out, documents, opened[name].denied])
        left = opened[name].source.num_documents - len(np.unique(untrained))
        if left < 1:
            raise PlanError(
                f"sources.{name}: other sources name the same shards and hold out {len(documents):,} of its documents "
                "(see validation), which leaves none to train on; hold out fewer, or leave the source out of the plan"
            )
    return {
        name: replace(source, held_out_elsewhere=others[name]) if len(others.get(name, ())) else source
        for name, source in opened.items()
    }


def _denied(
    specs: Mapping[str, SourceSpec], sources: Mapping[str, Source], files: Mapping[str, Sequence[tuple[Hashable, int]]]
) -> dict[str, NDArray[np.int64]]:
    """The documents that each source may not use, by its own list or by that of another one with the same shards."""
    none = np.empty(0, dtype=np.int64)
    own = {
        name: none if spec.deny is None else read_denied(Path(spec.deny), sources[name]) for name, spec in specs.items()
    }
    others = held_out_elsewhere(files, own) if files else {}
    found = {name: np.union1d(some, others.get(name, none)) for name, some in own.items()}
    for name, some in found.items():
        if len(some) == sources[name].num_documents:
            raise PlanError(
                f"sources.{name}.deny: denies all {counted(len(some), 'document')}; leave the source out of the plan"
            )
    return found


def check_held_out(opened: Mapping[str, OpenedSource], seq_length: int) -> None:
    """Refuse held-out documents too short for one window of `seq_length` tokens and a target.

    Raises:
        PlanError: names the source.
    """
    for name, source in opened.items():
        if not len(source.held_out):
            continue
        tokens = source.held_out_runs.num_tokens
        if tokens <= seq_length:
            raise PlanError(
                f"validation.{name}: {counted(len(source.held_out), 'held-out document')} with "
                f"{counted(tokens, 'token')}, one window needs {seq_length + 1:,}; hold out more documents"
            )


def _files(sources: Mapping[str, Source]) -> dict[str, list[tuple[Hashable, int]]]:
    """Return, by source, the identity of each shard with its number of documents.

    The identity is the shard's checksums where it has them, or else its file. A copy with a manifest is the same shard
    by its checksums, a link without one by its file.
    """
    shards = [shard for source in sources.values() for shard in source.shards]
    files = dict(zip((shard.prefix for shard in shards), real_files([shard.prefix for shard in shards]), strict=True))
    sums: dict[Hashable, Hashable] = {
        files[shard.prefix]: (shard.record.bin_sha256, shard.record.idx_sha256)
        for shard in shards
        if shard.record is not None and shard.record.bin_sha256 is not None
    }
    return {
        name: [(sums.get(files[shard.prefix], files[shard.prefix]), shard.documents) for shard in source.shards]
        for name, source in sources.items()
    }


def _draw(source: Source, held_out: ValidationSpec | None, seed: int) -> NDArray[np.int64]:
    """Numbers of the held-out documents, ascending."""
    if held_out is None:
        return np.empty(0, dtype=np.int64)
    place, documents = f"validation.{source.name}", held_out.documents
    if documents >= source.num_documents:
        raise PlanError(
            f"{place}.documents: {documents} to be held out of {counted(source.num_documents, 'document')} leaves "
            "none to train on; hold out fewer"
        )
    key = derive_key(seed, "held-out", source.name)
    if held_out.groups is None:
        return np.sort(KeyedPermutation(source.num_documents, key).many(np.arange(documents)))
    try:
        groups = group_numbers(source, held_out.groups, np.arange(source.num_documents))
    except (ScoreError, PlanError) as error:
        raise PlanError(f"{place}.groups: {error}") from error
    drawn = draw_groups(groups, documents, key)
    if len(drawn) == source.num_documents:
        raise PlanError(
            f"{place}.groups: whole groups of {held_out.groups!r} with {counted(documents, 'document')} are all "
            f"{source.num_documents} of the source, which leaves none to train on; hold out fewer"
        )
    return drawn


def _load_index(source: Source, spec: SourceSpec, digest: str | None) -> RankIndex:
    assert spec.score is not None
    return load_or_rank(source, spec.score, Path(spec.rank_index) if spec.rank_index else None, digest)


def held_out_elsewhere(
    parts: Mapping[str, Sequence[tuple[Hashable, int]]], held_out: Mapping[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.int64]]:
    """Return the documents of each source that another source holds out, and that it does not hold out itself.

    Args:
        parts: of each source, in storage order, the identity of each shard and its number of documents.
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
