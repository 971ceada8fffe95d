"""Whether the sources of a plan speak of the same vocabulary, and fit the model's, before training starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.plan_schema import TokenizerSpec
from megatron_kaiyuan.errors import PlanError, ShardError, TokenizerError
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.shard import Shard

__all__ = ["check_tokenizers", "check_vocabulary", "largest_token_id"]

_CHUNK = 1 << 22
_FULL_SCAN_TOKENS = 1 << 26
_FULL_SCAN_IN_ALL = 1 << 30
_PROBES = 64
_PROBED_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True)
class _Record:
    """What a manifest tells of the tokenizer of its shard."""

    prefix: str
    type: str
    model: str | None
    fingerprint: str
    append_eod: bool | None
    """Whether documents end with the end-of-document id; None: the manifest does not tell."""


def check_vocabulary(
    opened: Mapping[str, OpenedSource], vocab_size: int, recorded: Mapping[str, int] | None = None
) -> None:
    """Raise ShardError for the first shard that holds a token id outside `range(vocab_size)`.

    Shards without a manifest are read in whole while they have 2**30 tokens or fewer together; see `largest_token_id`.

    Args:
        opened: the sources by name.
        vocab_size: ids must be below it.
        recorded: largest token id by prefix, of every shard that has a manifest; None: the manifests are read.
    """
    shards = [(name, shard) for name, source in opened.items() for shard in source.source.shards]
    if recorded is None:
        told_ids = side_by_side(lambda item: _recorded_largest(item[1]), shards)
    else:
        told_ids = [recorded.get(shard.prefix) for _, shard in shards]
    unknown = [item for item, largest in zip(shards, told_ids, strict=True) if largest is None]
    few = sum(shard.tokens for _, shard in unknown) <= _FULL_SCAN_IN_ALL
    most = _FULL_SCAN_TOKENS if few else max(_FULL_SCAN_IN_ALL // len(unknown), 1 << 14)
    found = iter(side_by_side(lambda item: largest_token_id(item[1], most), unknown))
    for (name, shard), told in zip(shards, told_ids, strict=True):
        largest = next(found) if told is None else told
        if largest >= vocab_size:
            raise ShardError(
                f"source {name!r}, shard {shard.prefix}: token id {largest}, but the vocabulary has {vocab_size} ids; "
                "the shard was built with another tokenizer: build it again, or train with its tokenizer's vocabulary"
            )


def check_tokenizers(opened: Mapping[str, OpenedSource], tokenizer: TokenizerSpec | None) -> None:
    """Refuse shards built with different tokenizers, or with another one than the plan names.

    The manifest of every shard is read; shards without one, or whose manifest tells no tokenizer, cannot be checked.
    The shards of one source must also agree on whether documents end with the end-of-document id.

    Raises:
        ShardError: names two shards, or a shard and the plan's tokenizer.
        PlanError: the plan's tokenizer cannot be read, so that it cannot be compared with the shards'.
    """
    prefixes = {name: [shard.prefix for shard in source.source.shards] for name, source in opened.items()}
    several = list(dict.fromkeys(prefix for some in prefixes.values() for prefix in some))
    read = dict(zip(several, side_by_side(_tokenizer_of, several), strict=True))
    records = [record for record in read.values() if record is not None]
    _refuse_several_tokenizers(records)
    for name, some in prefixes.items():
        _refuse_mixed_ends(name, [record for prefix in some if (record := read[prefix]) is not None])
    if records and tokenizer is not None:
        _compare_with_plan(records[0], tokenizer)


def _refuse_several_tokenizers(records: Sequence[_Record]) -> None:
    others = [record for record in records if record.fingerprint != records[0].fingerprint]
    if others:
        raise ShardError(
            f"shards {records[0].prefix} and {others[0].prefix} were built with different tokenizers (fingerprints "
            f"{records[0].fingerprint[:12]} and {others[0].fingerprint[:12]}; {len(others):,} of {len(records):,} "
            "shards differ from the first); build one kind again, they cannot share a vocabulary"
        )


def _refuse_mixed_ends(name: str, records: Sequence[_Record]) -> None:
    first = {record.append_eod: record for record in reversed(records)}
    if True in first and False in first:
        count = sum(record.append_eod is False for record in records)
        raise ShardError(
            f"source {name!r}: documents of shard {first[True].prefix} end with the end-of-document id, those of "
            f"{first[False].prefix} do not ({count:,} of {len(records):,} shards are without); build all of them with "
            "--append-eod or all without, or make two sources of them"
        )


def _tokenizer_of(prefix: str) -> _Record | None:
    try:
        manifest = json.loads(Path(f"{prefix}.manifest.json").read_bytes())
        told, append_eod = manifest["tokenizer"], manifest.get("append_eod")
        return _Record(prefix, str(told["type"]), told["model"], str(told["fingerprint"]), append_eod)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # inspection tells what is wrong with it
        return None


def _compare_with_plan(record: _Record, tokenizer: TokenizerSpec) -> None:
    # here and not above: the rest of this room needs neither Arrow nor a tokenizer
    from megatron_kaiyuan.shards.tokenizer import SENTENCEPIECE_TYPES, TokenizerConfig, tokenizer_fingerprint

    types = (record.type, tokenizer.type)
    if types[0] != types[1] and not set(types) <= set(SENTENCEPIECE_TYPES):
        _refuse_tokenizer(record, tokenizer, f"a {record.type}")
    if tokenizer.type == "NullTokenizer":  # its ids are numbers already: there is no file
        return
    options = (True, False) if tokenizer.type == "HuggingFaceTokenizer" else (True,)
    try:
        named = [
            tokenizer_fingerprint(
                TokenizerConfig(type=tokenizer.type, model=tokenizer.model, include_special_tokens=option)
            )
            for option in options
        ]
    except TokenizerError as error:
        raise PlanError(
            f"tokenizer: the plan names {tokenizer.type} {tokenizer.model}, which cannot be compared with that of "
            f"shard {record.prefix} ({error}); give the path of the tokenizer that the shards were built with (then "
            f"{record.model}), or leave tokenizer: out of the plan to compare the shards with each other alone"
        ) from error
    # options of a TikTokenizer are no part of a plan, and they decide ids too: of it, only the file must be there
    if tokenizer.type != "TikTokenizer" and record.fingerprint not in named:
        _refuse_tokenizer(record, tokenizer, f"another one ({record.fingerprint[:12]}, then {record.model})", named[0])


def _refuse_tokenizer(record: _Record, tokenizer: TokenizerSpec, built_with: str, fingerprint: str = "") -> NoReturn:
    told = f" (fingerprint {fingerprint[:12]})" if fingerprint else ""
    raise ShardError(
        f"tokenizer: the plan names {tokenizer.type} {tokenizer.model}{told}, shard {record.prefix} was built with "
        f"{built_with}; build the shards again, or name their tokenizer"
    )


def _recorded_largest(shard: Shard) -> int | None:
    """The largest token id as the manifest tells it; None where there is no manifest."""
    manifest = Path(f"{shard.prefix}.manifest.json")
    try:
        return int(json.loads(manifest.read_text(encoding="utf-8"))["max_token_id"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{manifest}: not a manifest with max_token_id ({error!r}); build the shard again, or delete the "
            "manifest to have its tokens read instead"
        ) from error


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
