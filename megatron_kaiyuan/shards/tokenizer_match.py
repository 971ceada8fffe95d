"""Compare tokenizers: those of shards with each other, and with one that a plan, a command line or a reader names.

Two tokenizers are one where they give the same id the same meaning. The path and options that only change which ids a
text gets are no part of that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_kaiyuan.errors import PlanError, ShardError, TokenizerError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.manifest import TokenizerRecord
from megatron_kaiyuan.shards.shard import Shard
from megatron_kaiyuan.shards.tokenizer import SENTENCEPIECE_TYPES, TokenizerConfig, tokenizer_fingerprint

__all__ = [
    "Mismatch",
    "built_with",
    "check_shards_agree",
    "check_tokenizer_of_plan",
    "different_tokenizers",
    "find_mismatch",
    "same_vocabulary",
]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a named tokenizer cannot stand for that of the shards."""

    reason: str
    """Follows the tokenizer's name and a colon in a message."""
    unreadable: bool = False
    """The named tokenizer could not be read, so that nothing was compared."""


def find_mismatch(
    kind: str, model: str | None, record: TokenizerRecord, options: Mapping[str, Any] | None = None
) -> Mismatch | None:
    """Compare a named tokenizer with the one that a manifest records.

    Args:
        kind: `--tokenizer-type`.
        model: `--tokenizer-model`. A NullTokenizer has none: its ids are numbers already.
        record: Of the shards' manifests.
        options: Further fields of `TokenizerConfig` that decide what the ids of a TikTokenizer mean. Where they are not
            known, only its file must be there.

    Returns:
        None where both give the ids the same meaning.
    """
    if kind != record.type and not {kind, record.type} <= set(SENTENCEPIECE_TYPES):
        return Mismatch(f"it is of another type than that of the shards ({record.type})")
    if kind == "NullTokenizer":
        return None
    try:
        config = TokenizerConfig(type=kind, model=model, **(options or {}))
        fingerprints = [tokenizer_fingerprint(choice) for choice in same_vocabulary(config)]
    except TokenizerError as error:
        return Mismatch(f"it cannot be compared with that of the shards ({error})", unreadable=True)
    if record.fingerprint in fingerprints or (kind == "TikTokenizer" and options is None):
        return None
    prints = f"fingerprint {fingerprints[0][:12]}, that of the shards {record.fingerprint[:12]}"
    return Mismatch(f"it is another one ({prints})")


def same_vocabulary(config: TokenizerConfig) -> list[TokenizerConfig]:
    """Return a tokenizer with every choice of the options that decide ids but not what an id means, itself first."""
    specials = (True, False) if config.type == "HuggingFaceTokenizer" else (config.include_special_tokens,)
    splits = (False, True) if config.type in ("HuggingFaceTokenizer", "TikTokenizer") else (False,)
    choices = [
        replace(config, include_special_tokens=special, split_special_tokens=split)
        for special in specials
        for split in splits
    ]
    return [config, *(choice for choice in choices if choice != config)]


def check_tokenizer_of_plan(kind: str, model: str, shard: Shard) -> None:
    """Refuse a tokenizer that the plan names and that did not make the ids of its shards.

    Args:
        kind: `type` in the plan.
        model: `model` in the plan.
        shard: Any of its shards that has a manifest.

    Raises:
        ShardError: the shard was built with another one.
        PlanError: the plan's tokenizer cannot be read.
    """
    assert shard.record is not None
    record = shard.record.tokenizer
    mismatch = find_mismatch(kind, model, record)
    if mismatch is None:
        return
    message = f"tokenizer: {kind} {model}: {mismatch.reason}. Shard {shard.prefix} was {built_with(record)}; "
    if mismatch.unreadable:
        raise PlanError(
            f"{message}give the path of that tokenizer, or leave tokenizer: out of the plan to compare the shards with "
            "each other alone"
        )
    raise ShardError(f"{message}build the shards again, or name their tokenizer")


def built_with(record: TokenizerRecord) -> str:
    """Return the words of every message about it."""
    return f"built with {record.type} {record.model or ''}".rstrip()


def check_shards_agree(sources: Mapping[str, Sequence[Shard]]) -> None:
    """Refuse shards of several tokenizers, and sources whose documents end in two ways.

    Args:
        sources: Shards with a manifest by the name of their source.

    Raises:
        ShardError: names two shards that differ.
    """
    known = [shard for shards in sources.values() for shard in shards]
    records = [(shard.prefix, shard.record.tokenizer) for shard in known if shard.record]
    if message := different_tokenizers(records):
        raise ShardError(f"{message}; build one kind again, they cannot share a vocabulary")
    for name, shards in sources.items():
        _refuse_mixed_ends(name, shards)


def different_tokenizers(records: Sequence[tuple[str, TokenizerRecord]]) -> str | None:
    """Return a message that names the first two shards of different tokenizers.

    None where all are of one.

    Args:
        records: Prefix and tokenizer of each shard.
    """
    others = [(prefix, record) for prefix, record in records if record.fingerprint != records[0][1].fingerprint]
    if not others:
        return None
    prints = f"{records[0][1].fingerprint[:12]} and {others[0][1].fingerprint[:12]}"
    return (
        f"shards {records[0][0]} and {others[0][0]} were built with different tokenizers (fingerprints {prints}; "
        f"{len(others):,} of {counted(len(records), 'shard')} differ from the first)"
    )


def _refuse_mixed_ends(name: str, shards: Sequence[Shard]) -> None:
    ends = {shard.prefix: shard.record.append_eod for shard in shards if shard.record}
    first = {end: prefix for prefix, end in reversed(ends.items())}
    if len(first) > 1:
        count = sum(not end for end in ends.values())
        raise ShardError(
            f"source {name!r}: documents of shard {first[True]} end with the end-of-document id, those of "
            f"{first[False]} do not ({count:,} of {counted(len(ends), 'shard')} are without); build all of them with "
            "--append-eod or all without, or make two sources of them"
        )
