"""How many bytes of text each token stands for: turns nats per token into bits per byte."""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.checkpoints.tokenizer import CheckpointTokenizer, tokenizer_of_checkpoint
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ShardError, TokenizerError

__all__ = ["check_tokenizer", "token_bytes"]


def check_tokenizer(tokenizer_model: str | Path, saved: argparse.Namespace, plan: Plan | None) -> CheckpointTokenizer:
    """Return a tokenizer, if it is that of a checkpoint and knows the ids of the shards.

    Args:
        tokenizer_model: As for `named_config`.
        saved: Arguments in the checkpoint.
        plan: Names the shards; None: there are none.

    Raises:
        TokenizerError: says which.
    """
    path = Path(tokenizer_model)
    found = tokenizer_of_checkpoint(path, saved, "--tokenizer-model")
    try:
        if plan is not None:
            plan.check_vocabulary(found.tokenizer.vocab_size)
    except ShardError as error:
        raise TokenizerError(f"--tokenizer-model {path}: not the tokenizer of the shards: {error}") from error
    return found


def token_bytes(tokenizer_model: str | Path) -> NDArray[np.int64] | None:
    """Return the bytes of text that each token id stands for, int64 `[vocabulary]`.

    Special tokens stand for none.

    Args:
        tokenizer_model: Folder or file of a `tokenizer.json`.

    Returns:
        None when it is no byte-level `tokenizer.json`, such as a SentencePiece model or TikToken ranks: a token's bytes
        may then depend on its neighbours.

    Raises:
        TokenizerError: no such tokenizer.
    """
    path = Path(tokenizer_model)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise TokenizerError(f"{path}: no such tokenizer; give a folder with a tokenizer.json, or that file")
    try:
        content = json.loads(path.read_bytes())
    except ValueError:  # a SentencePiece model
        return None
    if not isinstance(content, dict) or (content.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    vocabulary = {**content["model"]["vocab"], **{entry["content"]: number for number, entry in added.items()}}
    result = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        if number not in added:
            result[number] = len(token)  # the byte-level alphabet has one character for each byte
        elif not added[number]["special"]:
            result[number] = len(token.encode())
    return result
