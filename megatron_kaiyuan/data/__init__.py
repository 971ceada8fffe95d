"""Data order as arithmetic: plans, quality curricula and selective repetition over `.bin/.idx` shards (numpy only)."""

from megatron_kaiyuan.data.dataset import NUM_BANDS, CurriculumDataset, HeldOutDataset, Provenance, band_name
from megatron_kaiyuan.data.plan import Plan
from megatron_kaiyuan.shards.shard import Shard, open_shard, resolve_prefixes
from megatron_kaiyuan.shards.source import Segment, Source, open_source

__all__ = [
    "NUM_BANDS",
    "CurriculumDataset",
    "HeldOutDataset",
    "Plan",
    "Provenance",
    "Segment",
    "Shard",
    "Source",
    "band_name",
    "open_shard",
    "open_source",
    "resolve_prefixes",
]
