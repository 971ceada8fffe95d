#!/usr/bin/env python3
"""Turn JSONL and Parquet documents into Megatron's .bin/.idx shards with score sidecars and a manifest."""

import argparse
import os
import sys
import time

from megatron_kaiyuan.cli import run_tool
from megatron_kaiyuan.preprocess import PreprocessConfig, RunSummary, TokenizerConfig, preprocess
from megatron_kaiyuan.preprocess.progress import ConsoleReporter
from megatron_kaiyuan.preprocess.tokenize import TOKENIZER_TYPES


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the tool; those that Megatron's tool has mean the same here."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="docs/shards.md describes files and policies.")
    _add_data_flags(parser.add_argument_group("input and output"))
    _add_tokenizer_flags(parser.add_argument_group("tokenizer"))
    _add_run_flags(parser.add_argument_group("run"))
    return parser.parse_args(argv)


def _add_data_flags(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="F",
        help="files, globs or directories: JSONL (plain, .gz, .zst) or Parquet",
    )
    data.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="writes P_<json key>_document.{bin,idx}, .scores.<key>.npy, .manifest.json",
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
    data.add_argument("--overwrite", action="store_true", help="replace an existing shard")


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
        "--max-document-tokens", type=int, metavar="N", help="longer documents are faulty rows (default: no limit)"
    )
    run.add_argument(
        "--log-interval",
        type=int,
        metavar="N",
        help="documents between progress lines where stderr is no terminal (default: a line every 10 s)",
    )


def config_from_arguments(arguments: argparse.Namespace) -> PreprocessConfig:
    """The run that these flags ask for."""
    return PreprocessConfig(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer=TokenizerConfig(
            type=arguments.tokenizer_type,
            model=arguments.tokenizer_model,
            vocab_size=arguments.vocab_size,
            eod_token=arguments.eod_token,
            include_special_tokens=not arguments.tokenizer_hf_no_include_special_tokens,
            tiktoken_pattern=arguments.tiktoken_pattern,
            tiktoken_num_special_tokens=arguments.tiktoken_num_special_tokens,
        ),
        json_keys=tuple(arguments.json_keys),
        score_keys=tuple(arguments.score_key),
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        on_error=arguments.on_error,
        max_document_tokens=arguments.max_document_tokens,
        backend=arguments.tokenizer_backend,
        overwrite=arguments.overwrite,
    )


def print_summary(summary: RunSummary, seconds: float) -> None:
    """What was written and what was left out."""
    for prefix, manifest in summary.manifests.items():
        print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype})")
        for key, score in manifest.scores.items():
            print(f"  {key}: min {score.min:.6g}, mean {score.mean:.6g}, max {score.max:.6g}")
    for reason, count in summary.skipped.items():
        print(f"skipped {count:,} of {summary.rows:,} rows: {reason}; first: {summary.examples[reason]}")
    print(f"done in {seconds:.1f} s")


def main() -> None:
    """Run the tool."""
    arguments = parse_arguments()
    began = time.monotonic()
    with ConsoleReporter(arguments.log_interval) as reporter:
        summary = preprocess(config_from_arguments(arguments), reporter)
    print_summary(summary, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(run_tool(main))
