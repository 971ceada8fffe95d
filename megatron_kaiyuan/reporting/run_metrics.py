"""A run read back from its `metrics.jsonl`: checked values, one entry a log line, and what is odd about the file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kaiyuan.data import NUM_BANDS
from megatron_kaiyuan.errors import MetricsError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.monitoring.metrics_file import read_metrics

__all__ = ["FP16_MAX", "Line", "Run", "SourceLine", "read_run", "read_runs"]

FP16_MAX = 65504.0
"""Largest finite FP16 number; `model.numerics` has it too, but needs torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLine:
    """One source since the line before."""

    loss: float | None
    """Nats a token; None if it was not finite."""
    tokens: int
    bands: tuple[int, ...]
    """Tokens by quantile band, lowest scores first; all zero for an unscored source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One log line, in which numbers that were not finite, or were not measured, are None."""

    iteration: int
    consumed_samples: int
    learning_rate: float | None
    loss: float | None
    """Mean since the line before where the sources are known, else that of the last step; nats a token."""
    grad_norm: float | None
    loss_scale: float | None
    skipped_steps: int
    tokens: int
    """Since the line before."""
    seconds: float
    """Since the line before."""
    sources: Mapping[str, SourceLine]
    activations: Mapping[str, float | None]
    """max |activation| by tensor, in the order of computation; empty where none was metered. None: not finite."""
    branch_scale_bits: int | None = None
    """K after the step, of a run whose branch scale rises by itself."""
    activations_branch_scale_bits: int | None = None
    """K when the activations were metered."""
    start: str | None = None
    """Names the start of the run that wrote the line; None: written by an earlier version."""

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput since the line before."""
        return self.tokens / self.seconds if self.seconds > 0 and self.tokens > 0 else None

    @property
    def headroom(self) -> float | None:
        """Return 65 504 / the largest activation, 0 if one was not finite, None if none was metered."""
        if not self.activations:
            return None
        peaks = [math.inf if peak is None else peak for peak in self.activations.values()]
        return FP16_MAX / max(peaks) if max(peaks) > 0 else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All lines of a run, by ascending step, each step once."""

    name: str
    path: Path
    lines: tuple[Line, ...]
    seq_length: int | None
    """Tokens a sample; None if no line counts tokens."""
    torn_lines: int
    """Lines that could not be read: a crash tore them."""
    restarts: tuple[tuple[int, int], ...]
    """Where the run went back to an older checkpoint: first step written anew, and the last one before that."""

    @property
    def sources(self) -> list[str]:
        """Every source that occurs, in the order of the plan as far as the lines show it."""
        return list(dict.fromkeys(name for line in self.lines for name in line.sources))

    @property
    def scored_sources(self) -> list[str]:
        """Sources with quantile bands."""
        scored = {name for line in self.lines for name, source in line.sources.items() if any(source.bands)}
        return [name for name in self.sources if name in scored]

    def tokens_at(self, line: Line) -> int:
        """Return the tokens trained on up to a line, from the consumed samples.

        These are samples where no line counts tokens.
        """
        return line.consumed_samples * (self.seq_length or 1)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs and give each the shortest name that distinguishes it.

    Args:
        paths: Folders with a `metrics.jsonl`, or such files.

    Raises:
        MetricsError: as `read_run`, or a run is named twice.
    """
    files = [_metrics_file(path) for path in paths]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise MetricsError(f"{twice} is named twice; give each run once")
    return [read_run(file, name) for file, name in zip(files, _names(files), strict=True)]


def read_run(path: Path, name: str | None = None) -> Run:
    """Read one run.

    Args:
        path: A folder with `metrics.jsonl`, or the file.
        name: What to call the run; default: its folder.

    Raises:
        MetricsError: there is no file, no line in it can be read, or a line is not one that training writes.
    """
    file = _metrics_file(path)
    raw = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    steps = [_step(line) for line in raw]
    entries = read_metrics(file)
    if not entries:
        state = "is empty" if not raw else f"holds no readable line (of {len(raw):,})"
        raise MetricsError(
            f"{file} {state}: a line is written at every --log-interval of `python -m megatron_kaiyuan.pretrain`; "
            "wait for the first one, or name another run"
        )
    lines = tuple(_parse(entry, file) for entry in entries)
    known = [step for step in steps if step is not None]
    return Run(
        name=name or file.parent.name,
        path=file,
        lines=lines,
        seq_length=_seq_length(lines),
        torn_lines=len(steps) - len(known),
        restarts=_restarts(known),
    )


def _metrics_file(path: Path) -> Path:
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        hint = "the folder of --save has it, or the file that --kaiyuan-metrics named"
        what = f"no metrics.jsonl in {path}" if path.is_dir() else f"{path} does not exist or is not a file"
        raise MetricsError(f"{what}: {hint}")
    return file.resolve()


def _names(files: Sequence[Path]) -> list[str]:
    """Return the last parts of the folders, as many as make the names differ.

    The whole path where two runs share a folder.
    """
    for parts in range(1, max(len(file.parts) for file in files)):
        names = ["/".join(file.parent.parts[-parts:]) for file in files]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _restarts(steps: Sequence[int]) -> tuple[tuple[int, int], ...]:
    found, latest = [], None
    for step in steps:
        if latest is not None and step <= latest:
            found.append((step, latest))
        latest = step
    return tuple(found)


def _parse(entry: Mapping[str, Any], file: Path) -> Line:
    try:
        sources = {str(name): _parse_source(told) for name, told in entry.get("sources", {}).items()}
        return Line(
            iteration=int(entry["iteration"]),
            consumed_samples=int(entry["consumed_samples"]),
            learning_rate=_number(entry.get("learning_rate")),
            loss=_interval_loss(sources, _number(entry.get("loss"))),
            grad_norm=_number(entry.get("grad_norm")),
            loss_scale=_number(entry.get("loss_scale")),
            skipped_steps=int(entry.get("skipped_steps", 0)),
            tokens=int(entry.get("tokens", 0)),
            seconds=float(entry.get("seconds", 0)),
            sources=sources,
            activations={str(name): _number(peak) for name, peak in entry.get("activations", {}).items()},
            branch_scale_bits=_whole(entry.get("branch_scale_bits")),
            activations_branch_scale_bits=_whole(entry.get("activations_branch_scale_bits")),
            start=None if entry.get("start") is None else str(entry["start"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MetricsError(
            f"{file}, the line of step {entry['iteration']} is not one that training writes ({error!r}); "
            "docs/monitoring.md has the fields of a line"
        ) from error


def _parse_source(told: Mapping[str, Any]) -> SourceLine:
    bands = tuple(int(tokens) for tokens in told["bands"])
    if len(bands) != NUM_BANDS:
        raise ValueError(f"{counted(len(bands), 'band')}, not {NUM_BANDS}")
    return SourceLine(loss=_number(told["loss"]), tokens=int(told["tokens"]), bands=bands)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _number(value: float | None) -> float | None:
    """None for what is not finite: other writers of JSON lines let NaN and Infinity through."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _interval_loss(sources: Mapping[str, SourceLine], last_step: float | None) -> float | None:
    """Return the mean over all tokens since the line before.

    It is less noisy than the loss of the last step.
    """
    tokens = sum(source.tokens for source in sources.values())
    if not tokens:
        return last_step
    total = 0.0
    for source in sources.values():
        if source.loss is None:
            return None
        total += source.loss * source.tokens
    return total / tokens


def _seq_length(lines: Sequence[Line]) -> int | None:
    """Return the sequence length from tokens and consumed samples.

    It is the largest ratio: the first line after a resume may count fewer steps.
    """
    before, ratios = 0, [0]
    for line in lines:
        if line.consumed_samples > before:
            ratios.append(line.tokens // (line.consumed_samples - before))
        before = line.consumed_samples
    return max(ratios) or None
