"""Turn JSONL and Parquet documents into Megatron's .bin/.idx shards with score sidecars and a manifest.

The same command again finishes what a killed run began, and does nothing where nothing is left to do.
"""

import argparse
import os
import re
import time
from collections.abc import Iterable, Mapping

from megatron_kaiyuan.errors import ConfigError, PreprocessError, TokenizerError
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.preprocess import PreprocessConfig, RunSummary, TokenizerConfig, preprocess
from megatron_kaiyuan.preprocess.config import SHARD_BYTES
from megatron_kaiyuan.preprocess.dry_run import DryRun, dry_run
from megatron_kaiyuan.preprocess.progress import ConsoleReporter
from megatron_kaiyuan.shards.manifest import SpecialTokenRecord, merged_special_tokens, special_token_facts
from megatron_kaiyuan.shards.tokenizer import TOKENIZER_TYPES

_MOST_SHARDS_LISTED = 8


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags.

    Those that Megatron's tool has mean the same here.
    """
    parser = CommandParser(description=__doc__, epilog="docs/shards.md describes files and policies.")
    _add_data_flags(parser.add_argument_group("input and output"))
    _add_tokenizer_flags(parser.add_argument_group("tokenizer"))
    _add_run_flags(parser.add_argument_group("run"))
    return parser


def _add_data_flags(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="F",
        help="files, globs or directories: JSONL (plain, .gz, .zst, .bz2, .xz, .lz4) or Parquet; - is standard input",
    )
    output = data.add_mutually_exclusive_group(required=True)
    output.add_argument(
        "--output-prefix",
        metavar="P",
        help="one shard: P_<json key>_document.{bin,idx}, .scores.<key>.npy, .documents.parquet, .manifest.json",
    )
    output.add_argument(
        "--output-dir",
        metavar="D",
        help="a folder of shards, D/shard_00000_<json key>_document and so on, which a plan reads as one source",
    )
    data.add_argument(
        "--shard-size",
        type=parse_size,
        default=SHARD_BYTES,
        metavar="BYTES",
        help="of --output-dir: input of one shard, such as 500MB or 2GB, as it lies on disk (default: 1GB)",
    )
    data.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields that hold text; one shard each (default: text)",
    )
    data.add_argument(
        "--score-key",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="numeric fields kept as score sidecars; dots descend: metadata.quality",
    )
    data.add_argument("--id-key", metavar="KEY", help="field that names a document, kept in .documents.parquet")
    data.add_argument("--overwrite", action="store_true", help="replace what another command left there")


def _add_tokenizer_flags(tokenizer: argparse._ArgumentGroup) -> None:
    tokenizer.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES, help="as in Megatron")
    tokenizer.add_argument(
        "--tokenizer-model", metavar="PATH", help="tokenizer.json or its directory; .model; TikTokenizer's .json"
    )
    tokenizer.add_argument(
        "--vocab-size", type=int, metavar="N", help="NullTokenizer: number of ids; TikTokenizer: cap (default: 131072)"
    )
    tokenizer.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document id")
    tokenizer.add_argument(
        "--eod-token", metavar="TOKEN", help="which token that is (default: what the tokenizer declares)"
    )
    tokenizer.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="HuggingFaceTokenizer: leave out what its post-processor adds, such as <s>",
    )
    tokenizer.add_argument(
        "--split-special-tokens",
        action="store_true",
        help="encode a special token in a text, such as <|endoftext|>, as its characters (default: as its id, as "
        "Megatron does; manifests count them)",
    )
    tokenizer.add_argument(
        "--tiktoken-pattern", choices=["v1", "v2"], default="v2", help="TikTokenizer: how text is split (default: v2)"
    )
    tokenizer.add_argument(
        "--tiktoken-num-special-tokens",
        type=int,
        default=1000,
        metavar="N",
        help="TikTokenizer: ids reserved for special tokens (default: 1000)",
    )
    tokenizer.add_argument(
        "--tokenizer-backend",
        choices=["auto", "reference"],
        default="auto",
        help="auto: gigatoken where it gives the same ids (default); reference: never",
    )


def _add_run_flags(run: argparse._ArgumentGroup) -> None:
    run.add_argument(
        "--num-tasks",
        type=int,
        default=1,
        metavar="N",
        help="so many processes on any machines share the shards of --output-dir; each runs this command (default: 1)",
    )
    run.add_argument(
        "--task-id", type=int, default=0, metavar="K", help="0 to N-1: builds the shards K, K+N, K+2N, ..."
    )
    run.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: all cores); the output does not depend on it",
    )
    run.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="faulty rows: stop at the first (default), or skip and count them",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: read and tokenize all, and count every reason for which rows give no document",
    )
    run.add_argument(
        "--max-document-tokens", type=int, metavar="N", help="longer documents are faulty rows (default: no limit)"
    )
    run.add_argument(
        "--log-interval",
        type=int,
        metavar="N",
        help="documents between progress lines where stderr is no terminal (default: a line every 10 s)",
    )


def config_from_arguments(arguments: argparse.Namespace) -> PreprocessConfig:
    """The run that these flags ask for.

    Raises:
        ConfigError: flags that cannot work, whatever the files hold.
        TokenizerError: the same of the flags of the tokenizer.
    """
    return PreprocessConfig(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        output_dir=arguments.output_dir,
        shard_bytes=arguments.shard_size,
        num_tasks=arguments.num_tasks,
        task_id=arguments.task_id,
        tokenizer=TokenizerConfig(
            type=arguments.tokenizer_type,
            model=arguments.tokenizer_model,
            vocab_size=arguments.vocab_size,
            eod_token=arguments.eod_token,
            include_special_tokens=not arguments.tokenizer_hf_no_include_special_tokens,
            split_special_tokens=arguments.split_special_tokens,
            tiktoken_pattern=arguments.tiktoken_pattern,
            tiktoken_num_special_tokens=arguments.tiktoken_num_special_tokens,
        ),
        json_keys=tuple(arguments.json_keys),
        score_keys=tuple(arguments.score_key),
        id_key=arguments.id_key,
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        on_error=arguments.on_error,
        max_document_tokens=arguments.max_document_tokens,
        backend=arguments.tokenizer_backend,
        overwrite=arguments.overwrite,
    )


def print_summary(summary: RunSummary, seconds: float) -> None:
    """What was written and what was left out."""
    if len(summary.manifests) <= _MOST_SHARDS_LISTED:
        for prefix, manifest in summary.manifests.items():
            documents = counted(manifest.documents, "document")
            say(f"{prefix}: {documents}, {counted(manifest.tokens, 'token')} ({manifest.dtype})")
            for key, score in manifest.scores.items():
                say(f"  {key}: min {score.min:.6g}, mean {score.mean:.6g}, max {score.max:.6g}")
    found = summary.manifests.values()
    documents = counted(sum(manifest.documents for manifest in found), "document")
    tokens = counted(sum(manifest.tokens for manifest in found), "token")
    say(f"{counted(len(found), 'shard')}: {documents}, {tokens}")
    print_special_tokens(manifest.special_tokens for manifest in found)
    print_skipped(summary.skipped, summary.rows, summary.examples)
    if summary.shards_of_others:
        say(f"left to other tasks: {counted(summary.shards_of_others, 'shard')}")
    kept = f"; {summary.shards_kept:,} complete already" if summary.shards_kept else ""
    say(f"built {summary.shards_built:,} in {seconds:.1f} s{kept}")


def print_special_tokens(records: Iterable[SpecialTokenRecord | None]) -> None:
    """Print which special tokens stood inside texts, nothing where none did."""
    record = merged_special_tokens(records)
    if record is not None and (told := special_token_facts(record)):
        kept = "; kept as ids, as Megatron does: --split-special-tokens encodes them as text"
        say(f"special tokens: {told}{kept if record.occurrences else ''}")


def print_skipped(skipped: Mapping[str, int], rows: int, examples: Mapping[str, str]) -> None:
    """Rows that gave no document, and the first of each reason."""
    for reason, count in skipped.items():
        example = f"; first: {examples[reason]}" if reason in examples else ""
        say(f"skipped {count:,} of {counted(rows, 'row')}: {reason}{example}")


def print_dry_run(told: DryRun, seconds: float) -> None:
    """What a run would write and leave out."""
    for key, tokens in told.tokens.items():
        say(f"{key}: {counted(told.documents, 'document')}, {counted(tokens, 'token')}")
    print_special_tokens(told.special_tokens.values())
    print_skipped(told.skipped, told.rows, told.examples)
    say(f"dry run: {counted(told.shards, 'shard')} to build, nothing written, {seconds:.1f} s")


def parse_size(text: str) -> int:
    """Bytes from `2000000`, `500MB`, `2GB` or `2GiB`."""
    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
    found = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or a whole number of KB, MB, GB or GiB")
    return int(found[1]) * units[found[2]]


def main() -> None:
    """Run the tool."""
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        config = config_from_arguments(arguments)
    except (ConfigError, TokenizerError) as error:
        parser.error(str(error))
    began = time.monotonic()
    with ConsoleReporter(arguments.log_interval) as reporter:
        done = dry_run(config, reporter) if arguments.dry_run else preprocess(config, reporter)
    if isinstance(done, RunSummary):
        print_summary(done, time.monotonic() - began)
        return
    print_dry_run(done, time.monotonic() - began)
    if done.faulty_rows and config.on_error == "stop":
        raise PreprocessError(
            f"{counted(done.faulty_rows, 'faulty row')}, listed above by reason; mend them, or give --on-error skip to "
            "leave such rows out"
        )
