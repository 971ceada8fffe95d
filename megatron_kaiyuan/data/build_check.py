"""Whether a folder of shards holds all that its build lists: a half-built folder must not pass for a whole source."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_kaiyuan.errors import ShardError

__all__ = ["BUILD_FILE", "FolderState", "folder_state", "require_whole_folder"]

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
            return "run the same tools/preprocess_data.py command again: it builds only what is missing"
        tasks = ",".join(map(str, self.tasks))
        return f"run the same command again with --num-tasks {self.num_tasks} and --task-id {tasks} (one run each)"


def folder_state(folder: Path) -> FolderState | None:
    """The state of a folder of shards; None where no `build.json` lies in it. Reads names only, no shard.

    Raises:
        ShardError: `build.json` is damaged.
    """
    path = folder / BUILD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        keys, shards, tasks = record["settings"]["json_keys"], len(record["shards"]), max(int(record["num_tasks"]), 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path}: not a build record ({error!r}); run the build again, or delete the file if the folder is known "
            "to be whole"
        ) from error
    present = set(os.listdir(folder))  # noqa: PTH208
    wanted = [f"_{key}_document{suffix}" for key in keys for suffix in (".bin", ".idx", ".manifest.json")]
    missing = [number for number in range(shards) if any(f"shard_{number:05d}{end}" not in present for end in wanted)]
    return FolderState(shards, tasks, missing)


def require_whole_folder(folder: Path) -> None:
    """Raise ShardError for a folder whose build is not finished."""
    state = folder_state(folder)
    if state is not None and state.missing:
        first = ", ".join(map(str, state.missing[:8])) + (", ..." if len(state.missing) > 8 else "")
        raise ShardError(
            f"{folder}: {len(state.missing)} of {state.shards} shards are missing ({first}); {state.remedy}; to use "
            "what is there, name it with a glob"
        )
