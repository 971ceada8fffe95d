"""Held-out loss of checkpoints, for each source of a plan and each quantile band of its documents."""

import argparse
import sys
from pathlib import Path

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.devices import start_device
from megatron_kaiyuan.host.quiet import quiet_megatron_import
from megatron_kaiyuan.reporting.held_out_table import band_tables, source_table


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(
        description="Held-out loss of checkpoints of one model, for each source of a plan and each quantile band of "
        "its documents, in one process (GPU or CPU)."
    )
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="iter_* folder, or save directory (its latest)"
    )
    parser.add_argument(
        "--plan", required=True, type=Path, metavar="FILE", help="plan of the run; holds the documents out"
    )
    parser.add_argument("--untrained", action="store_true", help="evaluate an untrained model as well")
    parser.add_argument("--windows", type=int, metavar="N", help="samples of each source (default: all held-out ones)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples in one pass (default 8)")
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="the run's tokenizer, for bits per byte; they are known of a byte-level tokenizer.json (default: the one "
        "the plan names)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the losses as JSON")
    return parser


def main() -> None:
    """Run the tool."""
    options = build_parser().parse_args()
    say(start_device(), file=sys.stderr)
    with quiet_megatron_import():
        from megatron_kaiyuan.evaluation.held_out import evaluate_checkpoints, results_as_json

    from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
    from megatron_kaiyuan.commands.verifying import shown_on
    from megatron_kaiyuan.evaluation.token_bytes import check_tokenizer, token_bytes
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    plan = Plan.load(options.plan)
    tokenizer = options.tokenizer_model or (plan.tokenizer.model if plan.tokenizer else None)
    with ConsoleMeter() as meter:
        checkpoints = [open_intact_checkpoint(path, shown_on(meter)) for path in options.checkpoints]
    if tokenizer:
        check_tokenizer(tokenizer, checkpoints[0].arguments, plan)
    results = evaluate_checkpoints(
        checkpoints,
        plan,
        untrained=options.untrained,
        max_windows=options.windows,
        batch_size=options.batch_size,
        bytes_of_token=token_bytes(tokenizer) if tokenizer else None,
        progress=lambda line: say(line, file=sys.stderr),
    )
    for table in (source_table(results, plan), *band_tables(results, plan)):
        SafeConsole().print(table)
    if options.json:
        options.json.write_text(results_as_json(results, plan))
