"""The tokenizer of a checkpoint: a file or folder that somebody names, compared with what the run recorded of its own.

Whether ids fit the model's rows says nothing: another tokenizer of the same size fits too, and gives nonsense.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_kaiyuan.checkpoints.identity import (
    COMMAND_LINE_TOKENIZER,
    PLAN_RECORD,
    TOKENIZER,
    end_of_text,
    probe_fingerprint,
)
from megatron_kaiyuan.errors import TokenizerError
from megatron_kaiyuan.host.files import read_regular
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.tokenizer import (
    TextTokenizer,
    TokenizerConfig,
    load_reference_tokenizer,
    tokenizer_fingerprint,
)
from megatron_kaiyuan.shards.tokenizer_match import same_vocabulary

__all__ = ["CheckpointTokenizer", "named_config", "tokenizer_of_checkpoint"]


@dataclass(frozen=True, slots=True)
class CheckpointTokenizer:
    """A tokenizer whose ids mean to the model what they meant in training."""

    config: TokenizerConfig
    tokenizer: TextTokenizer
    end: int | None
    """Id that ended each document of the run, or else what the tokenizer declares. None where neither is known."""
    compared: bool
    """Whether the checkpoint records its tokenizer, so that this one was compared with it."""

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text that goes on: without what the tokenizer puts at the end of a document."""
        ids: list[int] = self.tokenizer.encode([text]).tokens.tolist()
        after = list(self.tokenizer.special.after)
        return ids[: len(ids) - len(after)] if after and ids[-len(after) :] == after else ids


def named_config(path: Path, flag: str = "--tokenizer") -> TokenizerConfig:
    """Return the tokenizer in a file or folder, by what it holds.

    Args:
        path: Folder with a `tokenizer.json` or one `.model`; `tokenizer.json`; SentencePiece `.model`; or the JSON list
            of ranks of a TikTokenizer.
        flag: Gave the path, for messages.

    Raises:
        TokenizerError: there is no tokenizer.
    """
    file = path
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return TokenizerConfig(type="HuggingFaceTokenizer", model=str(path))
        models = sorted(path.glob("*.model"))
        if len(models) != 1:
            found = f"{len(models)} .model files" if models else "neither tokenizer.json nor a .model file"
            raise TokenizerError(f"{flag} {path}: {found} there; name the file of the tokenizer")
        file = models[0]
    try:
        content = read_regular(file)
    except OSError as error:
        raise TokenizerError(
            f"{flag} {path}: {error.strerror} (looked in {Path.cwd()}); give its folder or file"
        ) from error
    return TokenizerConfig(type=_type_of(content), model=str(file))


def _type_of(content: bytes) -> str:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return "SentencePieceTokenizer"
    return "TikTokenizer" if isinstance(parsed, list) else "HuggingFaceTokenizer"


def tokenizer_of_checkpoint(path: Path, saved: argparse.Namespace, flag: str = "--tokenizer") -> CheckpointTokenizer:
    """Open a tokenizer for the model of a checkpoint.

    Args:
        path: As for `named_config`.
        saved: Arguments in the checkpoint.
        flag: Gave the path, for messages.

    Raises:
        TokenizerError: it is another tokenizer than the checkpoint's, or has ids that the model has no row for.
    """
    choices = _choices(named_config(path, flag), saved)
    planned = getattr(saved, PLAN_RECORD, None) is not None
    of_file = getattr(saved, TOKENIZER, None) if planned else None
    of_ids = getattr(saved, COMMAND_LINE_TOKENIZER if planned else TOKENIZER, None)
    if of_file is not None:
        found = next((config for config in choices if tokenizer_fingerprint(config) == of_file), None)
    elif of_ids is not None:
        found = next((config for config in choices if _fingerprint_of_ids(config) == of_ids), None)
    else:
        found = choices[0]
    if found is None:
        told = f"fingerprint {of_file[:12]}, here {tokenizer_fingerprint(choices[0])[:12]}" if of_file else "other ids"
        raise TokenizerError(
            f"{flag} {path}: another one than the model was trained with ({told}); give the tokenizer that built "
            "its shards"
        )
    return _fitting(f"{flag} {path}", found, saved, compared=of_file is not None or of_ids is not None)


def _choices(config: TokenizerConfig, saved: argparse.Namespace) -> list[TokenizerConfig]:
    """Return the tokenizer with each choice of the options that no file holds, the likeliest first."""
    if config.type != "TikTokenizer":
        return same_vocabulary(config)
    known = replace(
        config,
        vocab_size=saved.vocab_size,
        tiktoken_pattern=getattr(saved, "tiktoken_pattern", None) or config.tiktoken_pattern,
        tiktoken_num_special_tokens=getattr(saved, "tiktoken_num_special_tokens", None)
        or config.tiktoken_num_special_tokens,
    )
    patterns: list[Literal["v1", "v2"]] = [known.tiktoken_pattern, "v1", "v2"]
    return [choice for pattern in patterns for choice in same_vocabulary(replace(known, tiktoken_pattern=pattern))]


def _fingerprint_of_ids(config: TokenizerConfig) -> str:
    tokenizer = load_reference_tokenizer(config)
    return probe_fingerprint(lambda text: tokenizer.encode([text]).tokens.tolist())


def _fitting(named: str, config: TokenizerConfig, saved: argparse.Namespace, *, compared: bool) -> CheckpointTokenizer:
    tokenizer = load_reference_tokenizer(config)
    rows = saved.padded_vocab_size
    if tokenizer.vocab_size > rows:
        raise TokenizerError(
            f"{named}: its ids go up to {tokenizer.vocab_size - 1}, the model has {counted(rows, 'row')}; give the "
            "tokenizer that the model was trained with"
        )
    # A NullTokenizer that was given no such id makes one up.
    invented = getattr(saved, "tokenizer_type", None) == "NullTokenizer" and saved.null_tokenizer_eod_id is None
    end = None if invented else end_of_text(saved)
    end = tokenizer.eod_id if end is None else end
    if end is not None and end >= tokenizer.vocab_size:
        raise TokenizerError(
            f"{named}: it has {counted(tokenizer.vocab_size, 'id')}, but the documents of the run ended with id {end}; "
            "give the tokenizer that the model was trained with"
        )
    return CheckpointTokenizer(config, tokenizer, end, compared)
