"""`metrics.jsonl`: one JSON object for each log line of a run, which `tools/report_run.py` reads.

Lines are appended. A run that was killed and resumed from an older checkpoint repeats steps. Its lines then come twice;
the later one counts.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_kaiyuan.monitoring.outputs import append_or_lose, check_place, last_byte

__all__ = ["append_metrics", "average_path", "check_metrics_place", "held_out_path", "metrics_path", "read_metrics"]


def metrics_path(args: argparse.Namespace) -> Path | None:
    """Return the path where a run with these arguments writes its lines, None for nowhere."""
    if args.kaiyuan_metrics:
        return Path(args.kaiyuan_metrics)
    return Path(args.save) / "metrics.jsonl" if args.save else None


def held_out_path(metrics: Path) -> Path:
    """The file of evaluations that belongs to a metrics file: `metrics.held_out.jsonl` beside `metrics.jsonl`."""
    return metrics.with_suffix(".held_out.jsonl")


def average_path(metrics: Path) -> Path:
    """The file of the evaluation of the average: `metrics.held_out_average.jsonl` beside `metrics.jsonl`."""
    return metrics.with_suffix(".held_out_average.jsonl")


def check_metrics_place(path: Path) -> None:
    """Check before the start that lines can be appended.

    Makes the folder, and leaves no empty file.

    Raises:
        MetricsError: they cannot.
    """
    check_place(path, "choose another --kaiyuan-metrics")


def append_metrics(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one line with a single write, after a newline if the last line was torn by a crash.

    A line that cannot be written is lost, with one warning until lines can be written again: a full disk of logs ends
    no training.
    """
    line = json.dumps(entry, separators=(",", ":"), allow_nan=False) + "\n"
    if last_byte(path) not in (b"", b"\n"):
        line = "\n" + line
    append_or_lose(path, line.encode(), "its metrics")


def read_metrics(path: Path, *, last_iteration: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run in the order of its steps, repeated steps as they were last.

    Args:
        path: The file; one that does not exist has no lines.
        last_iteration: Leave out later steps: those that a resumed run will repeat.

    Returns:
        Entries by ascending "iteration". Lines that a crash tore are left out: the run repeated their step, or ended
        there.
    """
    if not path.exists():
        return []
    entries: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            iteration = int(entry["iteration"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        while entries and next(reversed(entries)) >= iteration:  # ascending at all times
            entries.popitem()
        entries[iteration] = entry
    return [entry for step, entry in entries.items() if last_iteration is None or step <= last_iteration]
