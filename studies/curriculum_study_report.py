"""Tables and a plot of the curriculum study: held-out loss of each arm, and paired differences to the first arm.

Runs of one seed share their first weights, their batch and their budget, so arms are compared seed by seed. The gain of
an arm with a seed is the first arm's loss less its own. All gains hold the noise of the first arm's runs, so together
they are no better evidence of it than one of them: each arm has a paired t test of its own, with one degree of freedom
less than seeds. Intervals are at 95 %, p-values are corrected over the arms after Holm. Beside it stands what needs no
variance: how often the first arm's runs would all end up above the others' by chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_1samp

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.statistics import holm
from studies.curriculum_study_runs import ARMS, Arm

__all__ = ["ArmSummary", "Gain", "draw", "gains", "print_report", "rank_statement", "summaries"]

CONFIDENCE = 0.95
METRICS = {"loss": "nats/token", "bits_per_byte": "bits/byte"}
COLORS = ("#7f7f7f", "#d62728", "#1f77b4", "#2ca02c", "#bcbd22", "#9467bd")

Results = Mapping[tuple[str, int], dict[str, Any]]
"""By arm and seed."""


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One domain of one arm's final model over the seeds."""

    arm: str
    domain: str
    metric: str
    mean: float
    spread: float
    """Standard deviation between seeds; NaN for one seed."""
    last_mean: float
    """Of the last weights, whatever the arm's final model is."""
    average_mean: float
    """Of the average of the last checkpoints."""


@dataclass(frozen=True, slots=True)
class Gain:
    """How much lower the loss of an arm is than the first arm's, over the seeds that both have."""

    arm: str
    domain: str
    metric: str
    seeds: int
    value: float
    half_width: float
    """Of the confidence interval; NaN for one seed."""
    p_value: float
    """Corrected over the arms of this domain and metric."""


def final_value(result: Mapping[str, Any], arm: Arm, domain: str, metric: str) -> float:
    """Return the value of the weights that this arm ends with.

    For `all` it is the mean of all domains.
    """
    return _value(result, "average" if arm.averaged else "last", domain, metric)


def _value(result: Mapping[str, Any], weights: str, domain: str, metric: str) -> float:
    held_out = result["held_out"][weights]
    domains = list(held_out) if domain == "all" else [domain]
    return float(np.mean([held_out[name][metric] for name in domains]))


def domains_of(results: Results) -> list[str]:
    """Held-out sets, and `all` for their mean."""
    first = next(iter(results.values()))
    return [*first["held_out"]["last"], "all"]


def arms_of(results: Results) -> list[Arm]:
    """Arms with results, in order."""
    present = {arm for arm, _ in results}
    return [arm for arm in ARMS if arm.key in present]


def summaries(results: Results) -> list[ArmSummary]:
    """Every arm, domain and metric."""
    found = []
    for arm in arms_of(results):
        of_arm = [result for (key, _), result in sorted(results.items()) if key == arm.key]
        for domain in domains_of(results):
            for metric in METRICS:
                values = np.array([final_value(result, arm, domain, metric) for result in of_arm])
                last, average = (
                    float(np.mean([_value(result, weights, domain, metric) for result in of_arm]))
                    for weights in ("last", "average")
                )
                spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
                found.append(ArmSummary(arm.key, domain, metric, float(values.mean()), spread, last, average))
    return found


def gains(results: Results, domain: str, metric: str) -> list[Gain]:
    """Return the gain of every arm over the first.

    Raises:
        StudyError: the first arm, or any other, has no seed in common with it.
    """
    first, *others = arms_of(results)
    if first != ARMS[0] or not others:
        raise StudyError(f"nothing to compare: results of {ARMS[0].key} and of another arm are needed")
    cells, compared = [], []
    for arm in others:
        seeds = [seed for key, seed in sorted(results) if key == arm.key and (first.key, seed) in results]
        if seeds:
            pairs = [(results[first.key, seed], results[arm.key, seed]) for seed in seeds]
            own = [final_value(a, first, domain, metric) - final_value(b, arm, domain, metric) for a, b in pairs]
            cells.append(np.array(own))
            compared.append(arm)
    if not cells:
        raise StudyError(f"no seed has results of both {ARMS[0].key} and another arm: train more, then report")
    tested = [_paired_t(own) for own in cells]
    corrected = holm([p_value for _, p_value in tested])
    return [
        Gain(arm.key, domain, metric, len(own), float(own.mean()), half, p_value)
        for arm, own, (half, _), p_value in zip(compared, cells, tested, corrected, strict=True)
    ]


def _paired_t(own: NDArray[np.float64]) -> tuple[float, float]:
    """Return half of the confidence interval and the two-sided p-value of the mean gain.

    NaN and 1 for one seed.
    """
    if len(own) < 2:
        return math.nan, 1.0
    if np.ptp(own) == 0:
        return 0.0, 0.0 if own[0] else 1.0
    test = ttest_1samp(own, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return float(high - low) / 2, float(test.pvalue)


def rank_statement(results: Results, metric: str = "loss") -> tuple[bool, float]:
    """Return whether every run of all ascending arms ends below every uniform run of the first arm, and its chance.

    The chance is that of this one among all ways to choose the first arm's runs, if nothing differs.
    """
    first = ARMS[0]
    ascending = {arm.key: arm for arm in arms_of(results) if arm.ascending}
    uniform = [final_value(result, first, "all", metric) for (key, _), result in results.items() if key == first.key]
    others = [
        final_value(result, ascending[key], "all", metric) for (key, _), result in results.items() if key in ascending
    ]
    return max(others) < min(uniform), 1 / math.comb(len(uniform) + len(others), len(uniform))


def print_report(results: Results, told: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Print the two tables, and return their numbers as plain data."""
    console = console or Console(width=150)
    described = f"{told['size']}, {told['tokens']:,} tokens a run, {told['steps']:,} steps, {told['precision']}"
    found = summaries(results)
    table = Table(title=f"Held-out loss, nats/token (bits/byte); {described}", title_justify="left")
    for name in ("arm", *domains_of(results), "last weights, all", "average, all"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in arms_of(results):
        own = {(row.domain, row.metric): row for row in found if row.arm == arm.key}
        cells = [_cell(own[domain, "loss"], own[domain, "bits_per_byte"]) for domain in domains_of(results)]
        whole = own["all", "loss"]
        table.add_row(arm.name, *cells, f"{whole.last_mean:.4f}", f"{whole.average_mean:.4f}")
    console.print(table)
    console.print("Mean over seeds ± their standard deviation, of the weights that the arm ends with.")
    compared = {
        (domain, metric): gains(results, domain, metric) for domain in domains_of(results) for metric in METRICS
    }
    _print_gains(console, results, compared)
    apart, chance = rank_statement(results)
    console.print(
        f"{'Every' if apart else 'Not every'} ascending run is below every run of {ARMS[0].name}, mean of all domains"
        + (f"; by chance once in {1 / chance:,.0f}." if apart else ".")
    )
    return {
        "study": dict(told),
        "arms": [asdict(row) for row in found],
        "gains": [asdict(gain) for rows in compared.values() for gain in rows],
        "all_ascending_below_all_uniform": apart,
        "chance_of_that": chance,
    }


def _cell(loss: ArmSummary, bits: ArmSummary) -> str:
    spread = "" if math.isnan(loss.spread) else f" ± {loss.spread:.4f}"
    return f"{loss.mean:.4f}{spread} ({bits.mean:.4f})"


def _print_gains(console: Console, results: Results, compared: Mapping[tuple[str, str], Sequence[Gain]]) -> None:
    table = Table(
        title=f"Gain over {ARMS[0].name} (positive: lower loss), nats/token, 95 % interval", title_justify="left"
    )
    for name in ("arm", "domain", "seeds", "gain", "interval", "p (Holm)"):
        table.add_column(name, justify="left" if name in ("arm", "domain") else "right")
    names = {arm.key: arm.name for arm in ARMS}
    for domain in domains_of(results):
        for gain in compared[domain, "loss"]:
            interval = (
                "one seed: none"
                if math.isnan(gain.half_width)
                else (f"{gain.value - gain.half_width:+.4f} to {gain.value + gain.half_width:+.4f}")
            )
            row = (names[gain.arm], domain, str(gain.seeds), f"{gain.value:+.4f}", interval, f"{gain.p_value:.3g}")
            table.add_row(*row)
    console.print(table)


def draw(results: Results, told: Mapping[str, Any]) -> Any:
    """A plotly figure: gains with their intervals, final loss of every run, training loss and learning rate.

    Raises:
        ModuleNotFoundError: plotly is not installed; machines that only train need not have it.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = ("Gain over (a), held-out, nats/token, 95 %", "Held-out loss of each run, all domains",
              "Training loss (of what the order shows then)", "Learning rate")  # fmt: skip
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles, vertical_spacing=0.14, horizontal_spacing=0.09)
    rows = {(gain.arm, gain.domain): gain for domain in domains_of(results) for gain in gains(results, domain, "loss")}
    for arm in arms_of(results):
        color = COLORS[ARMS.index(arm)]
        own = [(domain, rows[arm.key, domain]) for domain in domains_of(results) if (arm.key, domain) in rows]
        if own:
            bars = {"type": "data", "array": [0 if math.isnan(g.half_width) else g.half_width for _, g in own]}
            marks = go.Bar(x=[d for d, _ in own], y=[g.value for _, g in own], error_y=bars, marker_color=color)
            figure.add_trace(marks.update(name=arm.name, showlegend=False), row=1, col=1)
        of_arm = [result for (key, _), result in sorted(results.items()) if key == arm.key]
        finals = [final_value(result, arm, "all", "loss") for result in of_arm]
        dots = go.Scatter(x=[arm.name[:3]] * len(finals), y=finals, mode="markers", marker={"color": color, "size": 11})
        figure.add_trace(dots.update(name=arm.name, legendgroup=arm.key), row=1, col=2)
        for column, entry in ((1, 1), (2, 2)):
            _add_curve(figure, of_arm[0]["curve"], entry, column, arm, color)
    figure.update_xaxes(title_text="tokens", row=2)
    figure.update_layout(title=f"Curriculum study: {told['size']}, {told['tokens']:,} tokens a run{told['note']}")
    return figure


def _add_curve(
    figure: Any, curve: Sequence[Sequence[float | None]], entry: int, column: int, arm: Arm, color: str
) -> None:
    """The first seed's curve, over tokens."""
    import plotly.graph_objects as go

    line = go.Scatter(x=[point[0] for point in curve], y=[point[entry] for point in curve], mode="lines")
    figure.add_trace(line.update(line_color=color, name=arm.name, showlegend=False), row=2, col=column)


def write_page(figure: Any, path: Path) -> None:
    """One file that a browser opens without a network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
