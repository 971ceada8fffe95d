"""Whether a source's token ids fit the model's vocabulary, before training starts."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.shards import Shard
from megatron_kaiyuan.errors import ShardError

__all__ = ["check_vocabulary", "largest_token_id"]

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
