"""Whether the sources of a plan speak of the same vocabulary, and fit the model's, before training starts."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.plan_schema import TokenizerSpec
from megatron_kaiyuan.errors import PlanError, ShardError, TokenizerError
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.manifest import ShardRecord
from megatron_kaiyuan.shards.shard import Shard

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
            f"source {name!r}, shard {shard.prefix}: token id {largest}, but the vocabulary has {vocab_size} ids; "
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
    _refuse_several_tokenizers([shard for shards in known.values() for shard in shards])
    for name, shards in known.items():
        _refuse_mixed_ends(name, shards)
    first = next((shard for shards in known.values() for shard in shards), None)
    if first is not None and tokenizer is not None:
        _compare_with_plan(first, tokenizer)


def _record(shard: Shard) -> ShardRecord:
    assert shard.record is not None
    return shard.record


def _refuse_several_tokenizers(shards: Sequence[Shard]) -> None:
    prints = [_record(shard).tokenizer.fingerprint for shard in shards]
    others = [shard for shard, fingerprint in zip(shards, prints, strict=True) if fingerprint != prints[0]]
    if others:
        raise ShardError(
            f"shards {shards[0].prefix} and {others[0].prefix} were built with different tokenizers (fingerprints "
            f"{prints[0][:12]} and {_record(others[0]).tokenizer.fingerprint[:12]}; {len(others):,} of {len(shards):,} "
            "shards differ from the first); build one kind again, they cannot share a vocabulary"
        )


def _refuse_mixed_ends(name: str, shards: Sequence[Shard]) -> None:
    first = {_record(shard).append_eod: shard for shard in reversed(shards)}
    if len(first) > 1:
        count = sum(not _record(shard).append_eod for shard in shards)
        raise ShardError(
            f"source {name!r}: documents of shard {first[True].prefix} end with the end-of-document id, those of "
            f"{first[False].prefix} do not ({count:,} of {len(shards):,} shards are without); build all of them with "
            "--append-eod or all without, or make two sources of them"
        )


def _compare_with_plan(shard: Shard, tokenizer: TokenizerSpec) -> None:
    # here and not above: the rest of this room needs neither Arrow nor a tokenizer
    from megatron_kaiyuan.shards.tokenizer import (
        SENTENCEPIECE_TYPES,
        TokenizerConfig,
        same_vocabulary,
        tokenizer_fingerprint,
    )

    record = _record(shard).tokenizer
    types = (record.type, tokenizer.type)
    if types[0] != types[1] and not set(types) <= set(SENTENCEPIECE_TYPES):
        _refuse_tokenizer(shard, tokenizer, f"a {record.type}")
    if tokenizer.type == "NullTokenizer":  # its ids are numbers already: there is no file
        return
    try:
        config = TokenizerConfig(type=tokenizer.type, model=tokenizer.model)
        named = [tokenizer_fingerprint(choice) for choice in same_vocabulary(config)]
    except TokenizerError as error:
        raise PlanError(
            f"tokenizer: the plan names {tokenizer.type} {tokenizer.model}, which cannot be compared with that of "
            f"shard {shard.prefix} ({error}); give the path of the tokenizer that the shards were built with (then "
            f"{record.model}), or leave tokenizer: out of the plan to compare the shards with each other alone"
        ) from error
    # options of a TikTokenizer are no part of a plan, and they decide ids too: of it, only the file must be there
    if tokenizer.type != "TikTokenizer" and record.fingerprint not in named:
        _refuse_tokenizer(shard, tokenizer, f"another one ({record.fingerprint[:12]}, then {record.model})", named[0])


def _refuse_tokenizer(shard: Shard, tokenizer: TokenizerSpec, built_with: str, fingerprint: str = "") -> NoReturn:
    told = f" (fingerprint {fingerprint[:12]})" if fingerprint else ""
    raise ShardError(
        f"tokenizer: the plan names {tokenizer.type} {tokenizer.model}{told}, shard {shard.prefix} was built with "
        f"{built_with}; build the shards again, or name their tokenizer"
    )


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
