"""Average the weights of several checkpoints of one run, on the CPU and in one process."""

import argparse
from pathlib import Path

from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.terminal import counted


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(
        description="Average the weights of several checkpoints of one run, on the CPU and in one process. The "
        "result is a torch_dist checkpoint for any parallel layout, without optimizer state: load it with --finetune, "
        "or evaluate it."
    )
    parser.add_argument("directory", metavar="CHECKPOINT_DIR", type=Path, help="what --save named in training")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--last", type=int, metavar="N", help="the last N checkpoints (default: all)")
    chosen.add_argument("--iterations", type=int, nargs="+", metavar="I", help="the checkpoints of these iterations")
    chosen.add_argument(
        "--planned",
        action="store_true",
        help="the checkpoints and the weights that the averaging section of the run's plan names",
    )
    parser.add_argument(
        "--weights",
        metavar="KIND",
        help="mean: equal weights (default, but for --planned); wma: 1, 2, 3, ... from the oldest to the newest; "
        "ema:A, such as ema:0.2: average = A * newer + (1 - A) * average, from the oldest on",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="save directory of the result")
    return parser


def main() -> None:
    """Run the tool."""
    arguments = build_parser().parse_args()
    cpu_platform.install()
    from megatron_kaiyuan.checkpoints.averaging import average_checkpoints, choose_checkpoints, choose_planned
    from megatron_kaiyuan.commands.verifying import shown_on
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    with ConsoleMeter() as meter:
        verifier = shown_on(meter)
        if arguments.planned:
            checkpoints, weights = choose_planned(arguments.directory, verifier)
        else:
            chosen = choose_checkpoints(arguments.directory, arguments.last, arguments.iterations, verifier)
            checkpoints, weights = chosen, "mean"
        meter.start("averaging", sum(checkpoint.num_bytes for checkpoint in checkpoints))
        manifest = average_checkpoints(checkpoints, arguments.weights or weights, arguments.output, meter.advance)
    for part in manifest.checkpoints:
        say(f"{part.weight:8.4f} x iteration {part.iteration} ({counted(part.consumed_samples, 'sample')})")
    say(
        f"{arguments.output}: average of {counted(manifest.parameters, 'parameter')} in "
        f"{counted(manifest.tensors, 'tensor')}"
    )
