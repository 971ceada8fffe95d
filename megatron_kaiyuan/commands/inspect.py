"""What shards hold and whether they are whole, or what a sample of a plan is, decoded. Changes nothing."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import ConfigError, ShardError
from megatron_kaiyuan.host.cli import CommandParser, say, tool
from megatron_kaiyuan.inspection.describe import NoSuchScoreError
from megatron_kaiyuan.reporting.inspection_report import InspectionOptions, inspect_samples, inspect_sources
from megatron_kaiyuan.reporting.sample_text import parse_sample_range
from megatron_kaiyuan.shards.tokenizer import TOKENIZER_TYPES


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the tool, checked against each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def sample_word(text: str) -> str:
    """Parse `--sample`. Whether the plan has these samples is checked once it is open."""
    try:
        parse_sample_range(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(
        description=__doc__,
        epilog="Exit code 1 if anything is wrong with the shards. docs/inspect.md reads the output.",
    )
    parser.add_argument("shards", nargs="*", metavar="SHARDS", help="prefix, directory or glob; together one source")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="inspect every source of this plan instead")
    parser.add_argument(
        "--sample",
        nargs="+",
        type=sample_word,
        metavar="S",
        help="with --plan: show these samples of the plan; numbers, or ranges such as 10-12 (both ends included)",
    )
    parser.add_argument(
        "--score", nargs="+", metavar="NAME", help="score sidecars to describe (default: all there are)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every byte: checksums, indexes, ids, scores, rank indexes, swapped and left-over files",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="for --verify: ids must be below N (default: what manifests say)"
    )
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="also show N documents drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default 0)")
    parser.add_argument(
        "--tokenizer-type", choices=TOKENIZER_TYPES, help="to decode (default: the plan's or manifest's)"
    )
    parser.add_argument("--tokenizer-model", metavar="PATH", help=f"to decode, as in {tool('preprocess')}")
    parser.add_argument(
        "--characters", type=int, default=400, metavar="N", help="of each text to show; 0 = all (default 400)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if bool(args.shards) == bool(args.plan):
        parser.error("give SHARDS, or --plan FILE")
    if args.sample and not args.plan:
        parser.error("--sample needs --plan: samples are those of a plan (--samples N draws documents from SHARDS)")
    if args.sample and (args.verify or args.samples or args.html or args.score):
        parser.error("--sample shows samples of the plan alone; run --verify, --samples, --html or --score without it")
    if args.samples < 0 or args.characters < 0 or (args.vocab_size is not None and args.vocab_size < 1):
        parser.error("--samples and --characters must be at least 0, --vocab-size at least 1")
    if args.vocab_size is not None and not args.verify:
        parser.error("--vocab-size is compared with the ids by --verify; add it")
    if args.tokenizer_model and not args.tokenizer_type:
        parser.error("--tokenizer-model needs --tokenizer-type")


def main() -> None:
    """Inspect, print, and say whether anything is wrong."""
    args = parse_arguments()
    options = InspectionOptions(
        scores=args.score,
        verify=args.verify,
        vocab_size=args.vocab_size,
        documents=args.samples,
        seed=args.seed,
        characters=args.characters,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        quiet=args.json,
        page=args.html,
    )
    if args.sample:
        told = inspect_samples(args.plan, args.sample, options)
    else:
        try:
            told = inspect_sources(args.plan or args.shards, options)
        except NoSuchScoreError as error:
            build_parser().error(str(error))
    if args.json:
        json.dump(_plain(told), sys.stdout, indent=2, allow_nan=False)
        say()
    wrong = sum(len(source["findings"]) for source in told.get("sources", ()))
    if wrong:
        raise ShardError(f"findings: {wrong:,}, listed above; each names its file and what to do")


def _plain(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
