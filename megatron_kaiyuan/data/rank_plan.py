"""Rank indices of all scored sources of a plan, in one go that can be run again."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_kaiyuan.data.plan_schema import load_plan_spec
from megatron_kaiyuan.documents.rank_index import index_path, open_rank_index, write_rank_index
from megatron_kaiyuan.errors import RankIndexError
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.score_files import score_path
from megatron_kaiyuan.shards.shard_files import Meter
from megatron_kaiyuan.shards.source import Source, open_source

__all__ = ["RankedSource", "rank_plan_sources"]


@dataclass(frozen=True, slots=True)
class RankedSource:
    """A source whose rank index is there."""

    name: str
    source: Source
    path: Path
    built: bool
    """False: it was there before, belongs to these shards and scores, and is newer than they are."""


def rank_plan_sources(plan: Path, seed: int = 0, meter: Meter | None = None) -> Iterator[RankedSource]:
    """Build the index of each scored source that has none, or an old one; in the order of the plan.

    A run that was killed left whole indices or none, so the same call again does what is left.

    Args:
        plan: the plan file.
        seed: of the hash that orders equal scores.
        meter: hears of the progress of each build.

    Raises:
        PlanError: the plan file is wrong.
        ShardError, ScoreError, OSError: as `write_rank_index`.
    """
    for name, spec in load_plan_spec(plan).sources.items():
        if spec.score is None:
            continue
        source = open_source(name, spec.shards)
        path = Path(spec.rank_index) if spec.rank_index else index_path(source, spec.score)
        built = not _is_current(path, source, spec.score)
        if built:
            write_rank_index(source, spec.score, path, seed, meter)
        yield RankedSource(name, source, path, built)


def _is_current(path: Path, source: Source, score: str) -> bool:
    try:
        open_rank_index(path, source, score)
    except RankIndexError:
        return False
    written = path.stat().st_mtime_ns  # the index is told from its shards by probes, which may miss a change inside
    inputs = [name for shard in source.shards for name in (f"{shard.prefix}.idx", score_path(shard.prefix, score))]
    return max(side_by_side(lambda name: Path(name).stat().st_mtime_ns, inputs)) <= written
