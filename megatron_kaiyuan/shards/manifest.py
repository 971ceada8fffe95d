"""The `P.manifest.json` beside a shard: what it holds, its origin, and how to check that it is whole.

The manifest carries no time and no machine name, so the same input and the same command give the same bytes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.files import read_regular
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.version import code_version

__all__ = [
    "FileRecord",
    "InputRecord",
    "LeftOutRecord",
    "Manifest",
    "ScoreSummary",
    "ShardRecord",
    "SpecialTokenRecord",
    "TokenizerRecord",
    "created_by",
    "load_manifest",
    "load_record",
    "manifest_path",
    "merged_special_tokens",
    "special_token_facts",
    "verify_manifest",
]

_HASH_BYTES = 1 << 22
_MOST_TOKENS = 8


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One file of the shard, named relative to the manifest's folder, so that a shard can be moved."""

    name: str
    bytes: NonNegativeInt
    sha256: str


class ScoreSummary(_Record):
    """Range and mean of one score over the documents kept."""

    min: float
    max: float
    mean: float


class TokenizerRecord(_Record):
    """Which tokenizer made the ids."""

    type: str
    """Name as in Megatron's `--tokenizer-type`."""
    model: str | None
    """`--tokenizer-model` as given."""
    vocab_size: int
    eod_id: int | None
    """Id appended after each document with `--append-eod`; None where the tokenizer has none."""
    fingerprint: str
    """sha256 of the tokenizer's content, whatever its path."""


class InputRecord(_Record):
    """One input file, or the part of it that the shard was built from."""

    name: str
    bytes: NonNegativeInt
    """Of the whole file; 0 for standard input."""
    rows: NonNegativeInt
    """Lines or Parquet rows read, those skipped included."""
    start: NonNegativeInt = 0
    stop: NonNegativeInt | None = None
    """None: to the end. Else the part: the lines that begin at a byte in `[start, stop)`, or Parquet row groups."""


class LeftOutRecord(_Record):
    """Entries of a searched folder that were not read, for one reason."""

    count: NonNegativeInt
    names: list[str]
    """The first of them."""


class SpecialTokenRecord(_Record):
    """Special tokens inside the texts.

    What the tokenizer puts around each text and appended ids are not counted.
    """

    occurrences: dict[str, NonNegativeInt]
    """By token."""
    documents_with_eod: NonNegativeInt
    """Documents that hold the end-of-document id inside."""
    documents_ending_twice: NonNegativeInt
    """Documents that end with two end-of-document ids."""


def merged_special_tokens(records: Iterable[SpecialTokenRecord | None]) -> SpecialTokenRecord | None:
    """Return the sum of what several shards count, None where none of them counts."""
    known = [record for record in records if record is not None]
    occurrences: Counter[str] = Counter()
    for record in known:
        occurrences.update(record.occurrences)
    merged = SpecialTokenRecord(
        occurrences=dict(occurrences.most_common()),
        documents_with_eod=sum(record.documents_with_eod for record in known),
        documents_ending_twice=sum(record.documents_ending_twice for record in known),
    )
    return merged if known else None


def special_token_facts(record: SpecialTokenRecord) -> str:
    """Say how often special tokens stood inside texts, with an empty text for never."""
    inside, twice = record.documents_with_eod, record.documents_ending_twice
    told = []
    if inside:
        verb = "holds" if inside == 1 else "hold"
        told.append(f"{counted(inside, 'document')} {verb} the end-of-document id inside")
    if twice:
        told.append(f"{counted(twice, 'document')} ending with two end-of-document ids")
    if record.occurrences:
        most = sorted(record.occurrences.items(), key=lambda item: -item[1])
        more = f", and {len(most) - _MOST_TOKENS:,} others" if len(most) > _MOST_TOKENS else ""
        told.append(f"in texts {', '.join(f'{token} {count:,} x' for token, count in most[:_MOST_TOKENS])}{more}")
    return "; ".join(told)


class Manifest(_Record):
    """Content of `P.manifest.json`."""

    format: Literal["megatron_kaiyuan.shard/1"] = "megatron_kaiyuan.shard/1"
    documents: NonNegativeInt
    tokens: NonNegativeInt
    dtype: Literal["int32", "uint16"]
    max_token_id: int
    """Largest id in the `.bin`, end-of-document ids included; -1 where there are no tokens."""
    append_eod: bool
    files: dict[str, FileRecord]
    """Keys: `bin`, `idx`, `documents`, and `scores.<key>` for each score."""
    scores: dict[str, ScoreSummary]
    tokenizer: TokenizerRecord
    inputs: list[InputRecord]
    skipped: dict[str, int] = Field(description="rows left out, per reason")
    left_out: dict[str, LeftOutRecord] = Field(default_factory=dict)
    """Entries of the searched folders that are no part of the input, per reason."""
    special_tokens: SpecialTokenRecord | None = None
    """None: not counted, by an earlier version."""
    json_key: str
    created_by: str
    build: str | None = None
    """Identifies the input and the flags that decide the bytes. The same command recognizes its own work by it."""
    tokenized_by: str | None = None
    """`gigatoken <version>` where it made the ids; None: the reference tokenizer."""

    def to_json(self) -> str:
        """Return the content of the file.

        What the reference tokenizer made has no `tokenized_by`.
        """
        return self.model_dump_json(indent=2, exclude={"tokenized_by"} if self.tokenized_by is None else None)


def created_by() -> str:
    """`megatron_kaiyuan <version> (commit <commit>)`."""
    return f"megatron_kaiyuan {code_version()}"


def manifest_path(prefix: str) -> Path:
    """Where the manifest of the shard `prefix` lies."""
    return Path(f"{prefix}.manifest.json")


def load_manifest(prefix: str) -> Manifest:
    """Read and validate the manifest of one shard.

    Raises:
        ShardError: the manifest is missing, is not JSON, or has a missing or unknown field.
    """
    path = manifest_path(prefix)
    try:
        return Manifest.model_validate_json(read_regular(path))
    except FileNotFoundError:
        raise ShardError(
            f"{path}: no such manifest (looked in {Path.cwd()}); a shard without one is incomplete or was made by "
            f"another tool: rebuild it with {tool('preprocess')}"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "content"
        told = "no field that this version knows" if first["type"] == "extra_forbidden" else first["msg"]
        raise ShardError(
            f"{path}: {field}: {told}; restore the file or rebuild the shard (without the manifest the shard is read "
            "as one of another tool)"
        ) from error


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The part of a manifest that every start needs, kept small because a plan may have thousands of shards."""

    tokenizer: TokenizerRecord
    append_eod: bool
    max_token_id: int
    bin_sha256: str | None
    idx_sha256: str | None


def load_record(prefix: str) -> ShardRecord | None:
    """Return the record in a shard's manifest, None where it has none.

    Errors as `load_manifest`.
    """
    if not manifest_path(prefix).exists():
        return None
    manifest = load_manifest(prefix)
    sums = {role: file.sha256 for role, file in manifest.files.items()}
    return ShardRecord(manifest.tokenizer, manifest.append_eod, manifest.max_token_id, sums.get("bin"), sums.get("idx"))


def verify_manifest(prefix: str) -> Manifest:
    """Compare size and sha256 of every file of the shard with its manifest.

    All of them are read once.

    Raises:
        ShardError: a file is missing or differs; the message names it.
    """
    manifest = load_manifest(prefix)
    folder = manifest_path(prefix).parent
    for record in manifest.files.values():
        _verify_file(folder / record.name, record)
    return manifest


def _verify_file(path: Path, record: FileRecord) -> None:
    remedy = "copy it again or rebuild the shard"
    if not path.is_file():
        raise ShardError(f"{path}: the manifest lists this file, but it does not exist; {remedy}")
    size = path.stat().st_size
    if size != record.bytes:
        raise ShardError(f"{path}: {counted(size, 'byte')}, the manifest says {record.bytes}; {remedy}")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != record.sha256:
        raise ShardError(
            f"{path}: sha256 {digest.hexdigest()[:16]}..., the manifest says {record.sha256[:16]}...; {remedy}"
        )
