"""Whether the sources of a plan speak of the same vocabulary, and fit the model's, before training starts."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.plan_schema import TokenizerSpec
from megatron_kaiyuan.data.shards import Shard
from megatron_kaiyuan.errors import ShardError, TokenizerError

__all__ = ["check_tokenizers", "check_vocabulary", "largest_token_id"]

_CHUNK = 1 << 22
_FULL_SCAN_TOKENS = 1 << 26
_PROBES = 64


def check_vocabulary(opened: Mapping[str, OpenedSource], vocab_size: int) -> None:
    """Raise ShardError for the first shard that holds a token id outside `range(vocab_size)`."""
    for name, source in opened.items():
        for shard in source.source.shards:
            largest = largest_token_id(shard)
            if largest >= vocab_size:
                raise ShardError(
                    f"source {name!r}, shard {shard.prefix}: token id {largest}, but the vocabulary has "
                    f"{vocab_size} ids; the "
                    "shard was built with another tokenizer: build it again, or train with its tokenizer's vocabulary"
                )


def check_tokenizers(opened: Mapping[str, OpenedSource], tokenizer: TokenizerSpec | None) -> None:
    """Refuse sources built with different tokenizers, or with another one than the plan names.

    The manifests of the first and the last shard of each source are read; shards without one cannot be checked, and
    `tools/inspect_data.py` compares all shards of a source.

    Raises:
        ShardError: names two shards, or a shard and the plan's tokenizer.
    """
    first: tuple[str, str] | None = None
    for source in opened.values():
        shards = source.source.shards
        for prefix in dict.fromkeys((shards[0].prefix, shards[-1].prefix)):
            fingerprint = _tokenizer_of(prefix)
            if fingerprint is None:
                continue
            first = first or (prefix, fingerprint)
            if fingerprint != first[1]:
                raise ShardError(
                    f"shards {first[0]} and {prefix} were built with different tokenizers (fingerprints "
                    f"{first[1][:12]} and {fingerprint[:12]}); build one of them again, they cannot share a vocabulary"
                )
    if first is not None and tokenizer is not None:
        _compare_with_plan(first[0], first[1], tokenizer)


def _tokenizer_of(prefix: str) -> str | None:
    try:
        return str(json.loads(Path(f"{prefix}.manifest.json").read_text(encoding="utf-8"))["tokenizer"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):  # inspection tells what is wrong with it
        return None


def _compare_with_plan(prefix: str, fingerprint: str, tokenizer: TokenizerSpec) -> None:
    # here and not above: the rest of this room needs neither Arrow nor a tokenizer
    from megatron_kaiyuan.preprocess.tokenize import TokenizerConfig, tokenizer_fingerprint

    if tokenizer.type == "TikTokenizer":  # its options are no part of a plan, and they decide ids too
        return
    options = (True, False) if tokenizer.type == "HuggingFaceTokenizer" else (True,)
    try:
        configs = [
            TokenizerConfig(type=tokenizer.type, model=tokenizer.model, include_special_tokens=option)
            for option in options
        ]
        named = [tokenizer_fingerprint(config) for config in configs]
    except TokenizerError:  # it is not on this machine: only the shards can be compared
        return
    if fingerprint not in named:
        raise ShardError(
            f"tokenizer: the plan names {tokenizer.type} {tokenizer.model} (fingerprint {named[0][:12]}), shard "
            f"{prefix} was built with another one ({fingerprint[:12]}); build the shards again, or name their tokenizer"
        )


def largest_token_id(shard: Shard) -> int:
    """The largest token id of a shard, as far as it can be known quickly.

    From the manifest where there is one; by reading all tokens up to 64 Mi of them; else from evenly spaced probes,
    which can miss a rare id: shards of that size should have a manifest. A negative id counts as a huge one.
    """
    manifest = Path(f"{shard.prefix}.manifest.json")
    if manifest.is_file():
        try:
            return int(json.loads(manifest.read_text(encoding="utf-8"))["max_token_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(
                f"{manifest}: not a manifest with max_token_id ({error!r}); build the shard again, or delete the "
                "manifest to have its tokens read instead"
            ) from error
    data = shard.token_data.view(np.dtype(f"u{shard.dtype.itemsize}"))
    if shard.tokens <= _FULL_SCAN_TOKENS:
        return max((int(data[start : start + _CHUNK].max()) for start in range(0, len(data), _CHUNK)), default=-1)
    starts = np.linspace(0, len(data) - _CHUNK // _PROBES, _PROBES).astype(np.int64)
    return max(int(data[start : start + _CHUNK // _PROBES].max()) for start in starts)
