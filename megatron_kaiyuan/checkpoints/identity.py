"""What makes two checkpoints those of one run, beside the order of its samples: seed, tokenizer and model."""

import argparse
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from megatron_kaiyuan.checkpoints.model_identity import differences
from megatron_kaiyuan.errors import ResumeError
from megatron_kaiyuan.flags.identity import FUNCTION, RECIPE, WEIGHTS
from megatron_kaiyuan.shards.manifest import TokenizerRecord

__all__ = [
    "AVERAGING",
    "COMMAND_LINE_TOKENIZER",
    "END_OF_TEXT",
    "PLAN_RECORD",
    "TOKENIZER",
    "check_fitting_model",
    "check_same_run",
    "end_of_text",
    "first_difference",
    "probe_fingerprint",
    "store_tokenizer",
]

TOKENIZER = "kaiyuan_tokenizer"
"""Name of the argument with a fingerprint of what the tokenizer does. None where nothing is known of it."""

COMMAND_LINE_TOKENIZER = "kaiyuan_command_line_tokenizer"
"""What a tokenizer that the command line names does; apart from it, for manifests may be added to the shards later."""

END_OF_TEXT = "kaiyuan_end_of_text"
"""Name of the argument that holds the id which ends each document of the run; None where there is none."""

PLAN_RECORD = "kaiyuan_plan_record"
"""Name of the argument that holds `Plan.order_record()`."""

AVERAGING = "kaiyuan_averaging"
"""Name of the argument that holds which iterations the plan averages; `tools/average_checkpoints.py --planned`."""

_OF_THE_RUN = {
    "seed": "--seed",
    TOKENIZER: "the tokenizer (its fingerprint)",
    COMMAND_LINE_TOKENIZER: "--tokenizer-model (the fingerprint of what it does)",
}
_PROBE = "The 3 naïve Zürich engineers’ café: def f(x):\n\treturn x ** 2.5  # 数据\n\n«да»   end"


def store_tokenizer(
    args: argparse.Namespace, record: TokenizerRecord | None, tokenizer: object, *, planned: bool
) -> None:
    """Let every checkpoint of this run say what its tokenizer does.

    A plan's tokens come from its shards. Shards of stock Megatron have no manifest and so do not name their tokenizer.
    The tokenizer of the command line is asked for the ids of a text as well. Paths are no part.

    Args:
        args: Where it is stored.
        record: The tokenizer of the plan's shards, if they name one.
        tokenizer: The one that Megatron built from the arguments.
        planned: Whether the run has a plan.
    """
    told = _of_text(tokenizer)
    of_shards = None if record is None else record.fingerprint
    setattr(args, TOKENIZER, of_shards if planned else told)
    setattr(args, COMMAND_LINE_TOKENIZER, told if planned else None)
    setattr(args, END_OF_TEXT, record.eod_id if planned and record is not None else _eod_of(tokenizer))


def _eod_of(tokenizer: object) -> int | None:
    try:
        return None if (eod := tokenizer.eod) is None else int(eod)  # type: ignore[attr-defined]  # as above
    except (AttributeError, NotImplementedError):
        return None


def end_of_text(saved: argparse.Namespace) -> int | None:
    """Return the id that ended each document of the run that saved a checkpoint.

    None where it does not say.

    Args:
        saved: Arguments in the checkpoint, of this version or an earlier one.
    """
    of_numbers = saved.null_tokenizer_eod_id if getattr(saved, "tokenizer_type", None) == "NullTokenizer" else None
    told: int | None = getattr(saved, END_OF_TEXT, of_numbers)
    return told


def _of_text(tokenizer: object) -> str | None:
    try:
        return probe_fingerprint(tokenizer.tokenize)  # type: ignore[attr-defined]  # its base class is not exported
    except (ValueError, NotImplementedError):  # a NullTokenizer reads numbers
        return None


def probe_fingerprint(encode: Callable[[str], Iterable[int]]) -> str:
    """Return a fingerprint of the ids that a tokenizer gives to a text."""
    ids = encode(_PROBE)
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()


def first_difference(one: argparse.Namespace, other: argparse.Namespace) -> str | None:
    """Return the first flag in which the arguments of two checkpoints differ.

    None if they may be of the same run.
    """
    return next(iter([*_of_the_run(one, other), *map(str, differences(one, other, (*WEIGHTS, *FUNCTION)))]), None)


def _of_the_run(one: argparse.Namespace, other: argparse.Namespace) -> list[str]:
    pairs = {flag: (getattr(one, name, None), getattr(other, name, None)) for name, flag in _OF_THE_RUN.items()}
    return [
        f"{flag} was {before} and is now {now}"
        for flag, (before, now) in pairs.items()
        if before is not None and now is not None and before != now
    ]


def check_same_run(
    args: argparse.Namespace,
    saved: argparse.Namespace | None,
    defaults: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> list[str]:
    """Refuse to continue a run with another seed, tokenizer or model.

    Args:
        args: Arguments of this run, `store_tokenizer` included.
        saved: Arguments of the run to continue, if there is one.
        defaults: Of Megatron's parser, for options that a checkpoint of an earlier version lacks.
        only: Compare no other options of the model than these.

    Returns:
        Where the command line has overruled how the model is trained.

    Raises:
        ResumeError: names the flag and both values.
    """
    if saved is None:
        return []
    fixed = [*map(str, differences(saved, args, _among((*WEIGHTS, *FUNCTION), only), defaults))]
    if difference := next(iter([*_of_the_run(saved, args), *fixed]), None):
        raise ResumeError(
            f"--load {args.load}: {difference}. Restore it to continue that run; for a new one leave --load out (or "
            "add --finetune to start from these weights, where they fit) and name another --save directory"
        )
    return [*map(str, differences(saved, args, _among(RECIPE, only), defaults))]


def check_fitting_model(
    args: argparse.Namespace,
    loaded: argparse.Namespace,
    defaults: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> list[str]:
    """Refuse to start from the weights of another model.

    Args:
        args: Arguments of a run that begins anew with these weights.
        loaded: Arguments in their checkpoint.
        defaults: See `check_same_run`.
        only: Likewise.

    Returns:
        Where the command line has overruled the checkpoint: another tokenizer, function or way to train.

    Raises:
        ResumeError: the command line asks for other weights; names the flag and both values.
    """
    if wrong := differences(loaded, args, _among((*WEIGHTS, "padded_vocab_size"), only), defaults):
        raise ResumeError(
            f"{', '.join(map(str, wrong))}, but the weights come from {args.load or args.pretrained_checkpoint} and "
            "would not fit; leave it out to take the checkpoint's, or start without the checkpoint"
        )
    tokenizers = [told for told in _of_the_run(loaded, args) if not told.startswith("--seed ")]
    changed = differences(loaded, args, _among((*FUNCTION, *RECIPE), only), defaults)
    return [*tokenizers, *map(str, changed)]


def _among(names: Iterable[str], only: Collection[str] | None) -> list[str]:
    return [name for name in names if only is None or name in only]
