"""Documents to Megatron shards with score sidecars.

Needs neither torch nor Megatron.
"""

from megatron_kaiyuan.preprocess.build_folder import missing_shards
from megatron_kaiyuan.preprocess.config import PreprocessConfig
from megatron_kaiyuan.preprocess.dry_run import DryRun, dry_run
from megatron_kaiyuan.preprocess.pipeline import RunSummary, preprocess
from megatron_kaiyuan.preprocess.writer import ShardWriter, optimal_dtype
from megatron_kaiyuan.shards.build_record import BuildRecord, load_build, shard_prefix
from megatron_kaiyuan.shards.manifest import Manifest, load_manifest, verify_manifest
from megatron_kaiyuan.shards.tokenizer import TokenizerConfig, tokenizer_fingerprint

__all__ = [
    "BuildRecord",
    "DryRun",
    "Manifest",
    "PreprocessConfig",
    "RunSummary",
    "ShardWriter",
    "TokenizerConfig",
    "dry_run",
    "load_build",
    "load_manifest",
    "missing_shards",
    "optimal_dtype",
    "preprocess",
    "shard_prefix",
    "tokenizer_fingerprint",
    "verify_manifest",
]
