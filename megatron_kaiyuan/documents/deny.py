"""Documents that must not be used: removal requests, and what a benchmark would recognise."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.source import Source

__all__ = ["read_denied"]


def read_denied(path: Path, source: Source) -> NDArray[np.int64]:
    """Return the documents that a file lists, as ascending numbers in the source, int64 `[n]`.

    Each comes once. A line is a document's number in the source, or a shard and the document's number in it, with
    blanks, a tab or a comma between them. A shard is a prefix as the plan's reports write it, or its file name where
    only one shard of the source has it. Empty lines and lines that begin with `#` do not count.

    Raises:
        PlanError: the file cannot be read, or lines name no document of the source; names the first of them.
    """
    where = f"sources.{source.name}.deny {path}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{where}: cannot be read ({error}); give a text file with a document in each line") from error
    shards = _shard_numbers(source)
    found, wrong = [], []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            document = _number(text, source, shards)
            found.append(-1 if document is None else document)
            if document is None:
                wrong.append(f"line {number} ({text[:80]!r})")
    if wrong:
        raise PlanError(
            f"{where}: {counted(len(wrong), 'line')} without a document of the source, the first {wrong[0]}; write a "
            f"number below {source.num_documents:,}, or a shard and a number below its documents, such as "
            f"{Path(source.shards[0].prefix).name} 17"
        )
    return np.unique(np.array(found, dtype=np.int64))


def _shard_numbers(source: Source) -> dict[str, int]:
    """The number of each shard by its prefix, and by its file name where that is unique."""
    names = [Path(shard.prefix).name for shard in source.shards]
    single = {name: number for number, name in enumerate(names) if names.count(name) == 1} if len(names) < 4096 else {}
    return single | {shard.prefix: number for number, shard in enumerate(source.shards)}


def _number(text: str, source: Source, shards: dict[str, int]) -> int | None:
    """Return the document that a line means, None where it means none."""
    shard, _, last = text.replace(",", " ").replace("\t", " ").rpartition(" ")
    if not last.isdecimal():
        return None
    document = int(last)
    if not shard:
        return document if document < source.num_documents else None
    number = shards.get(shard.strip())
    if number is None or document >= source.shards[number].documents:
        return None
    return int(source.document_offsets[number]) + document
