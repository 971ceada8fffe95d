"""Say what a checkpoint is, and whether its files are as they were saved."""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.terminal import counted, visible_data


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(
        description="Say what a checkpoint is: step, samples, parallel layout, model, options and identity of its run, "
        "sizes and checksums. No file of it can run code.",
        epilog="Exit code 1 if the checkpoint is damaged.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="iter_* folder, or save directory (its latest)"
    )
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with the checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> None:
    """Run the tool."""
    options = build_parser().parse_args()
    cpu_platform.install()
    from megatron_kaiyuan.checkpoints.damage import Verified, damage
    from megatron_kaiyuan.checkpoints.description import describe
    from megatron_kaiyuan.checkpoints.reading import open_checkpoint
    from megatron_kaiyuan.commands.verifying import shown_on
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    checkpoint = open_checkpoint(options.checkpoint)
    found = Verified(damage(checkpoint.folder))
    if found.damage is not None:
        raise ConfigError(f"{checkpoint.folder} {found}; restore it from a copy, or name another checkpoint")
    if options.verify:
        with ConsoleMeter() as meter:
            found = shown_on(meter)(checkpoint.folder)
    verified = False if found.damage else True if found.files else None
    told = visible_data(describe(checkpoint) | {"verified": verified, "damage": found.damage})
    say(json.dumps(told, indent=1) if options.json else as_text(told, looked=options.verify))
    if found.damage is not None:
        raise ConfigError(f"{checkpoint.folder} {found}; restore it from a copy, or name another checkpoint")


def as_text(told: dict[str, Any], *, looked: bool) -> str:
    """Return what `describe` returned as lines.

    `looked`: whether the files were compared with their checksums.
    """
    tensors, files = told["tensors"], told["files"]
    lines = [
        f"{told['folder']}: iteration {told['iteration']:,}, {_number(told['samples'])} samples, "
        f"{_number(told['tokens'])} tokens",
        f"layout: {_pairs(told['layout'])}",
        f"model: {_pairs(told['model'])}; {counted(tensors['model_values'], 'value')} in "
        f"{counted(tensors['model_tensors'], 'tensor')}, "
        f"{tensors['model_bytes'] / 1e9:,.3f} GB",
        f"options: {_pairs(told['options']) or 'none'}",
        f"identity: {_pairs(told['identity'])}",
    ]
    lines += [f"  {file['bytes']:>16,} B  {file['xxh3_128'] or 'no checksum':32}  {file['name']}" for file in files]
    lines.append(_verdict(told, looked=looked))
    return "\n".join(lines)


def _verdict(told: dict[str, Any], *, looked: bool) -> str:
    if told["damage"] is not None:
        return f"DAMAGED: it {told['damage']}"
    if told["verified"]:
        return "verified: every file is as it was saved"
    if any(file["xxh3_128"] for file in told["files"]):
        return "not compared with its checksums: add --verify"
    return "not verified: it has no checksums" + ("" if looked else ", only its form was looked at")


def _number(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, False))
