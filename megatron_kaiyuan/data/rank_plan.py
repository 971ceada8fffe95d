"""What a plan needs of large sources, in one go that can be run again: rank indices, and sums of documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_kaiyuan.data.phase import stored_orders
from megatron_kaiyuan.data.plan import Plan
from megatron_kaiyuan.data.plan_schema import PlanSpec, load_plan_spec
from megatron_kaiyuan.documents.packing import PackedOrder
from megatron_kaiyuan.documents.rank_index import index_path, open_rank_index, write_rank_index
from megatron_kaiyuan.documents.shuffled import ShuffledOrder
from megatron_kaiyuan.errors import RankIndexError
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.score_files import score_path
from megatron_kaiyuan.shards.shard_files import Meter
from megatron_kaiyuan.shards.source import Source, open_source

__all__ = ["RankedSource", "rank_plan_sources"]


@dataclass(frozen=True, slots=True)
class RankedSource:
    """A source whose rank index, or the sums of an order of its documents, are there."""

    name: str
    source: Source
    path: Path
    built: bool
    """False: it was there before, belongs to these shards and scores, and is newer than they are."""


def rank_plan_sources(plan: Path, seed: int = 0, meter: Meter | None = None) -> Iterator[RankedSource]:
    """Build what each source lacks or has of old: rank indices, then the sums of large sets shuffled or packed whole.

    A run that was killed left whole indices or none, so the same call again does what is left.

    Args:
        plan: the plan file.
        seed: of the hash that orders equal scores.
        meter: hears of the progress of each build.

    Raises:
        PlanError: the plan file is wrong.
        ShardError, ScoreError, OSError: as `write_rank_index`.
    """
    spec = load_plan_spec(plan)
    yield from _rank(spec, seed, meter)
    parts = [part for phase in spec.phases for part in phase.sources.values()]
    if any(part.shuffle == "documents" or part.packing == "whole" for part in parts):
        yield from _sum_up(spec)


def _rank(plan: PlanSpec, seed: int, meter: Meter | None) -> Iterator[RankedSource]:
    for name, spec in plan.sources.items():
        if spec.score is None:
            continue
        source = open_source(name, spec.shards)
        path = Path(spec.rank_index) if spec.rank_index else index_path(source, spec.score)
        built = not _is_current(path, source, spec.score)
        if built:
            write_rank_index(source, spec.score, path, seed, meter)
        yield RankedSource(name, source, path, built)


def _sum_up(plan: PlanSpec) -> Iterator[RankedSource]:
    for order in stored_orders(Plan.from_spec(plan, indexed=False).phases):
        built = not _is_stored(order)
        if built:
            order.write()
        yield RankedSource(order.source.name, order.source, order.path, built)


def _is_stored(order: ShuffledOrder | PackedOrder) -> bool:
    try:
        order.open_stored()
    except RankIndexError:
        return False
    written = order.path.stat().st_mtime_ns  # probes identify the shards
    return max(Path(f"{shard.prefix}.idx").stat().st_mtime_ns for shard in order.source.shards) <= written


def _is_current(path: Path, source: Source, score: str) -> bool:
    try:
        open_rank_index(path, source, score)
    except RankIndexError:
        return False
    written = path.stat().st_mtime_ns  # probes identify the index's shards, and may miss a change inside
    inputs = [name for shard in source.shards for name in (f"{shard.prefix}.idx", score_path(shard.prefix, score))]
    return max(side_by_side(lambda name: Path(name).stat().st_mtime_ns, inputs)) <= written
