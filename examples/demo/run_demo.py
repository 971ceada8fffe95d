#!/usr/bin/env python3
"""The main job on real text, on two CPU cores or the GPUs that are there, from the corpus to the evaluation."""

import argparse
import os
import resource
import signal
import sys
from pathlib import Path

from commands import CommandFailed
from device import DeviceRefused, placed
from pipeline import DemoRun, remove_output
from report import print_report
from rich.console import Console
from settings import FULL, QUICK
from stages import run_stages
from training_log import parse_line

__all__ = ["main"]

REPOSITORY = Path(__file__).resolve().parents[2]
_SHOWN_STEPS = 16
_KIB = 1024


def build_parser() -> argparse.ArgumentParser:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(
        description="Pretrain a small FP16 GPT in three phases on text that is already on this machine, and report. "
        "A second run repeats only the stages whose inputs changed."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--fresh", action="store_true", help="remove the output of earlier runs and start again")
    parser.add_argument("--quick", action="store_true", help="the same with a tiny budget: a check, not a result")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the GPUs that are there, the CPU where there is none"
    )
    return parser


def main() -> int:
    """Run the demo and return the exit code."""
    options = build_parser().parse_args()
    console = Console()
    output = options.output.resolve()
    if output.is_relative_to(REPOSITORY):
        output = output.relative_to(REPOSITORY)
    os.chdir(REPOSITORY)  # the plan's paths are relative to it
    if options.fresh:
        remove_output(REPOSITORY / output)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops the demo stops its training too
    try:
        settings, said = placed(QUICK if options.quick else FULL, options.device, REPOSITORY)
        print(said, flush=True)
        run = DemoRun(REPOSITORY, output, settings, _show_progress)
        outcomes = run_stages(run.stages(), REPOSITORY / output / "stamps", lambda line: print(line, flush=True))
    except (CommandFailed, DeviceRefused) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    ran = not all(outcome.skipped for outcome in outcomes)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * _KIB
    print_report(console, output, outcomes, peak if ran else 0)
    return 0


def _show_progress(line: str) -> None:
    """Print about sixteen of the steps."""
    step = parse_line(line)
    if step is None or (step.iteration % max(1, step.of // _SHOWN_STEPS) and step.iteration != 1):
        return
    loss = "skipped" if step.loss is None else f"loss {step.loss:.3f}"
    print(
        f"      step {step.iteration:>4}/{step.of}  {loss}  lr {step.learning_rate:.2e}  "
        f"loss scale {step.loss_scale:,.0f}  {step.milliseconds:.0f} ms",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
