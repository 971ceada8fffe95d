"""Documents to Megatron shards with score sidecars; needs neither torch nor Megatron."""

from megatron_kaiyuan.preprocess.build_record import BuildRecord, load_build, missing_shards
from megatron_kaiyuan.preprocess.config import PreprocessConfig, shard_prefix
from megatron_kaiyuan.preprocess.pipeline import RunSummary, preprocess
from megatron_kaiyuan.preprocess.tokenize import TokenizerConfig, tokenizer_fingerprint
from megatron_kaiyuan.preprocess.writer import ShardWriter, optimal_dtype
from megatron_kaiyuan.shards.manifest import Manifest, load_manifest, verify_manifest

__all__ = [
    "BuildRecord",
    "Manifest",
    "PreprocessConfig",
    "RunSummary",
    "ShardWriter",
    "TokenizerConfig",
    "load_build",
    "load_manifest",
    "missing_shards",
    "optimal_dtype",
    "preprocess",
    "shard_prefix",
    "tokenizer_fingerprint",
    "verify_manifest",
]
