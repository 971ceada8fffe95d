"""What a build consists of: its shards, the parts of the input of each, and fingerprints of it all.

The record is a function of the command, its input and the record that the folder holds. Each task of a job array makes
it for itself, and they agree without communication. `build.json` in the folder holds the number of shards for readers,
and how the input was cut for a later start of the command.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator

from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.files import read_regular

__all__ = ["BUILD_FILE", "BuildInput", "BuildRecord", "build_fingerprint", "load_build", "shard_name", "shard_prefix"]

BUILD_FILE = "build.json"


def shard_prefix(output_prefix: str, json_key: str) -> str:
    """Where the shard of one text key goes, as Megatron's tool names it."""
    return f"{output_prefix}_{json_key}_document"


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
    """Flags that decide the bytes, as a mapping from name to value."""
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
        """Return the fingerprint of the settings and of the parts that one shard is made of.

        Its manifest repeats it.
        """
        parts = [
            self.inputs[number].model_dump() | ({} if stop is None else {"start": start, "stop": stop})
            for number, start, stop in self.shards[shard]
        ]
        return build_fingerprint(self.settings, parts)

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


def shard_name(number: int) -> str:
    """Name of a shard in its folder, before the text key."""
    return f"shard_{number:05d}"


def build_fingerprint(settings: dict[str, Any], inputs: Sequence[dict[str, Any]]) -> str:
    """Return the hash of the settings and inputs that decide the bytes of a build."""
    return hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode()).hexdigest()[:32]


def load_build(folder: Path) -> BuildRecord | None:
    """Return the record of a folder of shards, None where there is none.

    Raises:
        ShardError: the file is damaged.
    """
    path = folder / BUILD_FILE
    try:
        return BuildRecord.model_validate_json(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise ShardError(f"{path}: {field}: {first['msg']}; delete it and run the build again") from error
