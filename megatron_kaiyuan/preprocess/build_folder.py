"""Who may build into a folder: the command that began it, also after a file of its input was mended."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.preprocess.config import PreprocessConfig
from megatron_kaiyuan.preprocess.inputs import InputFile, Part, PartNumbers, cut_into_shards, keep_cut
from megatron_kaiyuan.preprocess.partial import Ownership, is_complete, remove_dead_partials, retire
from megatron_kaiyuan.shards.build_record import (
    BUILD_FILE,
    BuildInput,
    BuildRecord,
    build_fingerprint,
    load_build,
    shard_name,
    shard_prefix,
)
from megatron_kaiyuan.shards.manifest import Manifest, TokenizerRecord

__all__ = [
    "ShardTask",
    "changed_inputs",
    "check_claim",
    "claim_folder",
    "missing_shards",
    "plan_build",
    "refuse_other_content",
    "shard_tasks",
]


def claim_folder(folder: Path, found: BuildRecord | None, record: BuildRecord, *, overwrite: bool) -> int:
    """Claim the folder by writing `build.json`, and return the number of stale shards removed.

    Nothing is written where the same record is there already. Tasks that start at the same moment all write the same
    bytes, whichever comes last, and leave to each other what is being written. Shards of an earlier build are removed
    before the new record says that they do not belong.

    Args:
        folder: The folder.
        found: The record it holds.
        record: What is to be built.
        overwrite: Replace what another build left there.

    Raises:
        ConfigError: the folder holds another build and `overwrite` is not given, or shards that no build lists.
    """
    if found == record:
        return 0
    builds = record.builds(folder)
    if overwrite:
        _remove_surplus(folder, builds)
    else:
        refuse_other_content(folder, found, record)
    gone = sum(retire(prefix, partial(_is_of, build)) for prefix, build in builds.items())
    write_text_atomically(folder / BUILD_FILE, record.model_dump_json(indent=1) + "\n")
    return gone


def refuse_other_content(folder: Path, found: BuildRecord | None, record: BuildRecord) -> None:
    """Refuse a folder that holds another build, or shards that no build lists.

    Raises ConfigError and changes nothing.
    """
    if found is None:
        _refuse_foreign(folder, record, record.builds(folder))
    elif found != record:
        _refuse_other_build(folder, found, record)


def check_claim(folder: Path, record: BuildRecord, finished: Mapping[str, Manifest]) -> None:
    """Remove finished shards if a later start has claimed the folder for other input.

    Raises:
        ConfigError: one of `finished` was removed; the message has its prefix.
    """
    current = load_build(folder)
    if current is None or current == record:
        return
    builds = current.builds(folder)
    gone = [prefix for prefix, manifest in finished.items() if builds.get(prefix) != manifest.build]
    for prefix in gone:
        retire(prefix, partial(_is_of, builds.get(prefix, "")))
    if gone:
        raise ConfigError(
            f"--output-dir {folder}: a file of the input, or the flags, changed while this ran, and another start took "
            f"the folder over; {Path(gone[0]).name} is of before and does not stay: run the same command again"
        )


def _is_of(build: str, manifest: Manifest) -> bool:
    return manifest.build == build


def _indexes(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.idx")) if folder.is_dir() else []


def _refuse_foreign(folder: Path, record: BuildRecord, builds: dict[str, str]) -> None:
    """Refuse shards that no record lists.

    A folder with foreign shards would be a source of mixed origin.
    """
    for index in _indexes(folder):
        prefix = str(index.with_suffix(""))
        if prefix in builds and is_complete(prefix, builds[prefix]):
            continue
        if load_build(folder) == record:  # another task came first, and this is its work
            return
        raise ConfigError(
            f"--output-dir {folder}: holds {index.name}, which this build did not make; give an empty folder, or "
            "--overwrite to remove the shards that are there"
        )


def _remove_surplus(folder: Path, prefixes: Collection[str]) -> None:
    """Remove shards under names that are not of this build, so of no task that runs.

    Raises:
        ConfigError: a process that is alive writes one of them.
    """
    for index in _indexes(folder):
        prefix = str(index.with_suffix(""))
        if prefix not in prefixes:
            with Ownership(prefix) as owned:
                remove_dead_partials(prefix, owned, torn=True)


def _refuse_other_build(folder: Path, found: BuildRecord, record: BuildRecord) -> None:
    """Refuse other flags and other files, and a changed file where the shards were finished and may be in use."""
    difference = _difference(found, record)
    if difference is None:
        if missing_shards(folder, found):
            return
        difference = f"{changed_inputs(found, record)[0]} since the build was finished"
    raise ConfigError(
        f"--output-dir {folder}: holds the shards of another command or other input: {difference}; give the flags and "
        "the input of before, another folder, or --overwrite to replace its shards (those of unchanged input stay)"
    )


def _difference(found: BuildRecord, wanted: BuildRecord) -> str | None:
    """Return what makes it another build.

    None where it is the same build with other content in some files.
    """
    for field, value in wanted.settings.items():
        if found.settings.get(field) != value:
            return f"{field} was {found.settings.get(field)!r}, now {value!r}"
    if len(found.inputs) != len(wanted.inputs):
        return f"{len(found.inputs)} input files then, {len(wanted.inputs)} now"
    for old, new in zip(found.inputs, wanted.inputs, strict=True):
        if old.name != new.name:
            return f"input {old.name} then, {new.name} now"
        if old.probe and not new.probe:
            return f"input {new.name} cannot be read now"
    if _files_of(found) != _files_of(wanted):
        return f"{changed_inputs(found, wanted)[0]} and cannot be cut as before"
    return None


def _files_of(record: BuildRecord) -> list[list[int]]:
    """Which files each shard holds a part of."""
    return [[number for number, _, _ in parts] for parts in record.shards]


def changed_inputs(found: BuildRecord, wanted: BuildRecord) -> list[str]:
    """A clause for each file whose content has changed."""
    return [
        f"input {new.name} has changed ({counted(old.bytes, 'byte')} then, {new.bytes} now)"
        for old, new in zip(found.inputs, wanted.inputs, strict=True)
        if old != new
    ]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to build."""

    number: int
    prefixes: tuple[str, ...]
    parts: tuple[Part, ...]
    build: str
    """Its fingerprint, see `BuildRecord.shard_build`."""


def plan_build(
    config: PreprocessConfig, inputs: Sequence[InputFile], tokenizer: TokenizerRecord, found: BuildRecord | None = None
) -> BuildRecord:
    """Return the record of a command.

    The cut is that of `found`, the folder's own, for the same settings and file names.
    """
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
        build=build_fingerprint(settings, [item.model_dump() for item in listed]),
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


def missing_shards(folder: Path, record: BuildRecord) -> list[int]:
    """Return the numbers of the shards that are not complete.

    One manifest is read for each.
    """
    return [
        number
        for number in range(len(record.shards))
        if not all(is_complete(prefix, record.shard_build(number)) for prefix in record.prefixes(folder, number))
    ]
