"""Whether what a plan names is a whole source: not a folder half built, and not the same rows under several keys.

Both are asked of directories and globs, which name more than a reader can see. Prefixes are taken at their word.
"""

import fnmatch
import glob as globbing
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.files import read_regular
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.threads import side_by_side

__all__ = ["BUILD_FILE", "FolderState", "folder_state", "mixed_keys", "named_folders", "require_whole_folder"]

BUILD_FILE = "build.json"


@dataclass(frozen=True, slots=True)
class FolderState:
    """What a folder's `build.json` says should be there, and what of it is not."""

    shards: int
    num_tasks: int
    """Tasks of the run that began the build."""
    missing: list[int]
    """Numbers of shards without an index or a manifest."""

    @property
    def tasks(self) -> list[int]:
        """Tasks that have to run again."""
        return sorted({number % self.num_tasks for number in self.missing})

    @property
    def remedy(self) -> str:
        """How to complete it."""
        if self.num_tasks == 1:
            return f"run the same {tool('preprocess')} command again: it builds only what is missing"
        tasks = ",".join(map(str, self.tasks))
        return f"run the same command again with --num-tasks {self.num_tasks} and --task-id {tasks} (one run each)"


@dataclass(frozen=True, slots=True)
class _Build:
    """The parts of a `build.json` that say which shards there should be."""

    keys: list[str]
    shards: int
    num_tasks: int


def folder_state(folder: Path, pattern: str = "*") -> FolderState | None:
    """Return the state of a folder of shards, None where it holds no `build.json`.

    Only names are read, no shard.

    Args:
        folder: where the build put its shards.
        pattern: of the names of shards that count; others may be missing.

    Raises:
        ShardError: `build.json` is damaged.
    """
    build = _read_build(folder)
    if build is None:
        return None
    present = set(os.listdir(folder))  # noqa: PTH208
    missing = [
        number
        for number in range(build.shards)
        for name in (f"shard_{number:05d}_{key}_document" for key in build.keys)
        if fnmatch.fnmatchcase(name, pattern)
        and any(name + end not in present for end in (".bin", ".idx", ".manifest.json"))
    ]
    return FolderState(build.shards, build.num_tasks, sorted(set(missing)))


def _read_build(folder: Path) -> _Build | None:
    path = folder / BUILD_FILE
    try:
        record: dict[str, Any] = json.loads(read_regular(path))
        keys = [str(key) for key in record["settings"]["json_keys"]]
        return _Build(keys, len(record["shards"]), max(int(record["num_tasks"]), 1))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path}: not a build record ({error!r}); run the build again, or delete the file if the folder is known "
            "to be whole"
        ) from error


def named_folders(item: str) -> list[tuple[Path, str]]:
    """Return the folders whose shards a directory or a glob names, each with the pattern of the names.

    A prefix names none.
    """
    if Path(item).is_dir():
        return [(Path(item), "*")]
    if not globbing.has_magic(item):
        return []
    parent, pattern = os.path.split(item.removesuffix(".idx").removesuffix(".bin"))
    if not globbing.has_magic(parent):
        return [(Path(parent), pattern)]
    found = globbing.glob(parent, recursive=True)  # noqa: PTH207
    return [(Path(folder), pattern) for folder in sorted(found) if os.path.isdir(folder)]  # noqa: PTH112


def require_whole_folder(item: str) -> None:
    """Raise ShardError where a directory or a glob names shards of a build that are not there yet."""
    for folder, pattern in named_folders(item):
        state = folder_state(folder, pattern)
        if state is not None and state.missing:
            first = ", ".join(map(str, state.missing[:8])) + (", ..." if len(state.missing) > 8 else "")
            raise ShardError(
                f"{folder}: {len(state.missing)} of {counted(state.shards, 'shard')} are missing ({first}); "
                f"{state.remedy}; to "
                "use what is there, name those shards one by one, or by a glob that no missing one matches"
            )


def mixed_keys(item: str, prefixes: Sequence[str]) -> str | None:
    """Return what is wrong with an item that names shards of several `--json-keys`, None if nothing is.

    Such shards hold the same rows under different keys: the text and the title of each document. Two of them have one
    name but for the key. The key comes from the folder's `build.json`, or else from the shard's name. Where the name
    could be read in two ways, the manifest decides.

    Args:
        item: as the plan has it.
        prefixes: the shards that it names.
    """
    folders = named_folders(item)
    if not folders:
        return None
    builds = {str(folder): _read_build(folder) for folder, _ in folders}
    keys = [_key_by_name(prefix, builds) for prefix in prefixes]
    if not _share_rows(prefixes, keys):
        if not _ambiguous(prefixes, keys, builds):
            return None
        keys = side_by_side(_recorded_key, prefixes)
        if not _share_rows(prefixes, keys):
            return None
    told = Counter(key for key in keys if key)
    folder = item if Path(item).is_dir() else os.path.split(item)[0]
    globs = [os.path.join(folder, f"*_{key}_document") for key in sorted(told)]  # noqa: PTH118
    return (
        f"{item}: shards of several --json-keys ({', '.join(f'{key}: {told[key]}' for key in sorted(told))}), which "
        f"hold the same rows under different keys; name one of them, {' or '.join(globs)}, or a list of such globs to "
        "take several"
    )


def _key_by_name(prefix: str, builds: Mapping[str, _Build | None]) -> str:
    """Return the text key in a shard's name, empty where the name has none."""
    folder, name = os.path.split(prefix)
    build = builds.get(folder or ".")
    known = [key for key in build.keys if name.endswith(f"_{key}_document")] if build is not None else []
    if known:
        return max(known, key=len)  # a key may end like another one
    return name.removesuffix("_document").rpartition("_")[2] if name.endswith("_document") else ""


def _recorded_key(prefix: str) -> str:
    """Return the text key in a shard's manifest, empty where there is no manifest."""
    try:
        key = json.loads(read_regular(f"{prefix}.manifest.json"))["json_key"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return key if isinstance(key, str) and prefix.endswith(f"_{key}_document") else ""


def _share_rows(prefixes: Sequence[str], keys: Sequence[str]) -> bool:
    """Whether two shards have one name but for the key."""
    stems = [_stem(prefix, key) for prefix, key in zip(prefixes, keys, strict=True) if key]
    return len(set(stems)) < len(stems)


def _ambiguous(prefixes: Sequence[str], keys: Sequence[str], builds: Mapping[str, _Build | None]) -> bool:
    """Whether keys with underscores could hide behind these names, as in `P_text` and `P_clean_text`."""
    if all(builds.get(os.path.split(prefix)[0] or ".") for prefix in prefixes):
        return False
    stems = {_stem(prefix, key) for prefix, key in zip(prefixes, keys, strict=True) if key}
    return any(stem[:end] in stems for stem in stems for end in range(len(stem)) if stem[end] == "_")


def _stem(prefix: str, key: str) -> str:
    return prefix.removesuffix(f"_{key}_document")
