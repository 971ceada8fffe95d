"""A strict reading of `--data-path` and its relatives, before Megatron guesses.

Megatron decides by parity, and by whether a word looks like a number, whether it reads weights or prefixes: it takes
`0.3 a b c` for four prefixes, and `30 a 70` for three. Here a blend is either all prefixes or all pairs of a weight and
a prefix; every prefix is opened, which also detects a truncated `.bin` that Megatron would read as garbage.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from megatron_kaiyuan.data import open_shard
from megatron_kaiyuan.errors import ConfigError

__all__ = ["check_blend", "check_data_arguments"]

_SPLITS = ("train", "valid", "test")


def check_data_arguments(args: argparse.Namespace) -> None:
    """Check every blend that the arguments of a run without a plan name.

    Raises:
        ConfigError: no data at all, a word that cannot be read, or a file of words that cannot.
        ShardError: a prefix without its `.bin/.idx` pair, or a damaged one.
    """
    blends = _blends(args)
    if not blends and not args.mock_data:
        raise ConfigError("the run has no data: give --plan FILE, or --data-path with a blend of prefixes")
    for flag, words in blends.items():
        check_blend(words, flag)


def check_blend(words: Sequence[str], flag: str) -> None:
    """Check one blend, named `flag` in errors."""
    if not words:
        raise ConfigError(f"{flag} is empty; give prefixes, or pairs of a weight and a prefix")
    weighted = [_is_weight(word) and not _is_shard(word) for word in words]
    if any(weighted):
        _check_pairs(words, weighted, flag)
    for word, is_weight in zip(words, weighted, strict=True):
        if not is_weight:
            open_shard(word)


def _check_pairs(words: Sequence[str], weighted: Sequence[bool], flag: str) -> None:
    """Weight, prefix, weight, prefix, ... to the end, every weight above zero."""
    for place, (word, is_weight) in enumerate(zip(words, weighted, strict=True)):
        if is_weight != (place % 2 == 0):
            expected = "a weight" if place % 2 == 0 else "a prefix"
            raise ConfigError(
                f"{flag} {' '.join(words)}: word {place + 1}, {word!r}, should be {expected}; "
                "give a weight before every prefix, or no weight at all"
            )
        if is_weight and not 0 < float(word) < math.inf:
            raise ConfigError(f"{flag}: weight {word} must be above 0; leave the prefix out to skip it")
    if len(words) % 2:
        raise ConfigError(f"{flag} {' '.join(words)}: the last weight, {words[-1]}, has no prefix after it")


def _is_weight(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_shard(word: str) -> bool:
    """Return whether a word is a shard, which it is where the shard's files exist.

    A shard may be called `2024`.
    """
    return Path(f"{word}.idx").is_file()


def _blends(args: argparse.Namespace) -> dict[str, list[str]]:
    """Words of each blend by the flag, or the file and key, that gave them."""
    blends = {
        flag: list(words)
        for flag, words in (
            ("--data-path", args.data_path),
            ("--train-data-path", args.train_data_path),
            ("--valid-data-path", args.valid_data_path),
            ("--test-data-path", args.test_data_path),
        )
        if words is not None
    }
    if args.data_args_path is not None:
        blends[f"--data-args-path {args.data_args_path}"] = _read(args.data_args_path).split()
    if args.per_split_data_args_path is not None:
        blends.update(_blends_of_splits(args.per_split_data_args_path))
    return blends


def _blends_of_splits(path: str) -> dict[str, list[str]]:
    flag = f"--per-split-data-args-path {path}"
    try:
        splits = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag}: not JSON ({error}); it should map train, valid and test to blends") from error
    if not isinstance(splits, dict) or set(splits) != set(_SPLITS):
        raise ConfigError(f"{flag}: its keys should be exactly train, valid and test")
    found = {}
    for split, words in splits.items():
        if words is not None:
            found[f"{flag} ({split})"] = words.split() if isinstance(words, str) else [str(word) for word in words]
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); it should hold the words of a blend") from error
