"""Dry run of a plan: what a run will see, how often and in what order. Needs no GPU."""

import argparse
import json
import sys
from pathlib import Path

from megatron_kaiyuan.commands.proxy import write_proxy
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.plan_page import write_plan_page
from megatron_kaiyuan.reporting.plan_table import print_plan
from megatron_kaiyuan.reporting.predicted_loss import predict_loss, prediction_lines, prediction_table


def check_as_training_would(plan: Plan, global_batch_size: int | None) -> None:
    """Refuse what a run with no other flags would refuse once it has its tokenizer and its batch.

    Raises:
        ShardError: a token id outside the vocabulary that the manifests name.
        PlanError: fewer samples than one batch.
    """
    if global_batch_size is not None and plan.num_samples < global_batch_size:
        raise PlanError(
            f"--global-batch-size {global_batch_size:,}: the plan has only {counted(plan.num_samples, 'sample')}; show "
            "more tokens, or lower the batch"
        )
    if not plan.simulated and plan.tokenizer_record is not None:
        plan.check_vocabulary(plan.tokenizer_record.vocab_size)


def build_parser() -> CommandParser:
    """Command line of the tool."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("plan", type=Path, help="plan file (YAML)")
    parser.add_argument("--json", action="store_true", help="print the description as JSON instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="also write a page with plots")
    parser.add_argument("--bands", type=int, default=10, help="quality bands of a scored source (default 10)")
    parser.add_argument(
        "--simulate", action="store_true", help="plan with the sources' expected sizes, before their shards exist"
    )
    parser.add_argument("--global-batch-size", type=int, help="sequences a step; adds the steps of each phase")
    parser.add_argument(
        "--weight-decay",
        type=float,
        help="Megatron's flag; with --global-batch-size adds the weight that each band keeps in the final weights",
    )
    parser.add_argument(
        "--predict-loss",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="predict the training loss from the metrics.jsonl of two or more short runs with other schedules and the "
        "same model, batch and highest rate; needs --global-batch-size",
    )
    parser.add_argument("--proxy", metavar="SHARE", help="write a smaller plan, such as 1/16 of this one, to --output")
    parser.add_argument("--output", type=Path, metavar="FILE.yaml", help="the smaller plan of --proxy")
    return parser


def _check_flags(parser: CommandParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if (args.proxy is None) != (args.output is None):
        parser.error("--proxy SHARE and --output FILE.yaml go together: the share of this plan, and the plan to write")
    described = (args.json, args.plot, args.simulate, args.global_batch_size, args.weight_decay, args.predict_loss)
    if args.proxy is not None and (any(described) or args.bands != parser.get_default("bands")):
        parser.error("--proxy writes a plan and describes none: of the other flags it takes --output alone")
    if args.bands < 1 or (args.global_batch_size is not None and args.global_batch_size < 1):
        parser.error("--bands and --global-batch-size must be at least 1")
    if args.weight_decay is not None and (args.global_batch_size is None or not 0 < args.weight_decay < 1):
        parser.error("--weight-decay is between 0 and 1 and needs --global-batch-size, which tells the steps")
    if args.predict_loss and args.global_batch_size is None:
        parser.error("--predict-loss needs --global-batch-size, which says how many steps the plan has")


def main() -> None:
    """Describe one plan file."""
    parser = build_parser()
    args = parser.parse_args()
    _check_flags(parser, args)
    if args.proxy is not None:
        write_proxy(args.plan, args.proxy, args.output)
        say(f"wrote {args.output}", file=sys.stderr)
        return
    _describe(args)


def _describe(args: argparse.Namespace) -> None:
    plan = Plan.load(args.plan, simulate=args.simulate)
    check_as_training_would(plan, args.global_batch_size)
    description = plan.describe(args.bands)
    if args.weight_decay is not None:
        description["retained"] = plan.retained(args.global_batch_size, args.weight_decay, args.bands)
    if args.predict_loss:
        description["predicted_loss"] = predict_loss(plan, args.predict_loss, args.global_batch_size)
    if args.plot:
        write_plan_page(description, args.plot)
        say(f"wrote {args.plot}", file=sys.stderr)
    if args.json:
        json.dump(description, sys.stdout, indent=2)
        say()
    else:
        print_plan(description, args.global_batch_size)
        if args.predict_loss:
            SafeConsole().print(prediction_table(description["predicted_loss"]))
            for line in prediction_lines(description["predicted_loss"]):
                say(line)
