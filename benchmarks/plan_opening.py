#!/usr/bin/env python3
"""Opening a plan of thousands of shards, with scores, manifests and rank indexes on disk.

    python -m benchmarks.plan_opening --json plan_opening.json

The shards have sparse `.bin` files; everything that opening reads is real: `.idx`, scores, manifests, rank indexes. The
plan has 31 sources and two phases (a shuffled random half of each source, then the top 30 % two and a half times in
ascending quality), and 100 documents of each source are held out. "Warm" is the fastest of several fresh processes,
"cold" one whose files were dropped from the page cache before (their folder entries and inodes stay); each may keep as
many files open as this shell allows, or 1 024 in the last row. No time includes importing the package.

Opening ends when the plan knows its samples. A trainer then also compares the order with that of its checkpoint (the
fingerprint), checks the vocabulary (a manifest of each shard) and reads its first sample.
"""

import argparse
import json
import os
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.data_engine import SEQ_LENGTH, fastest
from megatron_kaiyuan.data import Plan, open_source
from megatron_kaiyuan.data.dataset import CurriculumDataset
from megatron_kaiyuan.documents.rank_index import index_path, write_rank_index
from megatron_kaiyuan.shards.manifest import Manifest, TokenizerRecord, created_by

SHARDS = (1_000, 2_500, 5_000)
SOURCES = 31
FEW_FILES = 1024
"""The limit of open files in most shells; `ulimit -n` shows and raises it."""
VOCABULARY = 50_000
STEPS = ("open", "first sample", "fingerprint", "vocabulary")


def main() -> None:
    """Write the shards, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=SHARDS, help="numbers of shards")
    parser.add_argument("--documents", type=int, default=20_000, help="documents of each shard")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per warm row; the fastest counts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(args.shards))
        rows = []
        for count in args.shards:
            rows += measure(count, args.documents, args.repeats)
            progress.advance(task)
    print_rows(rows, args.documents)
    if args.json:
        args.json.write_text(json.dumps({"documents_a_shard": args.documents, "rows": rows}, indent=1))


def measure(shards: int, documents: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of each step, cold and warm."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder, shards, documents)
        os.sync()  # what is still to be written cannot be dropped
        drop_from_cache(folder)
        rows = {"cold": fastest(1, open_and_begin, str(folder))}
        rows["warm"] = fastest(repeats, open_and_begin, str(folder))
        rows[f"warm, {FEW_FILES} files"] = fastest(repeats, open_and_begin, str(folder), FEW_FILES)
    return [{"shards": shards, "cache": kind} | found for kind, found in rows.items()]


def write_sources(folder: Path, shards: int, documents: int) -> None:
    """Shards of log-normal document lengths, dealt out to the sources in turn, and a rank index for each source."""
    chance = np.random.default_rng(0)
    for number in range(shards):
        source = folder / f"source{number % SOURCES:02}"
        source.mkdir(exist_ok=True)
        write_shard(source / f"shard_{number // SOURCES:05}_text_document", documents, chance)
    for source in folder.iterdir():
        opened = open_source(source.name, str(source))
        write_rank_index(opened, "score", index_path(opened, "score"))


def write_shard(prefix: Path, documents: int, chance: np.random.Generator) -> None:
    """All files of a shard but the table of its documents, as tools/preprocess_data.py names them."""
    lengths = np.maximum(1, chance.lognormal(6.5, 0.9, documents)).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64) * 4
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, documents, documents + 1))
        for array in (lengths, ends - lengths.astype(np.int64) * 4, np.arange(documents + 1)):
            stream.write(array.data)
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(int(ends[-1]))
    np.save(f"{prefix}.scores.score.npy", chance.random(documents, dtype=np.float32))
    manifest = Manifest(
        documents=documents,
        tokens=int(ends[-1]) // 4,
        dtype="int32",
        max_token_id=VOCABULARY - 1,
        append_eod=False,
        files={},
        scores={},
        tokenizer=TokenizerRecord(
            type="HuggingFaceTokenizer", model="none", vocab_size=VOCABULARY, eod_id=None, fingerprint="0" * 64
        ),
        inputs=[],
        skipped={},
        json_key="text",
        created_by=created_by(),
    )
    Path(f"{prefix}.manifest.json").write_text(manifest.model_dump_json(indent=1))


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the content of all files.

    It keeps what is not yet written.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_and_begin(folder: str, files: int | None = None) -> dict[str, float]:
    """Seconds of each step from a plan as data to its first sample, with so many files open at once at most."""
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    sources = {path.name: {"shards": str(path), "score": "score"} for path in sorted(Path(folder).iterdir())}
    marks = [time.perf_counter()]
    plan = Plan.from_spec(plan_of(sources))
    marks.append(time.perf_counter())
    CurriculumDataset(plan)[0]
    marks.append(time.perf_counter())
    _ = plan.fingerprint
    marks.append(time.perf_counter())
    plan.check_vocabulary(VOCABULARY)
    marks.append(time.perf_counter())
    steps = dict(zip(STEPS, np.diff(marks).tolist(), strict=True))
    return steps | {"seconds": marks[-1] - marks[0]}


def plan_of(sources: dict[str, Any]) -> dict[str, Any]:
    """A plan of two phases over all sources."""
    parts = {"broad": {"keep": "random 50%"}, "best": {"keep": "top 30%", "repeat": 2.5}}
    return {
        "seq_length": SEQ_LENGTH,
        "sources": sources,
        "phases": [
            {"name": name, "order": order, "sources": dict.fromkeys(sources, parts[name])}
            for name, order in (("broad", "shuffled"), ("best", "curriculum"))
        ],
        "validation": {name: {"documents": 100} for name in sources},
    }


def print_rows(rows: Sequence[dict[str, Any]], documents: int) -> None:
    """Seconds of each step, and in all for every 1,000 shards."""
    title = f"Seconds to open a plan of {SOURCES} sources, {documents:,} documents a shard"
    table = Table(title=title, title_justify="left")
    for name in ("shards", "cache", *STEPS, "in all", "per 1,000 shards", "peak MiB"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[step]:.3f}" for step in STEPS]
        cells += [f"{row['seconds']:.2f}", f"{1000 * row['seconds'] / row['shards']:.2f}", f"{row['peak_mib']:,.0f}"]
        table.add_row(f"{row['shards']:,}", row["cache"], *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
