"""Tiny real shards and plans for tests of the data engine, written by a writer of their own from the format's text."""

import json
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kaiyuan.data import CurriculumDataset, Plan

INT32_CODE = 4
UINT16_CODE = 8
Tokens = tuple[int, ...]


def write_shard(
    prefix: Path, documents: Sequence[Sequence[int]], scores: Sequence[float] | None = None, code: int = INT32_CODE
) -> str:
    """Write documents as a `.bin/.idx` pair (and their scores, called `score`); returns the prefix."""
    dtype = {INT32_CODE: np.int32, UINT16_CODE: np.uint16}[code]
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    pointers = (np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize).astype(np.int64)
    flat = [token for document in documents for token in document]
    Path(f"{prefix}.bin").write_bytes(np.array(flat, dtype=dtype).tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(documents), len(documents) + 1)
    boundaries = np.arange(len(documents) + 1, dtype=np.int64)
    Path(f"{prefix}.idx").write_bytes(
        header + lengths.tobytes() + pointers[: len(documents)].tobytes() + boundaries.tobytes()
    )
    if scores is not None:
        np.save(f"{prefix}.scores.score.npy", np.array(scores, dtype=np.float32))
    return str(prefix)


def write_manifest(prefix: Path | str, **changes: Any) -> Path:
    """Write a manifest beside a shard; `changes` are its fields, those of its tokenizer as `tokenizer`."""
    tokenizer = {"type": "T", "model": "t", "vocab_size": 50, "eod_id": 3, "fingerprint": "a" * 64}
    manifest = {
        "documents": 2, "tokens": 41, "dtype": "int32", "max_token_id": 40, "append_eod": False, "files": {},
        "scores": {}, "inputs": [], "skipped": {}, "json_key": "text", "created_by": "a test",
    }  # fmt: skip
    tokenizer |= changes.pop("tokenizer", {})
    path = Path(f"{prefix}.manifest.json")
    path.write_text(json.dumps({**manifest, "tokenizer": tokenizer, **changes}))
    return path


def numbered_documents(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    """Documents whose tokens are all different: token `t` of the source is `first + t`."""
    documents = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents


def write_source(
    folder: Path,
    documents: Sequence[Sequence[int]],
    scores: Sequence[float] | None = None,
    cuts: Sequence[int] = (),
    code: int = INT32_CODE,
) -> dict[str, Any]:
    """Write a folder of shards, a new one from each document number in `cuts` on; returns the plan's source entry."""
    folder.mkdir(parents=True)
    edges = [0, *sorted(cuts), len(documents)]
    for number, (first, last) in enumerate(pairwise(edges)):
        part = None if scores is None else scores[first:last]
        write_shard(folder / f"part-{number:03}", documents[first:last], part, code)
    return {"shards": str(folder)} | ({} if scores is None else {"score": "score"})


def plan_of(
    sources: Mapping[str, Mapping[str, Any]], *phases: Mapping[str, Any], seq_length: int = 4, **more: Any
) -> dict[str, Any]:
    """A plan as data."""
    return {"seq_length": seq_length, "sources": dict(sources), "phases": list(phases), **more}


def phase_of(order: str, sources: Mapping[str, Any], name: str = "main", **more: Any) -> dict[str, Any]:
    """A phase as data."""
    return {"name": name, "order": order, "sources": dict(sources), **more}


def all_samples(spec: Mapping[str, Any]) -> list[Tokens]:
    """Tokens of every sample of a plan, in training order."""
    order = CurriculumDataset(Plan.from_spec(dict(spec)), parts=True)
    return [tuple(order[sample]["tokens"].tolist()) for sample in range(len(order))]


def assert_resumes_anywhere(spec: Mapping[str, Any]) -> None:
    """A freshly opened dataset that starts at any sample continues exactly as the one that never stopped."""
    whole = all_samples(spec)
    for start in range(len(whole)):
        resumed = CurriculumDataset(Plan.from_spec(dict(spec)), parts=True)
        following = [tuple(resumed[s]["tokens"].tolist()) for s in range(start, min(start + 3, len(whole)))]
        assert following == whole[start : start + 3], f"resume at sample {start}"
