"""A pytest plugin that appends one JSON line for each finished test to the file in KAIYUAN_GPU_RESULTS.

`tools/dev/gpu_check.py` shows them as they come. A file keeps what was found when the run is stopped.
"""

import json
import os
from pathlib import Path

import pytest

_phases: dict[str, float] = {}
"""Seconds of the phases of each test that is under way."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called in the process that gathers the reports, for set-up, call and tear-down of each test."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    seconds = _phases[report.nodeid] = _phases.get(report.nodeid, 0.0) + report.duration
    finished = report.when == "call" or report.outcome != "passed"
    if report.when == "teardown" and not finished:
        return
    if finished:
        _append({"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 2), "why": _why(report)})


def _why(report: pytest.TestReport) -> str:
    """The reason of a skip, or the line of a failure that names it."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return "" if report.outcome == "passed" else str(crash.message if crash is not None else report.longrepr)


def _append(entry: dict[str, object]) -> None:
    with Path(os.environ["KAIYUAN_GPU_RESULTS"]).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")
