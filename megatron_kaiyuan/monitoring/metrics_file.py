"""`metrics.jsonl`: one JSON object a log line of a run, appended; what `tools/report_run.py` reads.

A run that was killed and resumed from an older checkpoint repeats steps. Its lines then come twice; the later one
counts.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import MetricsError

__all__ = ["append_metrics", "average_path", "check_metrics_place", "held_out_path", "metrics_path", "read_metrics"]

_lossy: set[Path] = set()
"""Files whose last line could not be written."""


def metrics_path(args: argparse.Namespace) -> Path | None:
    """Where a run with these arguments writes its lines; None: nowhere."""
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
    """Look before the start whether lines can be appended; makes the folder, and leaves no empty file.

    Raises:
        MetricsError: they cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            is_empty = file.tell() == 0
        if is_empty:
            path.unlink()
    except OSError as error:
        raise MetricsError(
            f"{path} cannot be written ({error.strerror}); choose another --kaiyuan-metrics, or mend the place"
        ) from error


def append_metrics(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one line with a single write, after a newline if the last line was torn by a crash.

    A line that cannot be written is lost, with one warning until lines can be written again: a full disk of logs ends
    no training.
    """
    line = json.dumps(entry, separators=(",", ":"), allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())
    except OSError as error:
        if path not in _lossy:
            what = f"{path} cannot be written ({error.strerror})"
            print(f"\nWARNING: {what}; the run goes on, its metrics are lost until there is space\n", file=sys.stderr)
        _lossy.add(path)
    else:
        _lossy.discard(path)


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
        except (ValueError, KeyError, TypeError):
            continue
        while entries and next(reversed(entries)) >= iteration:  # ascending at all times
            entries.popitem()
        entries[iteration] = entry
    return [entry for step, entry in entries.items() if last_iteration is None or step <= last_iteration]
