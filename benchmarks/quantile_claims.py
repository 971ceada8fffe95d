#!/usr/bin/env python3
"""How often quantile benchmarking makes a false claim, and how often a true one, by simulation.

    python -m benchmarks.quantile_claims --studies 2000 --json claims.json

A world says how runs and held-out items vary where no slice is better than another. Every claim there is false, but for
the world `rough`, in which slices do differ and only a trend or a bend would be false. The power table plants an effect
of a known size, in spreads between seeds. docs/quantile-benchmark.md has the table that this printed.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from megatron_kaiyuan.host.cli import run_tool
from megatron_kaiyuan.quantile.inference import OVERALL, PAIRS_SHARE, SHAPES_SHARE, Design, pairs_of, shapes_of
from megatron_kaiyuan.quantile.statistics import Composite, Measure, Score

__all__ = ["WORLDS", "Layout", "Rate", "false_claims", "layout_of", "power", "simulated_scores"]

LEVEL = 0.05
RUNS = 3
FEW_ITEMS = 60

Noise = Callable[[np.random.Generator, int, int], NDArray[np.float64]]
"""Of a generator, cells and runs: noise of the runs `[cells, runs]`, NaN where a run is missing."""


@dataclass(frozen=True, slots=True)
class World:
    """How measurements vary."""

    runs: Noise
    items: float = 0.0
    """Spread of a cell's difference on one item, in seed spreads."""
    cluster: int = 1
    """Items in a group; half of their variance is the group's."""
    rough: float = 0.0
    """Spread of the true quality of a place around its trend."""


def _normal(rng: np.random.Generator, cells: int, runs: int) -> NDArray[np.float64]:
    return rng.normal(size=(cells, runs))


def _wild(factor: float, *, missing: bool = False) -> Noise:
    def draw(rng: np.random.Generator, cells: int, runs: int) -> NDArray[np.float64]:
        noise = rng.normal(size=(cells, runs))
        cell = int(rng.integers(cells))
        noise[cell] *= factor
        if missing:
            noise[cell, -1] = math.nan
        return noise

    return draw


def _log_normal(width: float) -> Noise:
    return lambda rng, cells, runs: rng.normal(size=(cells, runs)) * np.exp(rng.normal(0, width, (cells, 1)))


def _wild_source(rng: np.random.Generator, cells: int, runs: int) -> NDArray[np.float64]:
    noise = rng.normal(size=(cells, runs))
    noise[: cells // 2] *= 10
    return noise


def _heavy(rng: np.random.Generator, cells: int, runs: int) -> NDArray[np.float64]:
    return rng.standard_t(3, (cells, runs))


def _outlying(rng: np.random.Generator, cells: int, runs: int) -> NDArray[np.float64]:
    noise = rng.normal(size=(cells, runs))
    return np.where(rng.random((cells, runs)) < 0.05, 10 * noise, noise)


def _missing(rng: np.random.Generator, cells: int, runs: int) -> NDArray[np.float64]:
    noise = rng.normal(size=(cells, runs))
    noise[:, 1:][rng.random((cells, runs - 1)) < 0.15] = math.nan
    return noise


def _small(rng: np.random.Generator, cells: int, runs: int) -> NDArray[np.float64]:
    return 0.1 * rng.normal(size=(cells, runs))


WORLDS: dict[str, World] = {
    "equal spreads": World(_normal),
    "equal spreads, items as large": World(_normal, items=8.0),
    "one slice 3 x": World(_wild(3)),
    "one slice 10 x": World(_wild(10)),
    "one slice 25 x": World(_wild(25)),
    "one slice 10 x, a seed of it missing": World(_wild(10, missing=True)),
    "log-normal spreads": World(_log_normal(0.7)),
    "log-normal spreads, wider": World(_log_normal(1.0)),
    "items in groups of five, small run noise": World(_small, items=8.0, cluster=5),
    "rough along the score": World(_normal, rough=1.0),
    "runs missing": World(_missing),
    "heavy tails (t, 3 degrees)": World(_heavy),
    "one run in 20 at 10 x": World(_outlying),
    "half of the slices 10 x": World(_wild_source),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Sources and quantiles of a study, three seeds each."""

    name: str
    sources: int
    quantiles: int
    spread: bool

    def places(self) -> list[NDArray[np.float64]]:
        """Where the runs of each cell lie, from 0 to 1."""
        width = 1 / self.quantiles
        offsets = (np.arange(RUNS) + 0.5) / RUNS * width if self.spread else np.full(RUNS, width / 2)
        return [1 - (quantile * width + offsets) for _ in range(self.sources) for quantile in range(self.quantiles)]

    def design(self, kept: Sequence[NDArray[np.bool_]]) -> Design:
        """The study with the runs that there are."""
        names = [f"source {source}" for source in range(self.sources) for _ in range(self.quantiles)]
        places = [place[some] for place, some in zip(self.places(), kept, strict=True)]
        return Design(names, places, self.spread)


def layout_of(text: str) -> Layout:
    """A layout by its name, such as `2x3 spread`: two sources, three quantiles."""
    size, _, kind = text.partition(" ")
    sources, _, quantiles = size.partition("x")
    if not (sources.isdigit() and quantiles.isdigit() and kind in ("own", "spread")):
        raise argparse.ArgumentTypeError(f"{text!r} is no layout; write '2x3 spread' or '2x5 own'")
    return Layout(text, int(sources), int(quantiles), kind == "spread")


Effect = Callable[[int, NDArray[np.float64]], NDArray[np.float64]]
"""Of a source's number and places: quality, in seed spreads."""


def simulated_scores(
    world: World, layout: Layout, rng: np.random.Generator, effects: Sequence[Effect] = (lambda source, at: 0 * at,)
) -> tuple[Design, dict[str, Score]]:
    """One study: its design, and `overall` with a capability for each effect (alone when there is one)."""
    places = layout.places()
    noises = [world.runs(rng, len(places), RUNS) for _ in effects]
    kept = [~np.isnan(row) for row in noises[0]]
    design = layout.design(kept)
    measures = []
    for number, (effect, noise) in enumerate(zip(effects, noises, strict=True)):
        cells = []
        for cell, (at, row, some) in enumerate(zip(places, noise, kept, strict=True)):
            rough = world.rough * rng.normal(size=RUNS if layout.spread else 1)
            level = np.nan_to_num(row) + rough + effect(cell // layout.quantiles, at)
            cells.append(level[some, None] + _items(world, rng))
        groups = np.arange(cells[0].shape[1]) // world.cluster
        measures.append(Measure(f"capability {number}", cells, np.ones(cells[0].shape[1]), groups))
    if len(measures) == 1:
        return design, {OVERALL: measures[0]}
    parts: dict[str, Score] = {measure.name: Composite(measure.name, [measure]) for measure in measures}
    return design, {OVERALL: Composite(OVERALL, list(parts.values())), **parts}


def _items(world: World, rng: np.random.Generator) -> NDArray[np.float64]:
    """What a cell's runs have in common on each item, `[1, items]`."""
    if world.items == 0:
        return np.zeros((1, 1))
    if world.cluster == 1:
        return rng.normal(0, world.items, (1, FEW_ITEMS))
    of_group = np.repeat(rng.normal(0, 1, FEW_ITEMS // world.cluster), world.cluster)
    return (world.items * (of_group + rng.normal(0, 1, FEW_ITEMS)) / math.sqrt(2))[None, :]


@dataclass(frozen=True, slots=True)
class Rate:
    """Share of studies, with the standard error of the simulation."""

    share: float
    error: float

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.share:.1f} ± {100 * self.error:.1f} %"


def _rate(count: int, of: int) -> Rate:
    share = count / of
    return Rate(share, math.sqrt(max(share * (1 - share), 1 / of) / of))


def false_claims(name: str, layout: Layout, studies: int, seed: int = 0, level: float = LEVEL) -> Rate:
    """Return how often a study of a world without effects claims anything that is not so."""
    world, rng = WORLDS[name], np.random.default_rng(seed)
    count = 0
    for _ in range(studies):
        design, scores = simulated_scores(world, layout, rng)
        claims = [shape.claim for shape in shapes_of(design, scores, SHAPES_SHARE * level)]
        if world.rough == 0:
            claims += [pair.claim for pair in pairs_of(scores, PAIRS_SHARE * level)]
        count += any(claim != "none" for claim in claims)
    return _rate(count, studies)


def power(name: str, layout: Layout, effect: float, studies: int, seed: int = 0) -> dict[str, Rate]:
    """Return how often true claims are made when the first source rises by so many seed spreads from worst to best.

    `trend`: that it rises; `pair`: that its best slice is better than its worst; `bend`: that it peaks, when it rises
    to its middle and falls again by so much instead.
    """
    world, rng = WORLDS[name], np.random.default_rng(seed)
    found = dict.fromkeys(("trend", "pair", "bend"), 0)
    for _ in range(studies):
        design, scores = simulated_scores(world, layout, rng, [lambda source, at: (source == 0) * effect * at])
        shapes = shapes_of(design, scores, SHAPES_SHARE * LEVEL)
        found["trend"] += shapes[0].claim == "rises"
        best = next(pair for pair in pairs_of(scores, PAIRS_SHARE * LEVEL) if pair.second == layout.quantiles - 1)
        found["pair"] += best.claim == "first"
        design, scores = simulated_scores(
            world, layout, rng, [lambda source, at: (source == 0) * effect * (1 - 2 * abs(at - 0.5))]
        )
        found["bend"] += shapes_of(design, scores, SHAPES_SHARE * LEVEL)[1].claim == "peaks"
    return {kind: _rate(count, studies) for kind, count in found.items()}


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="simulated studies of each row (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default 0)")
    parser.add_argument(
        "--layouts", type=layout_of, nargs="+", metavar="LAYOUT", default=[layout_of("2x3 spread"),
        layout_of("2x5 spread"), layout_of("2x5 own")], help="sources x quantiles, spread or own",
    )  # fmt: skip
    parser.add_argument(
        "--effects", type=float, nargs="*", default=[6.0], metavar="E", help="planted in every world, in seed spreads"
    )
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS), metavar="WORLD")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser


def main() -> None:
    """Print both tables."""
    args = build_parser().parse_args()
    console = Console(width=150)
    rows: list[dict[str, Any]] = []
    table = Table("world", *(layout.name for layout in args.layouts), title=f"False claims in {args.studies} studies")
    for name in args.worlds:
        rates = [false_claims(name, layout, args.studies, args.seed) for layout in args.layouts]
        table.add_row(name, *map(str, rates))
        rows += [
            {"world": name, "layout": layout.name, "false": rate.share, "error": rate.error}
            for layout, rate in zip(args.layouts, rates, strict=True)
        ]
        print(f"{name}: {', '.join(map(str, rates))}", file=sys.stderr, flush=True)
    console.print(table)
    power_table = Table("world, layout, effect", "trend", "best pair", "bend", title="True claims")
    for name in args.worlds:
        for layout in args.layouts:
            for effect in args.effects:
                found = power(name, layout, effect, args.studies, args.seed)
                power_table.add_row(f"{name}, {layout.name}, {effect:g}", *(str(rate) for rate in found.values()))
                shares = {kind: rate.share for kind, rate in found.items()}
                rows.append({"world": name, "layout": layout.name, "effect": effect, **shares})
    console.print(power_table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_tool(main))
