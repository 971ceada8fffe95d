"""What a build consists of: its shards, the parts of the input that each is made of, and fingerprints of it all.

The record is a function of the command, its input and the record that the folder holds. Each task of a job array makes
it for itself, and they agree without a word; `build.json` in the folder tells readers how many shards there should be,
and a later start of the command how the input was cut.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator

from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.preprocess.config import PreprocessConfig, shard_prefix
from megatron_kaiyuan.preprocess.inputs import InputFile, Part
from megatron_kaiyuan.preprocess.shard_cut import PartNumbers, cut_into_shards, keep_cut
from megatron_kaiyuan.preprocess.shard_state import is_complete
from megatron_kaiyuan.shards.manifest import TokenizerRecord

__all__ = ["BUILD_FILE", "BuildRecord", "ShardTask", "load_build", "missing_shards", "plan_build", "shard_tasks"]

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
    """Fingerprint of the settings and inputs."""
    settings: dict[str, Any]
    """Flags that decide the bytes, by name."""
    inputs: list[BuildInput]
    shards: list[list[tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt | None]]]
    """Of each shard the parts: number of the input, start, stop (see `Part`)."""
    num_tasks: NonNegativeInt
    """Tasks of the run that wrote this file first; the bytes do not depend on it."""

    @model_validator(mode="after")
    def _parts_cover_the_input(self) -> Self:
        number, end = -1, None
        for part in chain.from_iterable(self.shards):
            if part[:2] not in ((number + 1, 0), (number, end)):
                raise ValueError(f"part {part} does not begin where the one before it ends")
            number, _, end = part
        if number != len(self.inputs) - 1:
            raise ValueError(f"the parts are of {number + 1} input files, {len(self.inputs)} are listed")
        return self

    def shard_build(self, shard: int) -> str:
        """Fingerprint of the settings and of the parts that one shard is made of; its manifest repeats it."""
        parts = [
            self.inputs[number].model_dump() | ({} if stop is None else {"start": start, "stop": stop})
            for number, start, stop in self.shards[shard]
        ]
        return _fingerprint(self.settings, parts)

    def prefixes(self, folder: Path, shard: int) -> list[str]:
        """Prefixes of one shard, one for each text key."""
        return [shard_prefix(str(folder / shard_name(shard)), key) for key in self.settings["json_keys"]]

    def builds(self, folder: Path) -> dict[str, str]:
        """Fingerprint by prefix, of all shards."""
        return {
            prefix: self.shard_build(number)
            for number in range(len(self.shards))
            for prefix in self.prefixes(folder, number)
        }


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to build."""

    number: int
    prefixes: tuple[str, ...]
    parts: tuple[Part, ...]
    build: str
    """Its fingerprint, see `BuildRecord.shard_build`."""


def shard_name(number: int) -> str:
    """Name of a shard in its folder, before the text key."""
    return f"shard_{number:05d}"


def _fingerprint(settings: dict[str, Any], inputs: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode()).hexdigest()[:32]


def plan_build(
    config: PreprocessConfig, inputs: Sequence[InputFile], tokenizer: TokenizerRecord, found: BuildRecord | None = None
) -> BuildRecord:
    """The record of a command. The cut is that of `found`, the folder's own, for the same settings and file names."""
    listed = [BuildInput(name=file.name, bytes=file.bytes, probe=file.probe) for file in inputs]
    settings = _settings(config, tokenizer)
    kept = None
    if found is not None and found.settings == settings and _names(found.inputs) == _names(listed):
        changed = {number for number, file in enumerate(listed) if file != found.inputs[number]}
        kept = keep_cut(found.shards, inputs, changed)
    if config.output_dir is None:
        shards = [tuple(Part(file) for file in inputs)]
    else:
        shards = kept or cut_into_shards(inputs, config.shard_bytes)
    numbers = {file.name: number for number, file in enumerate(inputs)}
    return BuildRecord(
        build=_fingerprint(settings, [item.model_dump() for item in listed]),
        settings=settings,
        inputs=listed,
        shards=[[_numbered(part, numbers) for part in parts] for parts in shards],
        num_tasks=found.num_tasks if found is not None and kept else config.num_tasks,
    )


def _settings(config: PreprocessConfig, tokenizer: TokenizerRecord) -> dict[str, Any]:
    """Flags that decide the bytes."""
    return {
        "json_keys": list(config.json_keys),
        "score_keys": list(config.score_keys),
        "id_key": config.id_key,
        "append_eod": config.append_eod,
        "max_document_tokens": config.max_document_tokens,
        "shard_bytes": None if config.output_dir is None else config.shard_bytes,
        "tokenizer": tokenizer.model_dump(exclude={"model"}),
    }


def _names(inputs: Sequence[BuildInput]) -> list[str]:
    return [file.name for file in inputs]


def _numbered(part: Part, numbers: dict[str, int]) -> PartNumbers:
    return numbers[part.file.name], part.start, part.stop


def shard_tasks(config: PreprocessConfig, record: BuildRecord, inputs: Sequence[InputFile]) -> list[ShardTask]:
    """All shards of the build, those of other tasks included."""
    tasks = []
    for number, parts in enumerate(record.shards):
        stem = config.output_prefix or str(Path(config.output_dir or "") / shard_name(number))
        prefixes = tuple(shard_prefix(stem, key) for key in config.json_keys)
        found = tuple(Part(inputs[file], start, stop) for file, start, stop in parts)
        tasks.append(ShardTask(number, prefixes, found, record.shard_build(number)))
    return tasks


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
        if not all(is_complete(prefix, record.shard_build(number)) for prefix in record.prefixes(folder, number))
    ]
