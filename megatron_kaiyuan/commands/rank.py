"""Build or verify the rank index of a source: its documents in ascending quality, memory-mapped by every later run."""

import argparse
import time
from pathlib import Path

from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.numpy_dispatch import prefer_fast_sort
from megatron_kaiyuan.host.terminal import counted


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("shards", nargs="*", metavar="SHARDS", help="prefix, directory or glob of .bin/.idx shards")
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="PLAN",
        help="instead of SHARDS, all that a plan needs: the index of each scored source, and sums of large ones that "
        "it shuffles by documents or packs whole; what is there and up to date stays",
    )
    parser.add_argument(
        "--score",
        default="score",
        type=score_name,
        help="name of the score sidecar (default: score), or a sum of scores such as '0.7*edu + 0.3*dclm' with --as",
    )
    parser.add_argument("--as", dest="name", type=plain_score_name, help="name of the score that a sum is stored as")
    parser.add_argument(
        "--combine",
        choices=("ranks", "values"),
        default="ranks",
        help="what a sum adds: each document's rank by each score, from 0 to 1 (default), or the scores themselves",
    )
    parser.add_argument(
        "--scores",
        metavar="F",
        help="take the scores from F, a .npy file or FILE.parquet:column with one number per document in storage "
        "order, and store them beside the shards under the name of --score",
    )
    parser.add_argument("--seed", type=int, default=0, help="orders documents of equal score (default 0)")
    parser.add_argument("--output", type=Path, help="index file (default: beside the first shard)")
    parser.add_argument("--verify", action="store_true", help="compare an existing index with a fresh ranking")
    return parser


def score_name(text: str) -> str:
    """What `--score` may be: a name, or a sum."""
    from megatron_kaiyuan.shards.score_mix import is_mix

    return text if is_mix(text) else plain_score_name(text)


def plain_score_name(text: str) -> str:
    """The name of one score."""
    from megatron_kaiyuan.shards.score_files import check_score_name

    try:
        return check_score_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Rank one source, or those of a plan."""
    parser = build_parser()
    args = parser.parse_args()
    if bool(args.shards) == (args.plan is not None):
        parser.error("give the SHARDS of one source, or --plan PLAN")
    if args.plan and (args.verify or args.scores or args.output):
        parser.error("--plan takes scores and places from the plan; leave out --verify, --scores and --output")
    if args.verify and args.scores:
        parser.error("--verify compares with the stored scores; leave out --scores, or rank first and verify then")
    check_sum(parser, args)
    prefer_fast_sort()
    rank_plan(args) if args.plan else rank_one(args)


def check_sum(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a sum without a name, and what is said of a sum where there is none."""
    from megatron_kaiyuan.shards.score_mix import is_mix

    if is_mix(args.score):
        if args.name is None:
            parser.error(f"--score {args.score!r} is a sum: name it with --as NAME; the plan then says score: NAME")
        if args.plan or args.scores or args.verify:
            parser.error("a sum is made of stored scores of SHARDS; leave out --plan, --scores and --verify")
    elif args.name is not None or args.combine != "ranks":
        parser.error(f"--as and --combine are of a sum, and --score {args.score} is none; write '0.7*edu + 0.3*dclm'")


def rank_plan(args: argparse.Namespace) -> None:
    """Rank what is missing of a plan."""
    from megatron_kaiyuan.data.rank_plan import rank_plan_sources
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    with ConsoleMeter() as meter:
        for ranked in rank_plan_sources(args.plan, args.seed, meter):
            state = "ranked" if ranked.built else "up to date"
            say(
                f"{ranked.name}: {state}, {counted(ranked.source.num_documents, 'document')}, {ranked.path}", flush=True
            )


def rank_one(args: argparse.Namespace) -> None:
    """Rank or verify one source."""
    from megatron_kaiyuan.data import open_source
    from megatron_kaiyuan.documents.rank_index import index_path, verify_rank_index, write_rank_index
    from megatron_kaiyuan.reporting.progress import ConsoleMeter
    from megatron_kaiyuan.shards.score_import import import_scores
    from megatron_kaiyuan.shards.score_mix import parse_mix, write_mix

    source = open_source("source", args.shards)
    if args.name is not None:
        write_mix(source, parse_mix(args.score), args.name, of_ranks=args.combine == "ranks")
        args.score = args.name
    if args.scores:
        import_scores(source, args.scores, args.score)
    path = args.output or index_path(source, args.score)
    if args.verify:
        verify_rank_index(path, source, args.score)
        say(f"{path}: correct for {counted(source.num_documents, 'document')}, {counted(source.num_tokens, 'token')}")
        return
    started = time.perf_counter()
    with ConsoleMeter() as meter:
        write_rank_index(source, args.score, path, args.seed, meter)
    say(
        f"{path}: {counted(source.num_documents, 'document')}, {counted(source.num_tokens, 'token')} in "
        f"{counted(len(source.shards), 'shard')}, {counted(path.stat().st_size, 'byte')}, "
        f"{time.perf_counter() - started:.1f} s"
    )
