"""Whether the data of a run without a plan last for it, looked at before Megatron builds its indexes.

Megatron's builder counts passes in a loop that never ends over a part without a token, reads on past the end of a
blend without weights, and asks for an evaluation where there is nothing to evaluate on.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_kaiyuan.data import open_shard
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.terminal import counted

__all__ = ["settle_splits"]

_PARTS = ("train", "valid", "test")
_PATHS = ("--train-data-path", "--valid-data-path", "--test-data-path")


@dataclass(frozen=True, slots=True)
class _Blend:
    """What one part of the data is made of."""

    flag: str
    """As the user gave it."""
    prefixes: Sequence[str]
    weighted: bool
    share: tuple[float, float] = (0.0, 1.0)
    """First and last place in each prefix, of its documents."""

    def sizes(self) -> list[tuple[str, int, int, int]]:
        """Return of each prefix its name, documents of this part, documents in all, and tokens of this part.

        Rounded as Megatron does. A prefix that is named twice counts twice.
        """
        found = []
        for prefix in self.prefixes:
            shard = open_shard(prefix)
            first, last = (round(place * float(shard.documents)) for place in self.share)
            tokens = int(shard.lengths[first:last].sum(dtype="int64"))
            found.append((prefix, last - first, shard.documents, tokens))
        return found


def settle_splits(args: argparse.Namespace) -> str | None:
    """Refuse data that would not last, and switch evaluation off where none are held out.

    Args:
        args: Validated arguments of a run without a plan; changed where there is nothing to evaluate on.

    Returns:
        What was switched off, to be said aloud.

    Raises:
        ConfigError: a part has a share and no document, or no token; a blend without weights is too short for the run;
            there is nothing to train on; or a flag of the parts cannot be read.
    """
    if args.mock_data:
        return None
    blends = _blends(args)
    if blends["train"] is None and not args.skip_train:
        raise ConfigError(f"{_given(args)}: nothing is left to train on; give the train part data, or add --skip-train")
    if blends["valid"] is None and blends["test"] is not None and args.eval_iters:
        raise ConfigError(
            f"{_given(args)}: data to test on, but none to validate on, which Megatron does both by --eval-iters; give "
            "the valid part data too, or the test part none"
        )
    said = None
    if blends["valid"] is None and args.eval_iters:
        args.eval_iters = 0
        said = f"{_given(args)} holds out no data: no evaluation (--eval-iters 0)"
    wanted = _wanted(args)
    for part, blend in blends.items():
        if blend is not None and wanted[part]:
            _check(args, part, blend, wanted[part])
    return said


def _check(args: argparse.Namespace, part: str, blend: _Blend, wanted: int) -> None:
    sizes = blend.sizes()
    for prefix, documents, of, tokens in sizes:
        if documents == 0 or tokens == 0:
            what = (
                f"{documents} of {counted(of, 'document')}"
                if documents == 0
                else f"{counted(documents, 'document')} without a token"
            )
            remedy = "" if part == "train" else ", or --eval-iters 0"
            raise ConfigError(f"{blend.flag} leaves {what} of {prefix} for {part}; give it a larger share{remedy}")
    if blend.weighted or len(sizes) == 1 or args.dataloader_type == "cyclic":
        return
    samples = [(tokens - 1) // args.seq_length for _, _, _, tokens in sizes]
    empty = [prefix for (prefix, *_), number in zip(sizes, samples, strict=True) if number == 0]
    if empty:
        raise ConfigError(
            f"{blend.flag}: the {part} part of {empty[0]} has fewer tokens than a sample of {args.seq_length} and one "
            "more; leave it out, or give every prefix a weight before it"
        )
    if sum(samples) < wanted:
        raise ConfigError(
            f"{blend.flag} names {counted(len(samples), 'prefix', 'prefixes')} without weights, which are read once: "
            f"{counted(sum(samples), 'sample')} to {part}, but the run asks for {wanted}; give a weight before "
            "each prefix, which repeats them, or ask for less"
        )


def _wanted(args: argparse.Namespace) -> dict[str, int]:
    """Samples that the run asks each part for, as Megatron counts them."""
    train = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    steps = args.train_iters or train // args.global_batch_size
    evaluations = 1 if args.skip_train else steps // args.eval_interval + 1
    if args.start_eval_at_iter is not None and not args.skip_train:
        evaluations = max(0, evaluations - args.start_eval_at_iter // args.eval_interval)
    once = args.eval_iters * args.eval_global_batch_size
    return {"train": 0 if args.skip_train else train, "valid": evaluations * once, "test": once}


def _blends(args: argparse.Namespace) -> dict[str, _Blend | None]:
    blend, of_parts = get_blend_and_blend_per_split(args)
    if of_parts is not None:
        return {
            part: None if named is None else _Blend(f"{_of_part(args, number)}", named[0], named[1] is not None)
            for number, (part, named) in enumerate(zip(_PARTS, of_parts, strict=True))
        }
    prefixes, weights = blend
    matrix = _matrix(args)
    return {
        part: None if share is None else _Blend(f"--split {args.split}", prefixes, weights is not None, share)
        for part, share in zip(_PARTS, matrix, strict=True)
    }


def _of_part(args: argparse.Namespace, number: int) -> str:
    path = args.per_split_data_args_path
    return _PATHS[number] if path is None else f"--per-split-data-args-path {path} ({_PARTS[number]})"


def _matrix(args: argparse.Namespace) -> Sequence[tuple[float, float] | None]:
    if args.split is None:
        raise ConfigError("--data-args-path without --split: say how the documents are parted, such as --split 98,2,0")
    words = re.split(r"[,\s]+", args.split.strip())
    if not all(re.fullmatch(r"\d*\.?\d+|\d+\.", word) for word in words) or not 1 <= len(words) <= len(_PARTS):
        raise ConfigError(
            f"--split {args.split}: up to three shares, for training, validation and test, such as --split 98,2,0"
        )
    if not any(float(word) for word in words):
        raise ConfigError(f"--split {args.split}: all shares are 0; give training one, such as --split 98,2,0")
    matrix: Sequence[tuple[float, float] | None] = convert_split_vector_to_split_matrix(
        parse_and_normalize_split(args.split)
    )
    return matrix


def _given(args: argparse.Namespace) -> str:
    """The flags that part the data."""
    if args.split is not None:
        return f"--split {args.split}"
    if args.per_split_data_args_path is not None:
        return f"--per-split-data-args-path {args.per_split_data_args_path}"
    present = [flag for flag in _PATHS if getattr(args, flag[2:].replace("-", "_")) is not None]
    return f"{' and '.join(present)} alone"
