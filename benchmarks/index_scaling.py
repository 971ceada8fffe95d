#!/usr/bin/env python3
"""Measure what it costs to start, and to look up a sample, as documents and sources grow.

Megatron-Core is measured beside it.

    python -m benchmarks.index_scaling --json index_scaling.json --plot docs/images/index_scaling.png

Documents: one source and a plan of two phases (a shuffled random half, then the top 30 % two and a half times in
ascending quality; 1 000 documents held out). Up to `--most-documents` with real `.idx` files (sparse `.bin`), beside
the document, sample and shuffle index that Megatron's GPTDataset builds; above that with simulated sizes, for which
there is no file to open. Opening ends when the first and the last sample of each phase are known; no token is read.

Sources: 1 000 documents each to open; large simulated ones to look samples up in, one after the other and at random,
beside Megatron's blending index, which is filled sample by sample before training.

Every number is the fastest of several fresh processes, without the time to import either package.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.data_engine import SEQ_LENGTH, build_megatron, fastest, write_shard
from benchmarks.plot_image import require_browser, write_png

DOCUMENTS = (100_000, 1_000_000, 5_000_000, 20_000_000, 100_000_000, 1_000_000_000, 2_000_000_000)
SOURCES = (10, 32, 100, 316, 1024)
DOCUMENTS_A_SOURCE = 1_000
BLEND_SAMPLES = 1_000_000
LOOK_UPS = 500
BLOCK = 1_024


def main() -> None:
    """Run both sweeps and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-documents", type=int, default=20_000_000, help="largest source with real files")
    parser.add_argument("--most-sources", type=int, default=SOURCES[-1], help="largest number of sources")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per number; the fastest counts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw both sweeps")
    args = parser.parse_args()
    if args.plot:
        require_browser()
    source_counts = [count for count in SOURCES if count <= args.most_sources]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(DOCUMENTS) + len(source_counts))
        documents, sources = [], []
        for count in DOCUMENTS:
            documents.append(measure_documents(count, args.repeats, real=count <= args.most_documents))
            progress.advance(task)
        for count in source_counts:
            sources.append(measure_sources(count, args.repeats))
            progress.advance(task)
    print_documents(documents)
    print_sources(sources)
    if args.json:
        args.json.write_text(json.dumps({"documents": documents, "sources": sources}, indent=1))
    if args.plot:
        write_png(figure_of(documents, sources), args.plot, 1000, 460)


def measure_documents(documents: int, repeats: int, *, real: bool) -> dict[str, Any]:
    """Seconds to build indices (real files only) and to open the plan."""
    row: dict[str, Any] = {"documents": documents}
    simulated = fastest(repeats, open_simulated, documents)
    row |= {"samples": simulated["samples"], "open_simulated": simulated["seconds"], "mib": simulated["peak_mib"]}
    if real:
        with tempfile.TemporaryDirectory() as folder:
            prefix = str(Path(folder) / "documents")
            write_shard(Path(prefix), documents, sparse=True)
            row["rank"] = fastest(repeats, rank, [prefix], as_the_tool=True)["seconds"]
            opened = fastest(repeats, open_real, [prefix], two_phases(1_000))
            row |= {"open": opened["seconds"], "samples": opened["samples"], "mib": opened["peak_mib"]}
            row["megatron"] = fastest(repeats, build_megatron, prefix, 1)["seconds"]
    return row


def measure_sources(count: int, repeats: int) -> dict[str, Any]:
    """Return seconds to open, and microseconds to look up a sample, with so many sources."""
    row: dict[str, Any] = {"sources": count}
    with tempfile.TemporaryDirectory() as folder:
        prefixes = [str(Path(folder) / f"source{number}") for number in range(count)]
        for prefix in prefixes:
            write_shard(Path(prefix), DOCUMENTS_A_SOURCE, sparse=True)
        fastest(1, rank, prefixes)
        row["open"] = fastest(repeats, open_real, prefixes, [{"name": "phase", "order": "curriculum"}])["seconds"]
    for order in ("curriculum", "shuffled"):
        found = fastest(repeats, look_up, count, order)
        row[order] = {"consecutive": found["consecutive"], "random": found["random"]}
    row["megatron"] = fastest(repeats, blend, count)["seconds"] / BLEND_SAMPLES * 1e6
    return row


def two_phases(held_out: int) -> list[dict[str, Any]]:
    """Return phases without their sources.

    The first one says how many documents are held out of each source.
    """
    return [
        {"name": "broad", "order": "shuffled", "part": {"keep": "random 50%"}, "held_out": held_out},
        {"name": "best", "order": "curriculum", "part": {"keep": "top 30%", "repeat": 2.5}},
    ]


def plan_of(sources: dict[str, Any], phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A plan in which every phase takes the same part of every source."""
    held_out = phases[0].get("held_out")
    return {
        "seq_length": SEQ_LENGTH,
        "sources": sources,
        "phases": [
            {"name": phase["name"], "order": phase["order"], "sources": dict.fromkeys(sources, phase.get("part"))}
            for phase in phases
        ],
        "validation": {name: {"documents": held_out} for name in sources} if held_out else {},
    }


def rank(prefixes: list[str]) -> dict[str, float]:
    """Build and store the rank index of each source."""
    from megatron_kaiyuan.data import open_source
    from megatron_kaiyuan.documents.rank_index import index_path, write_rank_index

    started = time.perf_counter()
    for prefix in prefixes:
        source = open_source("source", prefix)
        write_rank_index(source, "score", index_path(source, "score"))
    return {"seconds": time.perf_counter() - started}


def open_real(prefixes: list[str], phases: list[dict[str, Any]]) -> dict[str, float]:
    """Open a plan over stored shards and indices."""
    sources = {f"s{number}": {"shards": prefix, "score": "score"} for number, prefix in enumerate(prefixes)}
    return open_plan(plan_of(sources, phases), simulate=False)


def open_simulated(documents: int) -> dict[str, float]:
    """Open the plan of two phases over a source that exists by its size alone."""
    expected = {"documents": documents, "tokens": 1_000 * documents, "length_by_quality": 0.3}
    source = {"shards": "none", "score": "score", "expected": expected}
    return open_plan(plan_of({"s0": source}, two_phases(1_000)), simulate=True)


def open_plan(spec: dict[str, Any], *, simulate: bool) -> dict[str, float]:
    """Seconds from a plan as data to the first and the last sample of each phase."""
    from megatron_kaiyuan.data import Plan

    started = time.perf_counter()
    plan = Plan.from_spec(spec, simulate=simulate)
    for phase in plan.phases:
        phase.block(0, 1)
        phase.sample(phase.num_samples - 1)
    return {"seconds": time.perf_counter() - started, "samples": plan.num_samples}


def look_up(count: int, order: str) -> dict[str, float]:
    """Return the microseconds to look up a sample's source and window.

    In blocks, as a loader does, and one at random.
    """
    from megatron_kaiyuan.data import Plan

    sources = {
        f"s{number}": {
            "shards": "none",
            "score": "score",
            "expected": {"documents": 10**6, "tokens": 10**9 * (1 + number % 7)},
        }
        for number in range(count)
    }
    plan = Plan.from_spec(plan_of(sources, [{"name": "phase", "order": order}]), simulate=True)
    phase = plan.phases[0]
    for first in range(0, 20 * BLOCK, BLOCK):  # permutations are set up once a stream
        phase.block(first, first + BLOCK)
    blocks = []
    for first in range(20 * BLOCK, 60 * BLOCK, BLOCK):
        started = time.perf_counter()
        phase.block(first, first + BLOCK)
        blocks.append((time.perf_counter() - started) / BLOCK)
    samples = np.random.default_rng(0).integers(0, phase.num_samples, LOOK_UPS).tolist()
    singles = []
    for _ in range(3):
        started = time.perf_counter()
        for sample in samples:
            phase.sample(sample)
        singles.append((time.perf_counter() - started) / LOOK_UPS)
    consecutive, single = 1e6 * float(np.median(blocks)), 1e6 * min(singles)
    return {"consecutive": consecutive, "random": single, "seconds": consecutive}


def blend(count: int) -> dict[str, float]:
    """Fill Megatron's blending index: which dataset each sample comes from, and which of its samples it is."""
    from megatron.core.datasets import helpers

    weights = np.array([1.0 + number % 7 for number in range(count)])
    weights /= weights.sum()
    index = np.zeros(BLEND_SAMPLES, dtype=np.int16)
    sample_index = np.zeros(BLEND_SAMPLES, dtype=np.int64)
    started = time.perf_counter()
    helpers.build_blending_indices(index, sample_index, weights, count, BLEND_SAMPLES, False)
    return {"seconds": time.perf_counter() - started}


def print_documents(rows: Sequence[dict[str, Any]]) -> None:
    """Seconds against documents."""
    table = Table(title="Seconds, by documents of one source", title_justify="left")
    names = (
        "documents",
        "samples",
        "open the plan",
        "open, simulated",
        "peak MiB",
        "rank index, once",
        "Megatron index",
    )
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [seconds(row.get("open")), seconds(row["open_simulated"]), f"{row['mib']:,.0f}"]
        cells += [seconds(row.get("rank")), seconds(row.get("megatron"))]
        table.add_row(f"{row['documents']:,}", f"{row['samples']:,.0f}", *cells)
    Console(width=130).print(table)


def print_sources(rows: Sequence[dict[str, Any]]) -> None:
    """Opening, and microseconds a sample, against sources."""
    table = Table(title="By sources: seconds to open, microseconds a sample", title_justify="left")
    names = ("sources", "open", "curriculum", "shuffled", "curriculum, random", "shuffled, random", "Megatron blend")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [
            f"{row[order][kind]:.2f}" for kind in ("consecutive", "random") for order in ("curriculum", "shuffled")
        ]
        table.add_row(f"{row['sources']:,}", seconds(row["open"]), *cells, f"{row['megatron']:.3f}")
    Console(width=130).print(table)


def seconds(value: float | None) -> str:
    """Three significant digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.3g}"


def figure_of(documents: Sequence[dict[str, Any]], sources: Sequence[dict[str, Any]]) -> go.Figure:
    """Both sweeps on logarithmic axes."""
    titles = ("Seconds before training can start", "Microseconds a sample")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.1)
    ours, upstream, offline = "#d94801", "#2171b5", "#999999"
    lines: list[tuple[int, str, str, str, list[Any], list[Any]]] = []
    for key, name, colour, dash in (
        ("megatron", "Megatron: document, sample, shuffle index", upstream, "solid"),
        ("rank", "ours: rank index, built once", offline, "solid"),
        ("open", "ours: open the plan", ours, "solid"),
        ("open_simulated", "ours: open, simulated sizes", ours, "dot"),
    ):
        some = [row for row in documents if key in row]
        lines.append((1, name, colour, dash, [row["documents"] for row in some], [row[key] for row in some]))
    counts = [row["sources"] for row in sources]
    lines.append((2, "Megatron: blending index", upstream, "dash", counts, [row["megatron"] for row in sources]))
    for order, dash in (("curriculum", "solid"), ("shuffled", "dot")):
        found = [row[order]["consecutive"] for row in sources]
        lines.append((2, f"ours: next sample, {order}", "#238b45", dash, counts, found))
    found = [row["curriculum"]["random"] for row in sources]
    lines.append((2, "ours: any sample", "#74c476", "dash", counts, found))
    for column, name, colour, dash, xs, ys in lines:
        style = {"color": colour, "dash": dash, "width": 2}
        figure.add_scatter(x=xs, y=ys, mode="lines+markers", name=name, line=style, row=1, col=column)
    figure.update_xaxes(type="log", dtick=1, exponentformat="power")
    figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    figure.update_xaxes(title_text="documents", row=1, col=1)
    figure.update_xaxes(title_text="sources", row=1, col=2)
    figure.update_layout(legend={"orientation": "h", "y": -0.2}, margin={"t": 40, "b": 20, "l": 60, "r": 20})
    return figure


if __name__ == "__main__":
    sys.exit(main())
