"""Text that the GPU benchmarks train on: shards that must be there, and shards that are invented on the spot."""

import glob
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.markov_text import write_markov_text
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.yaml_file import read_yaml

__all__ = ["large_plan", "plan_digest", "require_shards", "smoke_plan"]

INT32_CODE = 4
"""Of Megatron's index format."""
BLOCK_TOKENS = 1 << 24


def require_shards(plan: Path) -> None:
    """Look for the shards of a plan before anything is started.

    Raises:
        StudyError: some are missing.
    """
    sources = read_yaml(plan)["sources"]
    named = [source["shards"] for source in sources.values()]
    items = [item for shards in named for item in ([shards] if isinstance(shards, str) else shards)]
    missing = [item for item in items if not _has_shards(item)]
    if missing:
        raise StudyError(
            f"{plan}: no shards at {', '.join(missing)}; `make demo` builds runs/demo/shards from the installed "
            "packages, and git ignores them: build them where the packages are and carry the folder here, or name "
            "another --plan"
        )


def plan_digest(plan: Path | None) -> str:
    """Return a digest that is equal for two runs whose plan files agree."""
    return hashlib.sha256(plan.read_bytes()).hexdigest()[:16] if plan is not None and plan.is_file() else "none"


def _has_shards(item: str) -> bool:
    path = Path(item)
    if path.is_dir():
        return any(path.rglob("*.idx"))
    return Path(f"{item.removesuffix('.idx').removesuffix('.bin')}.idx").is_file() or bool(glob.glob(item))  # noqa: PTH207


def smoke_plan(folder: Path, tokens: int, repeat: int, rate: dict[str, Any] | None = None) -> Path:
    """A plan over invented text that a tiny model can learn, in windows of 64 tokens."""
    folder = folder.resolve()
    write_markov_text(folder / "text", vocabulary=256, documents=600)
    return _write_plan(folder / "plan.yaml", 64, folder / "text", tokens, {"max_repeat": repeat}, rate)


def large_plan(folder: Path, seq_length: int, vocabulary: int, gigabytes: float, samples: int) -> Path:
    """Make a shuffled plan over a shard so large that its windows are spread over gigabytes.

    A shard that is there is used. What the tokens say does not matter to the time that it takes to read them: one block
    of them is repeated, each time shifted.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / "large"
    chance = np.random.default_rng(0)
    count = int(gigabytes * 1e9 / 4)
    lengths = chance.integers(seq_length // 8, 2 * seq_length, size=count // seq_length + 1).astype(np.int32)
    total = int(lengths.sum())
    finished = prefix.with_suffix(".idx")
    if not finished.is_file() or prefix.with_suffix(".bin").stat().st_size != 4 * total:
        _write_blocks(prefix.with_suffix(".bin"), chance, total, vocabulary)
        finished.write_bytes(_index(lengths))
    rate = {"start": 0, "end": 1.0e-3, "shape": "warmup"}
    return _write_plan(folder / "plan.yaml", seq_length, prefix, samples * seq_length, {}, rate)


def _write_blocks(path: Path, chance: np.random.Generator, total: int, vocabulary: int) -> None:
    block = (chance.random(min(BLOCK_TOKENS, total), dtype=np.float32) ** 3 * (vocabulary - 1)).astype(np.int32)
    with path.open("wb") as stream:
        for number, start in enumerate(range(0, total, len(block))):
            np.roll(block, 4099 * number)[: total - start].tofile(stream)


def _index(lengths: np.ndarray[Any, np.dtype[np.int32]]) -> bytes:
    """Header, lengths, byte pointers, document boundaries: docs/shards.md."""
    count = len(lengths)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * 4]).astype(np.int64)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, INT32_CODE, count, count + 1)
    return header + lengths.tobytes() + pointers.tobytes() + np.arange(count + 1, dtype=np.int64).tobytes()


def _write_plan(
    path: Path,
    seq_length: int,
    shards: Path,
    tokens: int,
    selection: dict[str, Any],
    rate: dict[str, Any] | None = None,
) -> Path:
    phase: dict[str, Any] = {"name": "all", "order": "shuffled", "tokens": tokens, "sources": {"text": selection}}
    content = {
        "seq_length": seq_length,
        "seed": 1234,
        "sources": {"text": {"shards": str(shards)}},
        "phases": [phase | ({"lr": rate} if rate else {})],
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
