"""Quantile data benchmarking: which slice of which dataset is worth training on."""

import argparse
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.terminal import agreed, counted
from megatron_kaiyuan.quantile.claimable import known_spread, planned_design, smallest_claimable
from megatron_kaiyuan.quantile.runs import SlicedStudy, my_share, read_slices, write_slices
from megatron_kaiyuan.quantile.study import Study, load_study
from megatron_kaiyuan.quantile.tasks import check_tasks
from megatron_kaiyuan.reporting.progress import ConsoleMeter


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(
        description="Train one small model on slices at score quantiles of each dataset, compare them on held-out text "
        "and tasks, and propose which part of which dataset to train on. The steps come in this order; each can be "
        "repeated, and goes on where it was. The study file is explained in docs/quantile-benchmark.md."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{slice,train,evaluate,report}")
    helps = {
        "slice": "cut equal, disjoint slices and write a plan for each run; prints the cost before anything runs",
        "train": "train what is not finished yet; a run that was interrupted continues from its checkpoint",
        "evaluate": "bits per byte on held-out documents, and lm-evaluation-harness tasks, for every finished run",
        "report": "write report.html and report.json: curves, decisions with their statistics, a proposed plan",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("study", type=Path, metavar="STUDY", help="study file (YAML)")
        if name in ("train", "evaluate"):
            command.add_argument(
                "--task-id", type=int, default=0, metavar="I", help="do every N-th run from the I-th on (default 0)"
            )
            command.add_argument(
                "--num-tasks", type=int, default=1, metavar="N", help="tasks that share the runs, as in a job array"
            )
        if name == "slice":
            command.add_argument(
                "--expected-spread",
                metavar="S",
                help="spread between seeds in bits per byte, or the report.json of a pilot; the smallest differences "
                "that the study can claim are then printed in bits per byte too",
            )
        if name == "train":
            trunk = command.add_mutually_exclusive_group()
            trunk.add_argument(
                "--trunk", action="store_true", help="with design: branch, train the trunks, before their branches"
            )
            trunk.add_argument(
                "--branch-from",
                type=Path,
                metavar="OUTPUT",
                help="branch from the trunks in the output folder of another study with the same trunks",
            )
            command.add_argument(
                "--concurrent", type=int, default=1, metavar="N", help="runs at a time in this task (default 1)"
            )
        if name == "report":
            command.add_argument(
                "--partial", action="store_true", help="report on the runs there are, marked as incomplete"
            )
    return parser


def main() -> None:
    """Run the tool."""
    options = build_parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops this tool stops its training too
    study = load_study(options.study)
    {"slice": _slice, "train": _train, "evaluate": _evaluate, "report": _report}[options.command](study, options)


def _slice(study: Study, options: argparse.Namespace) -> None:
    check_tasks(study)
    sliced, cost = write_slices(study)
    columns = ["slice", "seed", "documents", "tokens", "scores"]
    rows = [
        [run.cell_name, str(run.seed), f"{run.documents:,}", f"{run.slice_tokens:,}",
         f"{run.score_low:.4g} to {run.score_high:.4g}" if run.documents else "-"]
        for run in sliced.runs
    ]  # fmt: skip
    _print_table(f"{counted(len(sliced.runs), 'run')}, plans in {study.folder / 'plans'}", columns, rows)
    sizes = smallest_claimable(planned_design(study), study.level)
    spread = None if options.expected_spread is None else known_spread(options.expected_spread)
    lines = sizes.lines([float(top) for top in study.slices.tops], spread)
    for line in [*(f"warning: {line}" for line in sliced.warnings), *cost.lines(), *lines]:
        say(line)


def _train(study: Study, options: argparse.Namespace) -> None:
    from megatron_kaiyuan.quantile.training import check_trunks, train_runs

    study = _with_trunks(study, options)
    sliced = read_slices(study)
    runs = my_share(sliced.trunks if options.trunk else sliced.runs, options.task_id, options.num_tasks)
    if not options.trunk:
        check_trunks(study, sliced.trunks)
    steps = study.trunk_steps if options.trunk else study.steps
    with ConsoleMeter() as meter:
        meter.start(f"training {len(runs)} {'trunks' if options.trunk else 'runs'}", len(runs) * steps)
        outcomes = train_runs(study, runs, concurrent=options.concurrent, progress=meter.advance)
    counts = Counter(outcome.state for outcome in outcomes)
    say(", ".join(f"{count} {state}" for state, count in counts.items()))
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        say(f"\n{outcome.run.name} failed: {outcome.detail}\n(whole log: {outcome.log})", file=sys.stderr)
    if failed:
        names = ", ".join(outcome.run.name for outcome in failed)
        raise StudyError(
            f"{len(failed)} of {counted(len(runs), 'run')} failed: {names}; mend the cause and run `train` again"
        )


def _with_trunks(study: Study, options: argparse.Namespace) -> Study:
    """The study with the trunks that the command line names.

    Raises:
        StudyError: it has no trunks, or they are those of another study, which trains them.
    """
    if study.trunk is None and (options.trunk or options.branch_from is not None):
        flag = "--trunk" if options.trunk else "--branch-from"
        raise StudyError(f"{flag}: the study is of design: scratch, where no run has a trunk; write design: branch")
    if study.trunk is not None and options.branch_from is not None:
        return study.model_copy(update={"trunk": study.trunk.model_copy(update={"folder": str(options.branch_from)})})
    if options.trunk and study.trunk is not None and study.trunk.folder is not None:
        raise StudyError(f"--trunk: the trunks are those of {study.trunk.folder}; train them there")
    return study


def _evaluate(study: Study, options: argparse.Namespace) -> None:
    # lm-eval and datasets would draw several bars for every run; torch imports tqdm, which reads this when imported
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from megatron_kaiyuan.host.devices import start_device
    from megatron_kaiyuan.host.quiet import quiet_megatron_import

    say(start_device(), file=sys.stderr)
    with quiet_megatron_import():
        from megatron_kaiyuan.quantile.evaluation import evaluate_runs

    sliced = read_slices(study)
    runs = my_share(sliced.runs, options.task_id, options.num_tasks)
    with ConsoleMeter() as meter:
        meter.start(f"evaluating {counted(len(runs), 'run')}", len(runs))
        outcome = evaluate_runs(study, sliced, runs, progress=lambda: meter.advance(1))
    say(f"{counted(outcome.evaluated, 'run')} evaluated, {outcome.up_to_date} were up to date")
    for task, reason in outcome.not_evaluated.items():
        say(f"task {task} was not evaluated: {reason}", file=sys.stderr)
    for name, reason in outcome.failed.items():
        say(f"{name} could not be evaluated: {reason}", file=sys.stderr)
    problems = []
    if outcome.failed:
        problems.append(
            f"{counted(len(outcome.failed), 'run')} could not be evaluated: {_names(list(outcome.failed))}; mend the "
            "cause, or "
            f"remove their folders in {study.folder / 'runs'} and run `train`; then run `evaluate` again"
        )
    if outcome.unfinished:
        problems.append(
            f"{counted(len(outcome.unfinished), 'run')} {agreed(len(outcome.unfinished), 'is', 'are')} not trained "
            f"yet: {_names(outcome.unfinished)}; run "
            "`train`, then "
            "`evaluate` again"
        )
    if problems:
        raise StudyError("\n".join(problems))


def _names(runs: Sequence[str]) -> str:
    return ", ".join(runs[:6]) + (" ..." if len(runs) > 6 else "")


def _report(study: Study, options: argparse.Namespace) -> None:
    from megatron_kaiyuan.quantile.report import write_report

    sliced: SlicedStudy = read_slices(study)
    written = write_report(study, sliced, partial=options.partial)
    for line in written.warnings:
        say(f"warning: {line}")
    for line in written.conclusions:
        say(line)
    say("", written.page, written.data, written.plan or "no plan is proposed", sep="\n")


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("slice", "scores") else "right")
    for row in rows:
        table.add_row(*row)
    SafeConsole().print(table)
