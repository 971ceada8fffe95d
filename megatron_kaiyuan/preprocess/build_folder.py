"""Who may build into a folder: the command that began it, also after a file of its input was mended."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.preprocess.build_record import BUILD_FILE, BuildRecord, load_build, missing_shards
from megatron_kaiyuan.preprocess.partial import remove_dead_partials
from megatron_kaiyuan.preprocess.shard_state import is_complete, remove_existing, retire
from megatron_kaiyuan.shards.manifest import Manifest

__all__ = ["changed_inputs", "check_claim", "claim_folder"]


def claim_folder(folder: Path, found: BuildRecord | None, record: BuildRecord, *, overwrite: bool) -> int:
    """Write `build.json`, unless it is there and the same; how many shards of other input or flags were taken away.

    Tasks that start at the same moment all write the same bytes, whichever comes last, and leave to each other what
    is being written. Shards of an earlier build go out of sight before the new record tells that they do not belong.

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
    elif found is None:
        _refuse_foreign(folder, record, builds)
    else:
        _refuse_other_build(folder, found, record)
    gone = sum(retire(prefix, partial(_is_of, build)) for prefix, build in builds.items())
    write_text_atomically(folder / BUILD_FILE, record.model_dump_json(indent=1) + "\n")
    return gone


def check_claim(folder: Path, record: BuildRecord, finished: Mapping[str, Manifest]) -> None:
    """Take shards away that were finished although a later start has claimed the folder for other input.

    Raises:
        ConfigError: one of `finished` was, by prefix.
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
    """Refuse shards that no record lists; a folder with foreign ones would be a source of mixed origin."""
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
            remove_dead_partials(prefix)
            remove_existing(prefix)


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
    """What makes it another build; None where it is the same one with other content in some files."""
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
        f"input {new.name} has changed ({old.bytes} bytes then, {new.bytes} now)"
        for old, new in zip(found.inputs, wanted.inputs, strict=True)
        if old != new
    ]
