#!/usr/bin/env python3
"""How far the token mix of a curriculum drifts: the paper's ordering of documents beside ours of windows.

    python -m studies.order_study --json order_study.json --plot docs/images/order_study.png

Four sources with invented documents: log-normal lengths, and scores that correlate with the logarithm of the length as
asked. Each row orders the same documents both ways. The paper's ordering is the reference of the tests
(`tests/unit_tests/data/paper_order.py`); ours is asked of the engine, which needs no more than the sizes. No GPU, a
minute or two.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.plot_image import require_browser, write_png
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.interleave import prefix_bound
from tests.unit_tests.data.paper_order import paper_order, tokens_in_slices

SEQ_LENGTH = 4096
BATCH = 2048
SLICES = 20
MEAN_LENGTH = 1000
SHARES = {"web": 0.5, "code": 0.2, "math": 0.2, "encyclopedia": 0.1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: how lengths are spread, and how they correlate with the score in each source."""

    spread: float
    """Standard deviation of the logarithm of the length."""
    correlation: Mapping[str, float]
    """Of the score's normal quantile and the logarithm of the length; a source that is not named has 0."""

    @property
    def name(self) -> str:
        """As in the table."""
        return ", ".join(f"{name} {value:+.1f}" for name, value in self.correlation.items() if value) or "none"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Largest distance of a source's share of the tokens from its nominal share, in percentage points."""

    paper_slice: float
    """In any twentieth of the phase."""
    paper_batch: float
    """In any batch."""
    ours_slice: float
    ours_batch: float
    bound_slice: float
    """What docs/data-engine.md proves of ours."""
    bound_batch: float
    quality_gap: float
    """Ours: largest distance, at one moment, of the score quantiles that two sources have reached, in points."""
    paper_web: list[float]
    """Share of `web` in each twentieth of the phase."""
    ours_web: list[float]


def main() -> None:
    """Run all cases, print the table, write the files that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=4_000_000, help="documents of all sources (default 4 000 000)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the share of web over the phase")
    args = parser.parse_args()
    if args.plot:
        require_browser()
    cases = all_cases()
    results = [(case, measure(case, args.documents)) for case in track(cases, "ordering", console=Console(stderr=True))]
    print_table(results, args.documents)
    if args.json:
        rows = [asdict(case) | asdict(drift) for case, drift in results]
        args.json.write_text(json.dumps({"documents": args.documents, "rows": rows}, indent=1))
    if args.plot:
        write_png(figure_of(results), args.plot, 900, 460)


def all_cases() -> list[Case]:
    """Return web's correlation by strength and spread of lengths, then several sources at once."""
    cases = [
        Case(spread=spread, correlation={"web": correlation})
        for spread in (0.5, 0.9, 1.3)
        for correlation in (0.0, 0.1, 0.3, 0.5, 0.8)
    ]
    together = dict.fromkeys(SHARES, 0.5)
    return [
        *cases,
        Case(spread=0.9, correlation={"web": -0.5}),
        Case(spread=0.9, correlation={"web": 0.5, "code": -0.5}),
        Case(spread=0.9, correlation=together),
    ]


def measure(case: Case, documents: int) -> Drift:
    """Order the documents of a case both ways and compare with the nominal shares."""
    rng = np.random.default_rng(0)
    scores, lengths = [], []
    for name, share in SHARES.items():
        some = invent(round(share * documents), case.spread, case.correlation.get(name, 0.0), rng)
        scores.append(some[0])
        lengths.append(some[1])
    sizes = np.array([int(some.sum()) for some in lengths])
    nominal = sizes / sizes.sum()
    datasets, numbers = paper_order(scores, rng)
    in_order = np.concatenate(lengths)[numbers + np.concatenate([[0], np.cumsum([len(s) for s in scores])])[datasets]]
    batch_edges = np.arange(0, sizes.sum(), SEQ_LENGTH * BATCH, dtype=np.float64)
    slices = tokens_in_slices(datasets, in_order, np.linspace(0, sizes.sum(), SLICES + 1))
    batches = tokens_in_slices(datasets, in_order, batch_edges)
    ours_slices, ours_batches, bound_slice, bound_batch = our_counts([len(some) for some in lengths], sizes)
    return Drift(
        paper_slice=worst(slices, nominal),
        paper_batch=worst(batches, nominal),
        ours_slice=worst(ours_slices, nominal),
        ours_batch=worst(ours_batches, nominal),
        bound_slice=bound_slice,
        bound_batch=bound_batch,
        quality_gap=quality_gap(scores, lengths),
        paper_web=(slices[:, 0] / slices.sum(axis=1)).tolist(),
        ours_web=(ours_slices[:, 0] / ours_slices.sum(axis=1)).tolist(),
    )


def invent(
    documents: int, spread: float, correlation: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return invented scores and lengths of documents.

    The lengths' mean is `MEAN_LENGTH`.
    """
    score = rng.standard_normal(documents)
    noise = rng.standard_normal(documents)
    logarithm = correlation * score + np.sqrt(1 - correlation**2) * noise
    lengths = MEAN_LENGTH * np.exp(spread * logarithm - spread**2 / 2)
    return score, np.maximum(1, np.round(lengths)).astype(np.int64)


def our_counts(
    documents: Sequence[int], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float, float]:
    """Samples of each source in each slice and batch of our order, and the proved bounds in percentage points."""
    sources = {
        name: {"shards": "none", "score": "score", "expected": {"documents": count, "tokens": int(size)}}
        for name, count, size in zip(SHARES, documents, tokens, strict=True)
    }
    phases = [{"name": "phase", "order": "curriculum", "sources": dict.fromkeys(sources)}]
    plan = Plan.from_spec({"seq_length": SEQ_LENGTH, "sources": sources, "phases": phases}, simulate=True)
    phase, samples = plan.phases[0], plan.num_samples
    numbers = np.concatenate([phase.block(at, min(at + BATCH, samples))[0] for at in range(0, samples, BATCH)])
    shown = np.concatenate([np.zeros((1, len(sources))), np.cumsum(np.eye(len(sources))[numbers], axis=0)])
    slices = np.diff(shown[np.linspace(0, samples, SLICES + 1).astype(int)], axis=0)
    batches = np.diff(shown[np.arange(0, samples + 1, BATCH)], axis=0)
    bound = 200 * max(prefix_bound(phase.rates.tolist(), number) for number in range(len(sources)))
    return slices, batches, bound / slices.sum(axis=1).min(), bound / BATCH


def worst(tokens: NDArray[np.float64], nominal: NDArray[np.float64]) -> float:
    """Return the largest distance of a share from its nominal value, in percentage points.

    Tokens are `[windows, sources]`.
    """
    return float(100 * np.abs(tokens / tokens.sum(axis=1, keepdims=True) - nominal).max())


def quality_gap(scores: Sequence[NDArray[np.float64]], lengths: Sequence[NDArray[np.int64]]) -> float:
    """Points between the score quantiles that two sources have reached when both have shown the same part of tokens."""
    reached = []
    for score, length in zip(scores, lengths, strict=True):
        shown = np.cumsum(length[np.argsort(score)])
        reached.append(np.interp(np.linspace(0, 1, 201), shown / shown[-1], np.arange(1, len(score) + 1) / len(score)))
    return float(100 * np.ptp(np.array(reached), axis=0).max())


def print_table(results: Sequence[tuple[Case, Drift]], documents: int) -> None:
    """Rows as Markdown too: cells are plain."""
    title = f"Largest drift of a share of tokens, percentage points; {documents:,} documents"
    table = Table(title=title, title_justify="left")
    table.add_column("lengths: spread", justify="right")
    table.add_column("correlation")
    for name in ("paper, 1/20", "paper, batch", "ours, 1/20", "bound", "ours, batch", "bound", "quality gap, ours"):
        table.add_column(name, justify="right")
    for case, drift in results:
        numbers = (drift.paper_slice, drift.paper_batch)
        small = (drift.ours_slice, drift.bound_slice, drift.ours_batch, drift.bound_batch)
        cells = [f"{number:.2f}" for number in numbers] + [f"{number:.3f}" for number in small]
        table.add_row(f"{case.spread:.1f}", case.name, *cells, f"{drift.quality_gap:.1f}")
    Console(width=150).print(table)


def figure_of(results: Sequence[tuple[Case, Drift]]) -> go.Figure:
    """Share of web in each twentieth of the phase, for each strength of its correlation at the middle spread."""
    figure = go.Figure()
    middle = [
        (c, d) for c, d in results if c.spread == 0.9 and set(c.correlation) == {"web"} and c.correlation["web"] >= 0
    ]
    colours = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b")
    places = [100 * (number + 0.5) / SLICES for number in range(SLICES)]
    for colour, (case, drift) in zip(colours, middle, strict=True):
        shares = [100 * share for share in drift.paper_web]
        name = f"paper, correlation {case.correlation['web']:.1f}"
        figure.add_scatter(x=places, y=shares, mode="lines", name=name, line={"color": colour, "width": 2})
    ours: dict[str, Any] = {"color": "#d94801", "width": 3, "dash": "dot"}
    shares = [100 * share for share in middle[-1][1].ours_web]
    figure.add_scatter(x=places, y=shares, mode="lines", name="ours, every correlation", line=ours)
    figure.update_xaxes(title_text="part of the phase, %", range=[0, 100])
    figure.update_yaxes(title_text="web's share of the tokens, %")
    figure.update_layout(title="Longer documents score higher: what happens to web's nominal 50 %", margin_t=50)
    return figure


if __name__ == "__main__":
    sys.exit(main())
