"""Held-out loss of checkpoints by source and quantile band of a plan, and their scores on tasks of lm-eval."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError, StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.devices import start_device
from megatron_kaiyuan.host.quiet import quiet_megatron_import
from megatron_kaiyuan.reporting.held_out_table import band_tables, source_table, task_tables

if TYPE_CHECKING:  # it imports Megatron
    from megatron_kaiyuan.checkpoints.tokenizer import CheckpointTokenizer
    from megatron_kaiyuan.evaluation.held_out import CheckpointLoss


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(
        description="Held-out loss of checkpoints of one model, for each source of a plan and each quantile band of "
        "its documents (--plan), and scores on tasks of lm-evaluation-harness (--tasks), in one process (GPU or CPU)."
    )
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="iter_* folder, or save directory (its latest)"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="plan of the run; holds the documents out")
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="tasks of lm-evaluation-harness by name, task files in its format (my_task.yaml, which need no network "
        "where their data are local), or kaiyuan: the suite of the Kaiyuan-2B report",
    )
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each item (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    parser.add_argument(
        "--generate", action="store_true", help="also score the texts that tasks such as GSM8K let the model write"
    )
    parser.add_argument("--untrained", action="store_true", help="evaluate an untrained model as well")
    parser.add_argument("--windows", type=int, metavar="N", help="samples of each source (default: all held-out ones)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples in one pass (default 8)")
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="the run's tokenizer, for tasks and for bits per byte; these are known of a byte-level tokenizer.json "
        "(default: the one the plan names)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the results as JSON, which a model card reads"
    )
    return parser


def main() -> None:
    """Run the tool."""
    options = build_parser().parse_args()
    _check_options(options)
    say(start_device(), file=sys.stderr)
    with quiet_megatron_import():
        from megatron_kaiyuan.evaluation.held_out import evaluate_checkpoints, results_as_json

    from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
    from megatron_kaiyuan.commands.verifying import shown_on
    from megatron_kaiyuan.evaluation.token_bytes import token_bytes
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    plan = None if options.plan is None else Plan.load(options.plan)
    tokenizer = options.tokenizer_model or (plan.tokenizer.model if plan is not None and plan.tokenizer else None)
    with ConsoleMeter() as meter:
        checkpoints = [open_intact_checkpoint(path, shown_on(meter)) for path in options.checkpoints]
    of_run = _tokenizer_of_all(tokenizer, [checkpoint.arguments for checkpoint in checkpoints], plan)
    more = _task_measure(options, tokenizer, None if of_run is None else of_run.end)
    results = evaluate_checkpoints(
        checkpoints,
        plan,
        more=more,
        untrained=options.untrained,
        max_windows=options.windows,
        batch_size=options.batch_size,
        bytes_of_token=token_bytes(tokenizer) if plan is not None and tokenizer else None,
        progress=lambda line: say(line, file=sys.stderr),
    )
    if options.json:
        write_text_atomically(options.json, results_as_json(results, plan))
    for table in _tables(results, plan):
        SafeConsole().print(table)
    failed = {f"{result.label}: {name}": why for result in results for name, why in _not_evaluated(result).items()}
    if failed:
        raise StudyError("not evaluated: " + "; ".join(f"{name} ({why})" for name, why in failed.items()))


def _tokenizer_of_all(
    tokenizer: str | None, saved: Sequence[argparse.Namespace], plan: Plan | None
) -> "CheckpointTokenizer | None":
    """Return the tokenizer, which must be that of every checkpoint; `saved` are their arguments."""
    from megatron_kaiyuan.evaluation.token_bytes import check_tokenizer

    if tokenizer is None:
        return None
    first, *_ = (check_tokenizer(tokenizer, arguments, plan) for arguments in saved)
    return first


def _check_options(options: argparse.Namespace) -> None:
    """Refuse to measure nothing, and flags that would have no effect."""
    if options.plan is None and options.tasks is None:
        raise ConfigError(
            "nothing to evaluate: give --plan FILE for held-out losses, --tasks NAME,... for tasks, or both"
        )
    of_tasks = {"--num-fewshot": options.num_fewshot, "--limit": options.limit, "--generate": options.generate or None}
    given = [flag for flag, value in of_tasks.items() if value is not None]
    if given and options.tasks is None:
        raise ConfigError(f"{given[0]} is about tasks; give --tasks NAME,... or leave it out")
    if options.windows is not None and options.plan is None:
        raise ConfigError("--windows is about held-out documents; give --plan FILE or leave it out")


def _task_measure(
    options: argparse.Namespace, tokenizer: str | None, end: int | None
) -> Callable[[Any, int], Mapping[str, Any]]:
    """Return what scores a model on the tasks.

    All of them are loaded before any model is.
    """
    if options.tasks is None:
        return lambda _model, _positions: {}
    from megatron_kaiyuan.quantile.task_list import load_tasks, measured_tasks, task_list

    if tokenizer is None:
        raise ConfigError("--tasks needs the tokenizer of the model; give --tokenizer-model PATH")
    path = Path(tokenizer)
    spec = task_list(
        [name.strip() for name in options.tasks.split(",") if name.strip()],
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        generate=options.generate,
        batch_size=options.batch_size,
    )
    suite = load_tasks(spec, str(path.parent if path.name == "tokenizer.json" else path), end)
    return partial(measured_tasks, suite)


def _tables(results: Sequence["CheckpointLoss"], plan: Plan | None) -> list[Table]:
    tables = [] if plan is None else [source_table(results, plan), *band_tables(results, plan)]
    return [*tables, *task_tables(results)]


def _not_evaluated(result: "CheckpointLoss") -> Mapping[str, str]:
    reasons: Mapping[str, str] = result.more.get("not_evaluated", {})
    return reasons
