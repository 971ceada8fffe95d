"""Documents to Megatron shards with score sidecars; needs neither torch nor Megatron."""

from megatron_kaiyuan.preprocess.manifest import Manifest, load_manifest, verify_manifest
from megatron_kaiyuan.preprocess.pipeline import PreprocessConfig, RunSummary, preprocess, shard_prefix
from megatron_kaiyuan.preprocess.tokenize import TokenizerConfig, tokenizer_fingerprint
from megatron_kaiyuan.preprocess.writer import ShardWriter, optimal_dtype

__all__ = [
    "Manifest",
    "PreprocessConfig",
    "RunSummary",
    "ShardWriter",
    "TokenizerConfig",
    "load_manifest",
    "optimal_dtype",
    "preprocess",
    "shard_prefix",
    "tokenizer_fingerprint",
    "verify_manifest",
]
