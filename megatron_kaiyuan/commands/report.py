"""What happened in a training run, as one HTML page: loss, data, FP16 and throughput. Several runs are compared."""

import json
import sys
from pathlib import Path

from megatron_kaiyuan.host.cli import CommandParser, say, tool
from megatron_kaiyuan.reporting.run_report import report_runs
from megatron_kaiyuan.reporting.run_summary import print_summaries


def main() -> None:
    """Read, write the page, print the headline."""
    parser = CommandParser(
        description=__doc__,
        epilog="The page loads nothing from elsewhere. A run that is still going can be reported at any time. "
        "docs/monitoring.md reads the page.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder with metrics.jsonl (that of --save), or such a file"
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="PLAN",
        help="the runs' plan: adds phase marks, expected tokens and the time left. Where its shards are not at hand: a "
        f".json that {tool('plan')} PLAN --json wrote",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="the page (default: report.html beside the first run)"
    )
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON instead of tables")
    args = parser.parse_args()
    first = args.runs[0]
    page = args.html or (first if first.is_dir() else first.parent) / "report.html"
    summaries = report_runs(args.runs, page, args.plan)
    if args.json:
        json.dump(summaries, sys.stdout, indent=2, allow_nan=False)
        say()
    else:
        print_summaries(summaries)
    say(f"wrote {page}", file=sys.stderr)
