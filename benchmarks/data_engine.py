#!/usr/bin/env python3
"""Index building and reading: this data engine beside Megatron-Core's GPTDataset and BlendedDataset, in one run.

    python benchmarks/data_engine.py --documents 20000000 --json data_engine.json

Both sides get the same `.bin/.idx` files. The big one for index building has a sparse `.bin` (no token of it is read);
the one for reading is real random tokens and fits in memory, so that the readers are compared and not the disk. The
rows take turns, each time in a fresh process, so that other work on the machine disturbs all of them alike; a row is
the median of its turns. The time does not include importing either package. The index is built as `tools/rank_data.py`
does, which chooses numpy's sort before its import (`megatron_kaiyuan/host/numpy_dispatch.py`).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

SEQ_LENGTH = 4096
READ_DOCUMENTS = 300_000
READ_SAMPLES = 4_000
SOURCES = 8


def main() -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000, help="documents of the index build")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per row; the median counts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        big, small = Path(folder) / "big", Path(folder) / "small"
        write_shard(big, args.documents, sparse=True)
        write_shard(small, READ_DOCUMENTS, sparse=False)
        builds = in_rounds(
            args.repeats,
            [
                ({"epochs": epochs, "system": system}, work, (str(big), epochs))
                for system, work in (("Megatron-Core", build_megatron), ("ours", build_ours))
                for epochs in (1, 4)
            ],
        )
        reads = in_rounds(
            args.repeats,
            [
                ({"system": "Megatron-Core"}, read_megatron, (str(small),)),
                ({"system": "ours, shuffled"}, read_ours, (str(small), "shuffled")),
                ({"system": "ours, curriculum (top 80%)"}, read_ours, (str(small), "curriculum")),
                ({"system": "PlanSamples, shuffled"}, read_as_trainer, (str(small), "shuffled")),
                ({"system": "PlanSamples, curriculum (top 80%)"}, read_as_trainer, (str(small), "curriculum")),
            ],
        )
    print_builds(builds, args.documents)
    print_reads(reads)
    if args.json:
        args.json.write_text(json.dumps({"documents": args.documents, "builds": builds, "reads": reads}, indent=2))


def write_shard(prefix: Path, documents: int, *, sparse: bool) -> None:
    """A shard with log-normal document lengths (mean about 1000 tokens) and uniform scores."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(6.5, 0.9, documents)).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64) * 4
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, documents, documents + 1))
        for array in (lengths, ends - lengths.astype(np.int64) * 4, np.arange(documents + 1)):
            stream.write(array.data)
    with Path(f"{prefix}.bin").open("wb") as stream:
        if sparse:
            stream.truncate(int(ends[-1]))
        else:
            rng.integers(0, 50_000, int(ends[-1]) // 4, dtype=np.int32).tofile(stream)
    np.save(f"{prefix}.scores.score.npy", rng.random(documents, dtype=np.float32))


def in_rounds(
    repeats: int, jobs: Sequence[tuple[dict[str, Any], Callable[..., dict[str, float]], tuple[Any, ...]]]
) -> list[dict[str, Any]]:
    """Run the jobs in turn, several times over.

    Of each it returns its label, the median of every figure, and the fewest seconds.
    """
    context = multiprocessing.get_context("spawn")
    results: list[list[dict[str, float]]] = [[] for _ in jobs]
    for _ in range(repeats):
        for found, (_, work, args) in zip(results, jobs, strict=True):
            with _as_the_tool(work is build_ours), context.Pool(1) as pool:
                found.append(pool.apply(_measured, (work, args)))
    rows = []
    for found, (label, _, _) in zip(results, jobs, strict=True):
        medians = {figure: statistics.median_low(result[figure] for result in found) for figure in found[0]}
        rows.append(label | medians | {"fastest": min(result["seconds"] for result in found)})
    return rows


@contextmanager
def _as_the_tool(applies: bool) -> Iterator[None]:  # noqa: FBT001
    """The environment in which `tools/rank_data.py` imports numpy, for the processes started inside."""
    before = dict(os.environ)
    if applies:
        script = "import os; from megatron_kaiyuan.host.numpy_dispatch import prefer_fast_sort; prefer_fast_sort()"
        script += "; print(os.environ.get('NPY_DISABLE_CPU_FEATURES', ''))"
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        os.environ.update({"NPY_DISABLE_CPU_FEATURES": found.stdout.strip()} if found.stdout.strip() else {})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def fastest(
    repeats: int, work: Callable[..., dict[str, float]], *args: Any, as_the_tool: bool = False
) -> dict[str, Any]:
    """The fastest of several fresh processes, and its peak memory."""
    context = multiprocessing.get_context("spawn")
    results = []
    for _ in range(repeats):
        with _as_the_tool(as_the_tool), context.Pool(1) as pool:
            results.append(pool.apply(_measured, (work, args)))
    return min(results, key=lambda result: result["seconds"])


def _measured(work: Callable[..., dict[str, float]], args: tuple[Any, ...]) -> dict[str, float]:
    warnings.simplefilter("ignore")
    result = work(*args)
    return result | {"peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """Peak resident memory of this process, shared pages of mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def build_ours(prefix: str, epochs: int) -> dict[str, float]:
    """Rank all documents, store the index, open a curriculum plan of so many passes, read one sample's documents."""
    from megatron_kaiyuan.data import Plan, open_source
    from megatron_kaiyuan.documents.rank_index import index_path, write_rank_index

    started = time.perf_counter()
    source = open_source("big", prefix)
    path = index_path(source, "score")
    write_rank_index(source, "score", path)
    plan = Plan.from_spec(plan_of({"big": prefix}, "curriculum", {"repeat": epochs}))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "samples": plan.num_samples, "bytes": path.stat().st_size}


def build_megatron(prefix: str, epochs: int) -> dict[str, float]:
    """Document, sample and shuffle index of so many epochs, as GPTDataset builds and caches them."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    started = time.perf_counter()
    indexed = IndexedDataset(prefix, multimodal=False, mmap=True)
    documents = np.arange(len(indexed), dtype=np.int32)
    tokens = int(indexed.sequence_lengths.sum(dtype=np.int64))
    samples = (epochs * tokens - 1) // SEQ_LENGTH
    with tempfile.TemporaryDirectory(dir=Path(prefix).parent) as cache:
        dataset = GPTDataset(indexed, prefix, documents, samples, Split.train, megatron_config(cache))
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(cache).rglob("*.npy"))
    return {"seconds": seconds, "samples": len(dataset), "bytes": size}


def read_ours(prefix: str, order: str) -> dict[str, float]:
    """Samples a second of eight sources, one after the other and at random."""
    from megatron_kaiyuan.data import CurriculumDataset, Plan

    return read_rates(lambda: CurriculumDataset(Plan.from_spec(plan_of_eight(prefix, order))))


def read_as_trainer(prefix: str, order: str) -> dict[str, float]:
    """The same as a training run opens and reads them: checks of the plan, then tensors, source and quantile bands."""
    from megatron_kaiyuan.data import CurriculumDataset, Plan
    from megatron_kaiyuan.model.samples import SampleOptions
    from megatron_kaiyuan.training.provider import PlanSamples

    def open_samples() -> PlanSamples:
        plan = Plan.from_spec(plan_of_eight(prefix, order))
        plan.check_resume(plan.order_record(), 1)
        plan.check_vocabulary(_Tokenizer.vocab_size)
        return PlanSamples(CurriculumDataset(plan), SampleOptions(eod_token=_Tokenizer.eod))

    return read_rates(open_samples)


def read_megatron(prefix: str) -> dict[str, float]:
    """The same eight sources through BlendedDataset over GPTDatasets, masks and positions cached as by default."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    def open_blend() -> BlendedDataset:
        config = megatron_config(None)
        datasets = []
        for _ in range(SOURCES):
            indexed = IndexedDataset(prefix, multimodal=False, mmap=True)
            documents = np.arange(len(indexed), dtype=np.int32)
            datasets.append(GPTDataset(indexed, prefix, documents, None, Split.train, config))
        return BlendedDataset(datasets, [len(dataset) for dataset in datasets], None, config)

    return read_rates(open_blend)


def read_rates(open_samples: Callable[[], Any]) -> dict[str, float]:
    """Return seconds to open and to the first sample, and samples a second in order and at random.

    A warm-up over the same samples comes first.
    """
    started = time.perf_counter()
    dataset = open_samples()
    opened = time.perf_counter()
    dataset[0]
    times = {"open": opened - started, "first": time.perf_counter() - opened}
    rng = np.random.default_rng(1)
    rates = {}
    for name, samples in (
        ("sequential", np.arange(READ_SAMPLES)),
        ("random", rng.integers(0, len(dataset), READ_SAMPLES)),
    ):
        numbers = samples.tolist()
        for _ in range(2):
            started = time.perf_counter()
            for number in numbers:
                dataset[number]
            rates[name] = READ_SAMPLES / (time.perf_counter() - started)
    return rates | times | {"seconds": 1 / rates["sequential"]}


def plan_of_eight(prefix: str, order: str) -> dict[str, Any]:
    """A plan of one phase over eight sources that are the same files."""
    keep = "top 80%" if order == "curriculum" else "all"
    return plan_of({f"source{number}": prefix for number in range(SOURCES)}, order, {"keep": keep})


def plan_of(sources: dict[str, str], order: str, part: dict[str, Any]) -> dict[str, Any]:
    """A plan of one phase over these sources."""
    return {
        "seq_length": SEQ_LENGTH,
        "sources": {name: {"shards": prefix, "score": "score"} for name, prefix in sources.items()},
        "phases": [{"name": "phase", "order": order, "sources": dict.fromkeys(sources, part)}],
    }


def megatron_config(cache: str | None) -> Any:
    """GPTDatasetConfig as a pretraining run has it, without the attention mask."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQ_LENGTH,
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return config


class _Tokenizer:
    """The facts that GPTDataset asks a tokenizer for."""

    vocab_size = 50_000
    eod = 0
    pad = -1
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 - read by GPTDataset's description only


def print_builds(rows: list[dict[str, Any]], documents: int) -> None:
    """Seconds from nothing to a readable dataset."""
    table = Table(title=f"From shards to the first sample, {documents:,} documents", title_justify="left")
    for name in (
        "system",
        "epochs",
        "samples",
        "seconds",
        "fastest",
        "times faster",
        "extra bytes a document",
        "peak MiB",
    ):
        table.add_column(name, justify="left" if name == "system" else "right")
    base = {row["epochs"]: row["seconds"] for row in rows if row["system"] == "Megatron-Core"}
    for row in rows:
        table.add_row(
            row["system"],
            str(row["epochs"]),
            f"{row['samples']:,}",
            f"{row['seconds']:.2f}",
            f"{row['fastest']:.2f}",
            f"{base[row['epochs']] / row['seconds']:.1f}",
            f"{row['bytes'] / documents:.2f}",
            f"{row['peak_mib']:,.0f}",
        )
    Console(width=120).print(table)


def print_reads(rows: list[dict[str, Any]]) -> None:
    """Samples a second and process."""
    table = Table(title=f"Reading, {SOURCES} sources, samples of {SEQ_LENGTH} tokens a second", title_justify="left")
    for name in ("system", "open, s", "first sample, ms", "sequential", "ratio", "random", "ratio"):
        table.add_column(name, justify="left" if name == "system" else "right")
    first = rows[0]
    for row in rows:
        table.add_row(
            row["system"],
            f"{row['open']:.3f}",
            f"{1000 * row['first']:.2f}",
            f"{row['sequential']:,.0f}",
            f"{row['sequential'] / first['sequential']:.2f}",
            f"{row['random']:,.0f}",
            f"{row['random'] / first['random']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
