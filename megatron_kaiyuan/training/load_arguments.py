"""Refuse a run that shall start from a checkpoint where there is none.

Megatron warns in the midst of its log, trains from random weights and ends with code 0.
"""

import argparse
from pathlib import Path

from megatron_kaiyuan.checkpoints.reading import TRACKER_NAME, saved_iterations
from megatron_kaiyuan.errors import ConfigError

__all__ = ["check_load"]


def check_load(args: argparse.Namespace) -> None:
    """Refuse `--load` and `--pretrained-checkpoint` that name no checkpoint, but for a folder that the run will fill.

    A conversion must not write into a folder that has a checkpoint either.

    Args:
        args: Parsed, not yet validated.

    Raises:
        ConfigError: names the flag and the folder.
    """
    if args.ckpt_convert_format is not None and args.ckpt_convert_save is not None:
        _check_conversion(Path(args.ckpt_convert_save) / args.ckpt_convert_format, args.ckpt_convert_save)
    if args.non_persistent_ckpt_type is not None or _has_checkpoint(args.load):
        return  # local checkpoints are Megatron's affair
    if args.pretrained_checkpoint is not None:
        if not _has_checkpoint(args.pretrained_checkpoint):
            raise ConfigError(_missing(f"--pretrained-checkpoint {args.pretrained_checkpoint}"))
        return
    if args.load is None:
        return
    if args.exit_on_missing_checkpoint:
        raise ConfigError(
            f"--exit-on-missing-checkpoint: --load {args.load} has no {TRACKER_NAME}: nothing to continue; leave the "
            "flag out to start at the first sample"
        )
    if args.finetune or args.save is None or Path(args.load).resolve() != Path(args.save).resolve():
        raise ConfigError(_missing(f"{'--finetune ' * bool(args.finetune)}--load {args.load}"))


def _check_conversion(output: Path, asked: str) -> None:
    if _has_checkpoint(str(output)):
        raise ConfigError(f"--ckpt-convert-save {asked}: {output} has a checkpoint already; name another folder")


def _missing(flag: str) -> str:
    return (
        f"{flag} has no {TRACKER_NAME}: no checkpoint to start from; name the folder that --save had, or leave the "
        "flag out to start from random weights (--load may name the folder of --save before it exists)"
    )


def _has_checkpoint(folder: str | None) -> bool:
    return folder is not None and ((Path(folder) / TRACKER_NAME).is_file() or bool(saved_iterations(Path(folder))))
