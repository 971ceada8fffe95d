"""Tiny studies with shards of their own, and invented results with known effects."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kaiyuan.quantile.results import HeldOutResult, Identity, RunResult, TaskResult, write_result
from megatron_kaiyuan.quantile.runs import SlicedStudy, write_slices
from megatron_kaiyuan.quantile.study import Study, parse_study
from tests.unit_tests.data.tiny import write_shard

VOCABULARY = 96
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 2,
    "num_query_groups": 1,
}


def write_sources(folder: Path, documents: int = 900, names: tuple[str, ...] = ("good", "odd")) -> None:
    """Scored sources of random documents, and the set `clean`."""
    rng = np.random.default_rng(3)
    for name in (*names, "clean"):
        texts = [rng.integers(0, VOCABULARY - 1, size=int(rng.integers(20, 70))).tolist() for _ in range(documents)]
        write_shard(folder / name, texts, rng.permutation(documents).astype(float).tolist())


def study_content(folder: Path, **changes: Any) -> dict[str, Any]:
    """A study of two sources, three quantiles and three seeds, as data."""
    content: dict[str, Any] = {
        "output": str(folder / "study"),
        "seq_length": 32,
        "sources": {name: {"shards": str(folder / name), "score": "score"} for name in ("good", "odd")},
        "slices": {"tops": ["0%", "40%", "80%"], "tokens": 1024, "min_documents": 5},
        "model": MODEL,
        "training": {
            "micro_batch_size": 8,
            "global_batch_size": 8,
            "precision": "fp32",
            "lr": 1e-2,
            "flags": ["--vocab-size", str(VOCABULARY), "--make-vocab-size-divisible-by", "8"],
        },
        "evaluation": {"held_out": {"clean": {"shards": str(folder / "clean"), "documents": 40}}},
    }
    return content | changes


def tiny_study(folder: Path, **changes: Any) -> Study:
    """The study of `study_content`."""
    return parse_study(study_content(folder, **changes))


def sliced_study(folder: Path, **changes: Any) -> tuple[Study, SlicedStudy]:
    """A study with its sources written and its slices cut."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sources(folder)
    study = tiny_study(folder, **changes)
    return study, write_slices(study)[0]


Effect = Callable[[str, float], float]
"""Loss in bits per byte of a source at a quantile from the top, less the common level."""


def write_results(
    study: Study,
    sliced: SlicedStudy,
    effect: Effect,
    *,
    seed_spread: float = 0.02,
    rng: np.random.Generator | None = None,
    task: bool = False,
    identities: Mapping[str, Identity] | None = None,
) -> None:
    """Write invented results: common level per document, effect of the slice, noise of the run."""
    current = Identity("tok", "model", 1024, study.evaluation_digest)
    identities = identities or {run.name: current for run in sliced.runs}
    for name, result in invent_results(
        sliced, effect, seed_spread=seed_spread, rng=rng, task=task, identities=identities
    ).items():
        write_result(study, next(run for run in sliced.runs if run.name == name), result)


def invent_results(
    sliced: SlicedStudy,
    effect: Effect,
    *,
    seed_spread: float = 0.02,
    item_spread: float = 0.1,
    rng: np.random.Generator | None = None,
    task: bool = False,
    identities: Mapping[str, Identity] | None = None,
    items: int = 60,
) -> dict[str, RunResult]:
    """Results by run: `level_i + effect + slice-by-document noise + run noise + rest`, in bits per byte."""
    rng = rng or np.random.default_rng(0)
    level = rng.normal(3.0, 0.5, items)
    sizes = rng.integers(50, 400, items)
    cell_noise: dict[tuple[str, float], np.ndarray[Any, Any]] = {}
    results = {}
    for run in sliced.runs:
        noise = cell_noise.setdefault((run.source, run.top), rng.normal(0, item_spread, items))
        bits = level + effect(run.source, run.top) + noise + rng.normal(0, seed_spread) + rng.normal(0, 0.05, items)
        identity = (identities or {}).get(run.name, Identity("tok", "model", 1024, "suite"))
        tasks = {}
        if task:
            accuracy = (rng.random(items) < 0.25 - effect(run.source, run.top)).astype(float)
            tasks["quiz"] = TaskResult("items", tuple(bits.tolist()), {"accuracy": tuple(accuracy.tolist())})
        held_out = HeldOutResult(
            nats=tuple((bits * sizes * np.log(2)).tolist()),
            tokens=tuple((sizes // 3).tolist()),
            bytes=tuple(sizes.tolist()),
        )
        results[run.name] = RunResult(run.name, run.digest, identity, {"clean": held_out}, tasks, {}, 1000.0)
    return results


def informative(source: str, top: float) -> float:
    """`good` gets worse by 0.3 bits from its best to its worst quantile, `odd` does not change."""
    return 0.3 * top if source == "good" else 0.12


def nothing(source: str, top: float) -> float:
    """No difference anywhere."""
    return 0.0


def percent(value: int) -> Fraction:
    """A quantile."""
    return Fraction(value, 100)
