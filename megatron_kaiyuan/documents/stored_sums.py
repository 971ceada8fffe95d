"""Sums over documents that are too many to be made at each start: one small file beside the shards.

A page of header, which says what the sums belong to, and the sums as int64; memory-mapped.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import RankIndexError
from megatron_kaiyuan.host.atomic import atomic_file
from megatron_kaiyuan.host.cli import tool_command
from megatron_kaiyuan.host.maps import map_array
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.source import Source

__all__ = ["open_sums", "sums_path", "write_sums"]

_MAGIC = b"KYSUMS01"
_HEADER_BYTES = 4096


def sums_path(source: Source, digest: str, kind: str) -> Path:
    """Return where sums are stored: beside the first shard of a source, by what they belong to."""
    first = Path(source.shards[0].prefix)
    return first.with_name(f"{first.name}.{digest[:16]}.{kind}")


def write_sums(path: Path, digest: str, facts: dict[str, int], sums: NDArray[np.int64]) -> None:
    """Store sums atomically, with what they belong to and what is known of them besides."""
    header = json.dumps({"digest": digest, "sums": len(sums), **facts}, sort_keys=True).encode()
    with atomic_file(path) as stream:
        stream.write((_MAGIC + len(header).to_bytes(8, "little") + header).ljust(_HEADER_BYTES, b"\0"))
        stream.write(np.ascontiguousarray(sums, dtype=np.int64).data)


def open_sums(path: Path, digest: str, names: tuple[str, ...], wanted_by: str) -> tuple[dict[str, int], Any]:
    """Map stored sums.

    Args:
        path: the file.
        digest: of what they must belong to.
        names: of the facts stored with them.
        wanted_by: what needs them, for the error.

    Returns:
        The facts, and the sums, int64 `[n]`.

    Raises:
        RankIndexError: no such file, or a damaged one; says what makes it.
    """
    remedy = f"run\n  {tool_command('rank')} --plan PLAN"
    if not path.is_file():
        raise RankIndexError(f"{wanted_by} needs the sums {path}; to make those of all sources of the plan, {remedy}")
    with path.open("rb") as stream:
        raw = stream.read(_HEADER_BYTES)
    try:
        header: dict[str, Any] = json.loads(raw[16 : 16 + int.from_bytes(raw[8:16], "little")])
        facts = {name: int(header[name]) for name in ("sums", *names)}
        if not raw.startswith(_MAGIC) or header["digest"] != digest or min(facts.values()) < 0:
            raise ValueError("its header belongs to something else")
        if path.stat().st_size != _HEADER_BYTES + 8 * facts["sums"]:
            raise ValueError(f"{counted(path.stat().st_size, 'byte')} instead of {_HEADER_BYTES + 8 * facts['sums']:,}")
    except (ValueError, KeyError, TypeError) as error:
        raise RankIndexError(f"{path}: damaged ({error}); delete it and {remedy}") from error
    return facts, map_array(path, np.dtype(np.int64), facts["sums"], _HEADER_BYTES, random=True)
