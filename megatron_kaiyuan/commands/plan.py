"""Dry run of a plan: what a run will see, how often and in what order. Needs no GPU."""

import argparse
import json
import sys
from pathlib import Path

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.reporting.plan_page import write_plan_page
from megatron_kaiyuan.reporting.plan_table import print_plan


def main() -> None:
    """Describe one plan file."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    args = parser.parse_args()
    if args.bands < 1 or (args.global_batch_size is not None and args.global_batch_size < 1):
        parser.error("--bands and --global-batch-size must be at least 1")
    if args.weight_decay is not None and (args.global_batch_size is None or not 0 < args.weight_decay < 1):
        parser.error("--weight-decay is between 0 and 1 and needs --global-batch-size, which tells the steps")
    plan = Plan.load(args.plan, simulate=args.simulate)
    description = plan.describe(args.bands)
    if args.weight_decay is not None:
        description["retained"] = plan.retained(args.global_batch_size, args.weight_decay, args.bands)
    if args.plot:
        write_plan_page(description, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.json:
        json.dump(description, sys.stdout, indent=2)
        print()
    else:
        print_plan(description, args.global_batch_size)
