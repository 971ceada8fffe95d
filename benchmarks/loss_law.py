#!/usr/bin/env python3
"""How far off the loss is that a fitted multi-power law predicts for schedules it was not fitted to, by simulation.

    python -m benchmarks.loss_law --repeats 20

The losses are those of the law, summed step by step as arXiv 2503.12811 writes it, with 2 % of noise a step. So this
measures the fit and its reach, and not whether a real run follows the law. docs/plan.md has the table.
"""

import argparse
import functools
import sys

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from megatron_kaiyuan.host.cli import run_tool
from megatron_kaiyuan.reporting.loss_law import Curve, fit_law

__all__ = ["PEAK", "TRUE", "UNIT", "losses_by_the_paper", "schedule"]

TRUE = (2.6, 0.6, 0.45, 0.45, 8.0, 0.4, 0.6)
"""L0, A, alpha, B, C, beta and gamma of the invented runs."""
PEAK = 1e-3
UNIT = 0.8
"""Sum of rates that is 1 in `TRUE`."""
FITTED, STEPS, NOISE = ("constant", "cosine", "step"), 800, 0.02
PREDICTED = (("wsd", 800), ("linear", 800), ("wsd", 1600), ("cosine", 1600), ("wsd", 3200))


def schedule(kind: str, steps: int) -> NDArray[np.float64]:
    """Return the rates of a schedule with a warm-up of a fiftieth, `[steps]`."""
    warm = steps // 50
    x = np.arange(steps - warm) / (steps - warm)
    shapes = {
        "constant": np.ones_like(x),
        "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * x)),
        "linear": 1 - 0.9 * x,
        "wsd": np.where(x < 0.8, 1.0, 1 - 0.9 * (x - 0.8) / 0.2),
        "step": np.where(x < 0.5, 1.0, 0.3) * np.where(x < 0.8, 1.0, 0.4),
    }
    return np.asarray(PEAK * np.concatenate([(np.arange(warm) + 1) / warm, shapes[kind]]), dtype=np.float64)


@functools.lru_cache(maxsize=32)
def losses_by_the_paper(kind: str, steps: int) -> NDArray[np.float64]:
    """Return the losses of `TRUE` along a schedule, each step's sum written out, `[steps]`."""
    floor, height, alpha, gain, speed, beta, gamma = TRUE
    rates = schedule(kind, steps)
    warm, shares, sums = steps // 50, rates / PEAK, np.cumsum(rates) / UNIT
    found = []
    for t in range(steps):
        k = np.arange(warm, t + 1)
        gained = 1 - (speed * shares[k] ** -gamma * (sums[t] - sums[k - 1]) + 1) ** -beta
        found.append(floor + height * sums[t] ** -alpha - gain * float((shares[k - 1] - shares[k]) @ gained))
    return np.array(found)


def _errors(kinds: tuple[str, ...], seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    steps = np.arange(1, STEPS + 1)
    curves = [
        Curve(
            kind, schedule(kind, STEPS), steps, losses_by_the_paper(kind, STEPS) * np.exp(rng.normal(0, NOISE, STEPS))
        )
        for kind in kinds
    ]
    law = fit_law(curves)
    none = np.empty(0, dtype=np.int64)
    found = []
    for kind, length in PREDICTED:
        predicted = law.loss(Curve(kind, schedule(kind, length), none, np.empty(0)), np.array([length]))
        found.append(abs(float(predicted[0]) / float(losses_by_the_paper(kind, length)[-1]) - 1))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="fits to new noise (default 20)")
    args = parser.parse_args()
    table = Table("fitted to", *(f"{kind}, {length} steps" for kind, length in PREDICTED))
    for kinds in (FITTED[:2], FITTED):
        errors = 100 * np.array([_errors(kinds, seed) for seed in range(args.repeats)])
        cells = [f"{mean:.1f} ({largest:.1f}) %" for mean, largest in zip(errors.mean(0), errors.max(0), strict=True)]
        table.add_row(", ".join(kinds), *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(run_tool(main))
