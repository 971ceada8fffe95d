"""Token ids back to text, with the tokenizer that the flags, the plan or the shards' manifests name."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_kaiyuan.errors import TokenizerError
from megatron_kaiyuan.shards.manifest import TokenizerRecord
from megatron_kaiyuan.shards.tokenizer import (
    TokenizerConfig,
    load_reference_tokenizer,
    model_file,
)
from megatron_kaiyuan.shards.tokenizer_match import find_mismatch

__all__ = ["TextDecoder", "choose_decoder"]

_TIKTOKEN_RESERVED = 1000


@dataclass(frozen=True, slots=True)
class TextDecoder:
    """How ids become text."""

    decode: Callable[[Sequence[int]], str]
    note: str
    """Which tokenizer it is, or why ids are shown instead; for the reader."""


def choose_decoder(kind: str | None, model: str | None, recorded: TokenizerRecord | None) -> TextDecoder:
    """The decoder to use.

    Args:
        kind: `--tokenizer-type`, or the plan's; None: what the manifest records.
        model: `--tokenizer-model`, or the plan's; None: what the manifest records.
        recorded: the tokenizer of the shards' manifests, if any.

    Returns:
        A decoder; one that shows ids where nothing names a tokenizer, or the recorded one is not on this machine.

    Raises:
        TokenizerError: the tokenizer that was asked for cannot be loaded.
    """
    if kind is None and recorded is None:
        return TextDecoder(
            _ids, "token ids: no manifest names a tokenizer; give --tokenizer-type and --tokenizer-model"
        )
    asked = kind or (recorded.type if recorded else "")
    if asked == "NullTokenizer":
        return TextDecoder(_ids, "token ids: a NullTokenizer's text is its ids")
    path = model or (recorded.model if recorded and recorded.type == asked else None)
    try:
        config = TokenizerConfig(type=asked, model=path)
        decode = (_tiktoken if asked == "TikTokenizer" else _reference)(config)
        decoder = TextDecoder(decode, f"decoded with {asked} {path}")
    except TokenizerError as error:
        if kind is not None or model is not None:
            raise
        return TextDecoder(_ids, f"token ids: the manifest's tokenizer cannot be loaded ({error})")
    mismatch = None if recorded is None else find_mismatch(asked, path, recorded, {})
    return decoder if mismatch is None else TextDecoder(decoder.decode, f"{decoder.note}: {mismatch.reason}")


def _ids(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def _reference(config: TokenizerConfig) -> Callable[[Sequence[int]], str]:
    return load_reference_tokenizer(config).decode


def _tiktoken(config: TokenizerConfig) -> Callable[[Sequence[int]], str]:
    """Return a decoder for Megatron's layout of TikToken ranks: reserved ids first, the ranks after them.

    The bytes of the tokens are joined.
    """
    try:
        entries = json.loads(model_file(config).read_bytes())
        if not isinstance(entries, list) or not entries:
            raise ValueError("not a list of ranks")
        pieces = {entry["rank"] + _TIKTOKEN_RESERVED: base64.b64decode(entry["token_bytes"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"--tokenizer-model {config.model}: not a TikTokenizer vocabulary ({error!r})") from error

    def decode(ids: Sequence[int]) -> str:
        return b"".join(pieces.get(number, b"<SPECIAL_%d>" % number) for number in ids).decode("utf-8", "replace")

    return decode
