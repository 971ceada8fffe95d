"""What a build consists of: its shards, the parts of the input that each is made of, and a fingerprint of it all.

The record is a function of the command and its input alone. Each task of a job array makes it for itself, and they
agree without a word; `build.json` in the folder only tells readers how many shards there should be, and refuses a
command that would mix other shards into the folder.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from megatron_kaiyuan.data.atomic import write_text_atomically
from megatron_kaiyuan.errors import ConfigError, ShardError
from megatron_kaiyuan.preprocess.config import PreprocessConfig, shard_prefix
from megatron_kaiyuan.preprocess.inputs import InputFile, Part, cut_into_shards
from megatron_kaiyuan.preprocess.manifest import TokenizerRecord
from megatron_kaiyuan.preprocess.writer import is_complete

__all__ = ["BUILD_FILE", "BuildRecord", "ShardTask", "claim_folder", "load_build", "missing_shards", "plan_build"]

BUILD_FILE = "build.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BuildInput(_Record):
    """One input file."""

    name: str
    bytes: NonNegativeInt
    probe: str
    """Hash of its first and last 4 KiB."""


class BuildRecord(_Record):
    """Content of `build.json`."""

    format: Literal["megatron_kaiyuan.build/1"] = "megatron_kaiyuan.build/1"
    build: str
    """Fingerprint of the settings and inputs; each manifest repeats it."""
    settings: dict[str, Any]
    """Flags that decide the bytes, by name."""
    inputs: list[BuildInput]
    shards: list[list[tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt | None]]]
    """Of each shard the parts: number of the input, start, stop (see `Part`)."""
    num_tasks: NonNegativeInt
    """Tasks of the run that wrote this file first; the bytes do not depend on it."""

    def prefixes(self, folder: Path, shard: int) -> list[str]:
        """Prefixes of one shard, one for each text key."""
        return [shard_prefix(str(folder / shard_name(shard)), key) for key in self.settings["json_keys"]]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to build."""

    number: int
    prefixes: tuple[str, ...]
    parts: tuple[Part, ...]


def shard_name(number: int) -> str:
    """Name of a shard in its folder, before the text key."""
    return f"shard_{number:05d}"


def plan_build(
    config: PreprocessConfig, inputs: Sequence[InputFile], tokenizer: TokenizerRecord
) -> tuple[BuildRecord, list[ShardTask]]:
    """All shards of the build, those of other tasks included."""
    whole = config.output_dir is None
    shards = [tuple(Part(file) for file in inputs)] if whole else cut_into_shards(inputs, config.shard_bytes)
    settings = {
        "json_keys": list(config.json_keys),
        "score_keys": list(config.score_keys),
        "id_key": config.id_key,
        "append_eod": config.append_eod,
        "max_document_tokens": config.max_document_tokens,
        "shard_bytes": None if whole else config.shard_bytes,
        "tokenizer": tokenizer.model_dump(exclude={"model"}),
    }
    listed = [BuildInput(name=file.name, bytes=file.bytes, probe=file.probe) for file in inputs]
    content = json.dumps([settings, [item.model_dump() for item in listed]], sort_keys=True)
    numbers = {file.name: number for number, file in enumerate(inputs)}
    record = BuildRecord(
        build=hashlib.sha256(content.encode()).hexdigest()[:32],
        settings=settings,
        inputs=listed,
        shards=[[(numbers[part.file.name], part.start, part.stop) for part in parts] for parts in shards],
        num_tasks=config.num_tasks,
    )
    tasks = []
    for number, parts in enumerate(shards):
        stem = config.output_prefix or str(Path(config.output_dir or "") / shard_name(number))
        tasks.append(ShardTask(number, tuple(shard_prefix(stem, key) for key in config.json_keys), parts))
    return record, tasks


def claim_folder(folder: Path, record: BuildRecord, *, overwrite: bool) -> None:
    """Write `build.json`, or compare with the one that is there.

    Tasks that start at the same moment all write the same bytes, whichever comes last.

    Raises:
        ConfigError: the folder holds another build and `overwrite` is not given, or shards that no build lists.
    """
    found = load_build(folder)
    if found is not None and found.build == record.build:
        return
    if found is not None and not overwrite:
        raise ConfigError(
            f"--output-dir {folder}: holds the shards of another command or other input: {_difference(found, record)}; "
            "give the flags and the input of before, another folder, or --overwrite to replace its shards"
        )
    _remove_others(folder, record, overwrite=overwrite)
    write_text_atomically(folder / BUILD_FILE, record.model_dump_json(indent=1) + "\n")


def _remove_others(folder: Path, record: BuildRecord, *, overwrite: bool) -> None:
    """Remove shards that are not of this build; a folder with foreign ones would be a source of mixed origin."""
    for index in sorted(folder.glob("*.idx")) if folder.is_dir() else []:
        prefix = str(index.with_suffix(""))
        if is_complete(prefix, record.build):
            continue
        if not overwrite:
            raise ConfigError(
                f"--output-dir {folder}: holds {index.name}, which this build did not make; give an empty folder, or "
                "--overwrite to remove the shards that are there"
            )
        for path in [Path(f"{prefix}.manifest.json"), index, *folder.glob(f"{index.stem}.*")]:
            path.unlink(missing_ok=True)


def _difference(found: BuildRecord, wanted: BuildRecord) -> str:
    for field, value in wanted.settings.items():
        if found.settings.get(field) != value:
            return f"{field} was {found.settings.get(field)!r}, now {value!r}"
    if len(found.inputs) != len(wanted.inputs):
        return f"{len(found.inputs)} input files then, {len(wanted.inputs)} now"
    for old, new in zip(found.inputs, wanted.inputs, strict=True):
        if old.name != new.name:
            return f"input {old.name} then, {new.name} now"
        if old != new:
            return f"input {new.name} has changed ({old.bytes} bytes then, {new.bytes} now)"
    return "it was written by another version of the tool"


def load_build(folder: Path) -> BuildRecord | None:
    """The record of a folder of shards; None where there is none.

    Raises:
        ShardError: the file is damaged.
    """
    path = folder / BUILD_FILE
    try:
        return BuildRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise ShardError(f"{path}: {field}: {first['msg']}; delete it and run the build again") from error


def missing_shards(folder: Path, record: BuildRecord) -> list[int]:
    """Numbers of the shards that are not complete; reads a manifest for each."""
    return [
        number
        for number in range(len(record.shards))
        if not all(is_complete(prefix, record.build) for prefix in record.prefixes(folder, number))
    ]
