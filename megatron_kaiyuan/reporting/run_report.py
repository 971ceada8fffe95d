"""From the files of runs to their summaries and their page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import MetricsError
from megatron_kaiyuan.reporting.run_expected import check_plan, load_description
from megatron_kaiyuan.reporting.run_metrics import read_runs
from megatron_kaiyuan.reporting.run_page import write_run_page
from megatron_kaiyuan.reporting.run_summary import summarize

__all__ = ["report_runs"]


def report_runs(paths: Sequence[Path], page: Path, plan: Path | None = None) -> list[dict[str, Any]]:
    """Read runs, write their page, and return a summary of each.

    Args:
        paths: Folders with a `metrics.jsonl`, or such files.
        page: The HTML file; one of before is replaced.
        plan: Their plan, or its description as JSON; gives phases and expected tokens.

    Raises:
        MetricsError: a run cannot be read, or the plan is not theirs.
        PlanError: the plan cannot be read.
    """
    runs = read_runs(paths)
    if page.resolve() in [run.path for run in runs]:
        raise MetricsError(f"--html {page} is a run's own metrics file, which the page would replace; name another")
    if not page.resolve().parent.is_dir():
        raise MetricsError(f"--html {page}: the folder does not exist; make it, or name another")
    description = None if plan is None else load_description(plan)
    if description is not None:
        for run in runs:
            check_plan(run, description)
    summaries = [summarize(run, description) for run in runs]
    write_run_page(runs, summaries, description, page)
    return summaries
