"""Make a release of a run: weights, tokenizer, licence, model card, data card, and how to make the model again."""

import argparse
import re
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import KaiyuanError, ReleaseError
from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.host.cli import CommandParser, say, tool
from megatron_kaiyuan.host.terminal import counted, visible


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(
        description="Make a release of a run: a model folder for Hugging Face with model card, data card and the "
        "commands that made it, from what the run recorded; unknown facts are listed as unknown. On the CPU."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="what --save named in training, or one of its iter_*")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the release; must be new")
    parser.add_argument("--check", action="store_true", help="write nothing, say what the release still lacks")
    parser.add_argument(
        "--averaged", type=Path, metavar="DIR", help="average of the run: the main weights; the last ones go to last/"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder or file of the run")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="plan of the run (default: the one it names)")
    parser.add_argument(
        "--metrics", type=Path, metavar="FILE", help="metrics.jsonl of the run (default: the one in its folder)"
    )
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help=f"what {tool('evaluate')} --json wrote")
    parser.add_argument("--name", help="name of the model (default: that of the output folder, or of the run)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights by the Hub's name, such as apache-2.0")
    parser.add_argument("--license-file", type=Path, metavar="FILE", help="its text")
    parser.add_argument("--language", metavar="CODE,...", help="languages of the model, such as en,zh")
    parser.add_argument("--hardware", metavar="TEXT", help="what it was trained on, such as '8 x H200'")
    parser.add_argument("--layout", default="auto", help=f"as in {tool('convert')} export (default auto)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="dtype of the weights (default: as stored)"
    )
    return parser


def main() -> None:
    """Run the tool."""
    options = build_parser().parse_args()
    if options.check == (options.output is not None):
        raise ReleaseError("give --output DIR to write a release, or --check to hear what it would lack")
    cpu_platform.install()
    from megatron_kaiyuan.release.kit import examine_release, write_release
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    refused = _wrong_options(options)
    with ConsoleMeter() as meter:
        parts, request = _asked(options, meter, refused)
        if options.check:
            facts, more = examine_release(parts, request)
            refused += more
        elif refused:
            raise ReleaseError("; ".join(refused))
        else:
            meter.start("releasing", sum(part.checkpoint.num_bytes for part in parts.weights))
            facts = write_release(parts, request, options.output, meter.advance)
    if options.output:
        say(f"{options.output}: layout {facts['layout']['name']}, {facts['dtype']}")
    for line in refused:
        say(f"refused {line}")
    for line in facts["unknown"]:
        say(f"lacks {line}")
    if options.check and (refused or facts["unknown"]):
        lacking = counted(len(facts["unknown"]), "fact or part", "facts or parts")
        raise ReleaseError(f"{counted(len(refused), 'input')} refused, {lacking} lacking")


def _wrong_options(options: argparse.Namespace) -> list[str]:
    """What is wrong with the words themselves."""
    odd = [code for code in _languages(options) if not _is_code(code)]
    wrong = [f"--language {code!r}: no code such as en, zh or pt-BR" for code in odd]
    for flag in ("name", "license", "hardware"):
        text = getattr(options, flag)
        if text is not None and (not text.strip() or visible(text) != text or "\n" in text):
            wrong.append(f"--{flag} {text!r}: empty, or more than a line; give one line of text")
    return wrong


def _languages(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(code.strip() for code in (options.language or "").split(",") if code.strip())


def _is_code(code: str) -> bool:
    return re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code", code) is not None


def _asked(options: argparse.Namespace, meter: Any, refused: list[str]) -> tuple[Any, Any]:
    """The checkpoints of the release, and what the person says of it; `refused` is added to."""
    import torch

    from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
    from megatron_kaiyuan.commands.verifying import shown_on
    from megatron_kaiyuan.release.facts import ReleaseRequest
    from megatron_kaiyuan.release.kit import ReleaseParts

    verifier = shown_on(meter)
    last = open_intact_checkpoint(options.run, verifier)
    averaged = None
    if options.averaged is not None:
        try:
            averaged = open_intact_checkpoint(options.averaged, verifier)
        except (KaiyuanError, OSError) as error:
            refused.append(f"--averaged {error}")
    parts = ReleaseParts(
        last=last,
        averaged=averaged,
        layout=options.layout,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        licence_file=options.license_file,
    )
    beside = last.folder.parent / "metrics.jsonl"
    request = ReleaseRequest(
        name=options.name or (options.output or options.run).resolve().name,
        licence=options.license,
        languages=_languages(options),
        hardware=options.hardware,
        plan=options.plan,
        metrics=options.metrics or (beside if beside.is_file() else None),
        evaluation=options.evaluation,
        tokenizer=options.tokenizer,
    )
    return parts, request
