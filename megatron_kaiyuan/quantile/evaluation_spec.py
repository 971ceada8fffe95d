"""What the models of a study are measured with: held-out sets and tasks, as fields of the study file."""

import functools
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_kaiyuan.errors import StudyError

__all__ = [
    "DEFAULT_CAPABILITIES",
    "DEFAULT_TASKS",
    "EvaluationSpec",
    "HeldOutSpec",
    "StrictModel",
    "TaskListSpec",
    "TaskSpec",
]

DEFAULT_CAPABILITIES: dict[str, tuple[str, ...]] = {
    "knowledge": ("mmlu", "arc_easy", "arc_challenge", "commonsense_qa", "boolq"),
    "common sense": ("piqa", "hellaswag", "winogrande"),
    "Chinese": ("cmmlu", "ceval-valid"),
    "math": ("gsm8k",),
    "code": ("humaneval",),
}
"""Tasks of the default suite by lm-eval's names, grouped as in the Kaiyuan-2B report (arXiv 2512.07612)."""

DEFAULT_TASKS: tuple[str, ...] = tuple(task for tasks in DEFAULT_CAPABILITIES.values() for task in tasks)


class StrictModel(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class HeldOutSpec(StrictModel):
    """Documents that every model is evaluated on and none is trained on."""

    documents: int = Field(gt=0)
    shards: str | list[str] | None = None
    """Shards of a set that is only evaluated on; None: part of the source of this name."""
    capability: str = "language modelling"
    """What it stands for in the ranking."""
    groups: str | None = None
    """Score sidecar with the number of the group of each document, such as its package or host: whole groups are held
    out, and documents of one group are one draw in the statistics. None: each document is by itself."""


class TaskSpec(StrictModel):
    """One task of lm-evaluation-harness."""

    name: str = Field(min_length=1)
    """Its name there, or in one of `task_folders`."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """None: what the task says."""
    capability: str | None = None
    """None: that of the default suite, or else the task's own name."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class TaskListSpec(StrictModel):
    """Which tasks of lm-evaluation-harness a model is measured with, and how."""

    batch_size: int = Field(default=16, gt=0)
    tasks: Annotated[tuple[TaskSpec, ...] | Literal["default"], Field()] = ()
    """lm-evaluation-harness tasks; `default`: the suite of the Kaiyuan-2B report."""
    task_folders: tuple[str, ...] = ()
    """Folders with task files in lm-eval's YAML format; they need no network when their data are local."""
    limit: int | None = Field(default=None, gt=0)
    """Items of each task; None: all."""
    generate: bool = False
    """Also run tasks that generate text (GSM8K, HumanEval) to the end; their likelihood scores need no generation."""

    def all_tasks(self) -> tuple[TaskSpec, ...]:
        """The tasks, the default suite spelled out."""
        return tuple(TaskSpec(name=name) for name in DEFAULT_TASKS) if self.tasks == "default" else self.tasks

    def check_folders(self) -> None:
        """Refuse folders of tasks that are not there.

        Raises:
            StudyError: names the first of them.
        """
        missing = [folder for folder in self.task_folders if not Path(folder).is_dir()]
        if missing:
            raise StudyError(
                f"evaluation.task_folders: {missing[0]} is no folder; put it there: results belong to the tasks it "
                "holds"
            )


class EvaluationSpec(TaskListSpec):
    """What every model of a study is measured with."""

    held_out: dict[str, HeldOutSpec] = Field(min_length=1)
    """Held-out sets with bits per byte on each, keyed with their names."""
    max_windows: int | None = Field(default=None, gt=0)
    """Windows of each held-out set; None: all."""

    def capability_of(self, measure: str) -> str:
        """The capability that a held-out set or a task stands for."""
        if measure in self.held_out:
            return self.held_out[measure].capability
        spec = next(task for task in self.all_tasks() if task.name == measure)
        default = next((name for name, tasks in DEFAULT_CAPABILITIES.items() if measure in tasks), measure)
        return spec.capability or default

    def digested(self) -> list[Any]:
        """What results depend on beside the training, for a digest: the fields, and the content of local tasks.

        Raises:
            StudyError: a folder of tasks is missing.
        """
        names = {"max_windows", "tasks", "task_folders", "limit", "generate"}
        content = self.model_dump(mode="json", include=names)
        for task in content["tasks"] if isinstance(content["tasks"], list | tuple) else ():
            del task["capability"]  # a label of the report; renaming it changes nothing that was measured
        groups = {name: told.groups for name, told in self.held_out.items() if told.groups is not None}
        self.check_folders()
        files = [_files_of(self.task_folders)] if self.task_folders else []
        return [content, *files, *([groups] if groups else [])]  # absent where older results have none


def _files_of(folders: tuple[str, ...]) -> list[list[str]]:
    """Names and digests of all files in the folders, but for hidden ones and what Python leaves there."""
    return [
        [place.as_posix(), _digest(path.resolve(), *_version(path))]
        for folder in folders
        for path in sorted(Path(folder).rglob("*"))
        if not _is_passing(place := path.relative_to(folder)) and path.is_file()
    ]


def _is_passing(place: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in place.parts)


def _version(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Digest of a file, read once for each version of it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
