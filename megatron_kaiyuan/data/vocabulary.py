"""Whether the sources of a plan speak of the same vocabulary, and fit the model's, before training starts."""

from collections.abc import Mapping

import numpy as np

from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.plan_schema import TokenizerSpec
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.shard import Shard
from megatron_kaiyuan.shards.tokenizer_match import check_shards_agree, check_tokenizer_of_plan

__all__ = ["check_tokenizers", "check_vocabulary", "largest_token_id"]

_CHUNK = 1 << 22
_FULL_SCAN_TOKENS = 1 << 26
_FULL_SCAN_IN_ALL = 1 << 30
_PROBES = 64
_PROBED_TOKENS = 1 << 22


def check_vocabulary(opened: Mapping[str, OpenedSource], vocab_size: int) -> None:
    """Raise ShardError for the first shard that holds a token id outside `range(vocab_size)`.

    Shards without a manifest are read in whole while they have 2**30 tokens or fewer together; see `largest_token_id`.
    """
    shards = [(name, shard) for name, source in opened.items() for shard in source.source.shards]
    unknown = [shard for _, shard in shards if shard.record is None]
    few = sum(shard.tokens for shard in unknown) <= _FULL_SCAN_IN_ALL
    most = _FULL_SCAN_TOKENS if few else max(_FULL_SCAN_IN_ALL // len(unknown), 1 << 14)
    found = iter(side_by_side(lambda shard: largest_token_id(shard, most), unknown))
    for name, shard in shards:
        record = shard.record
        largest = next(found) if record is None else record.max_token_id
        if largest < vocab_size:
            continue
        remedy = "the shard was built with another tokenizer: build it again, or train with its tokenizer's vocabulary"
        if record is not None and record.tokenizer.vocab_size == vocab_size:
            remedy = (
                "the vocabulary of its tokenizer has gaps: train with --tokenizer-type NullTokenizer --vocab-size "
                f"{largest + 1} or more, or renumber the vocabulary and build the shard again"
            )
        raise ShardError(
            f"source {name!r}, shard {shard.prefix}: token id {largest}, but the vocabulary has "
            f"{counted(vocab_size, 'id')}; "
            f"{remedy}"
        )


def check_tokenizers(opened: Mapping[str, OpenedSource], tokenizer: TokenizerSpec | None) -> None:
    """Refuse shards built with different tokenizers, or with another one than the plan names.

    Shards without a manifest cannot be checked.
    The shards of one source must also agree on whether documents end with the end-of-document id.

    Raises:
        ShardError: names two shards, or a shard and the plan's tokenizer.
        PlanError: the plan's tokenizer cannot be read, so that it cannot be compared with the shards'.
    """
    known = {name: [shard for shard in source.source.shards if shard.record] for name, source in opened.items()}
    check_shards_agree(known)
    first = next((shard for shards in known.values() for shard in shards), None)
    if first is not None and tokenizer is not None:
        check_tokenizer_of_plan(tokenizer.type, tokenizer.model, first)


def largest_token_id(shard: Shard, most: int = _FULL_SCAN_TOKENS) -> int:
    """The largest token id among up to `most` tokens of a shard: all of them, or evenly spaced probes.

    Probes can miss a rare id: shards of that size should have a manifest. A negative id counts as a huge one.
    """
    if shard.tokens <= most:
        starts, size = np.arange(0, shard.tokens, _CHUNK), _CHUNK
    else:
        size = min(most, _PROBED_TOKENS) // _PROBES
        starts = np.linspace(0, shard.tokens - size, _PROBES).astype(np.int64)
    largest = (
        shard.read_tokens(start, min(size, shard.tokens - start)).view(f"u{shard.dtype.itemsize}").max()
        for start in starts.tolist()
    )
    return max(map(int, largest), default=-1)
