"""What the plan says that a run should have seen by a sample: its phases, tokens by source and by quantile band."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kaiyuan.data import NUM_BANDS, Plan
from megatron_kaiyuan.errors import MetricsError, PlanError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.run_metrics import Run

__all__ = ["PhaseMark", "check_plan", "expected_band_tokens", "expected_tokens", "load_description", "phase_marks"]


@dataclass(frozen=True, slots=True)
class PhaseMark:
    """Where a phase begins and ends on the axis of tokens."""

    name: str
    order: str
    start: int
    stop: int


def load_description(path: Path) -> dict[str, Any]:
    """What `Plan.describe` says of a plan file, or what `tools/plan_data.py PLAN --json` wrote (`.json`).

    Raises:
        PlanError: neither a plan nor such a description.
    """
    if path.suffix != ".json":
        return Plan.load(path).describe(NUM_BANDS)
    try:
        told: dict[str, Any] = json.loads(path.read_text())
        bands = {len(source["bands"]) for source in told["sources"].values()} - {0}
        _ = told["seq_length"], told["samples"], [phase["first_sample"] for phase in told["phases"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path} is not what {tool('plan')} PLAN --json writes ({error!r})") from error
    if bands - {NUM_BANDS}:
        raise PlanError(f"{path} has other bands than the {NUM_BANDS} that a run counts; write it without --bands")
    return told


def check_plan(run: Run, description: Mapping[str, Any]) -> None:
    """Refuse a plan that cannot be the run's.

    Raises:
        MetricsError: another sequence length, or sources that the plan does not have.
    """
    if run.seq_length is not None and run.seq_length != description["seq_length"]:
        raise MetricsError(
            f"--plan has seq_length {description['seq_length']:,}, but {run.path} counts "
            f"{counted(run.seq_length, 'token')} a "
            "sample: give the plan that the run was trained with"
        )
    unknown = [name for name in run.sources if name not in description["sources"]]
    if unknown:
        raise MetricsError(
            f"--plan has no source {', '.join(unknown)}, which {run.path} counts: give the plan that the run was "
            "trained with"
        )


def phase_marks(description: Mapping[str, Any] | None) -> list[PhaseMark]:
    """Return the phases over the tokens of the run, none without a plan."""
    if description is None:
        return []
    length = description["seq_length"]
    return [
        PhaseMark(
            phase["name"],
            phase["order"],
            phase["first_sample"] * length,
            (phase["first_sample"] + phase["samples"]) * length,
        )
        for phase in description["phases"]
    ]


def expected_tokens(description: Mapping[str, Any], source: str, consumed: int) -> float:
    """Return the tokens of a source in the first `consumed` samples.

    The interleave keeps this to about a sample.
    """
    tokens: float = sum(
        phase["sources"][source]["tokens"] * _progress(phase, consumed)
        for phase in description["phases"]
        if source in phase["sources"]
    )
    return tokens


def expected_band_tokens(description: Mapping[str, Any], source: str, consumed: int) -> list[float]:
    """Return the same by quantile band, `[NUM_BANDS]`, lowest scores first.

    A stream in ascending quality fills its bands from below, pass by pass; one in random order fills all alike.
    """
    totals = [0.0] * NUM_BANDS
    bands = description["sources"][source]["bands"]
    for phase in description["phases"]:
        row, progress = phase["sources"].get(source), _progress(phase, consumed)
        if row is None or not progress or not bands:
            continue
        seen = [float(band["seen"].get(phase["name"], 0)) for band in bands]
        if row["order"] == "ascending quality":
            shown = _ascending(seen, row["repeat"], progress)
        else:
            shown = [tokens * progress for tokens in seen]
        totals = [total + tokens for total, tokens in zip(totals, shown, strict=True)]
    return totals


def _progress(phase: Mapping[str, Any], consumed: int) -> float:
    done: float = (consumed - phase["first_sample"]) / phase["samples"]
    return min(max(done, 0.0), 1.0)


def _ascending(seen: Sequence[float], repeat: float, progress: float) -> list[float]:
    """Return whole passes, then the pass under way, filled from the lowest band.

    The last, fractional pass is as wide.
    """
    done = progress * repeat
    whole = int(done)
    one_pass = [tokens / repeat for tokens in seen]
    shown = [tokens * whole for tokens in one_pass]
    width = min(1.0, repeat - whole)
    left = (done - whole) * sum(one_pass)
    for band, tokens in enumerate(one_pass):
        part = min(tokens * width, left)
        shown[band] += part
        left -= part
    return shown
