"""Tasks as a command line names them, and the scores of one model on them: means with their standard errors."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.evaluation_spec import DEFAULT_TASKS, TaskListSpec, TaskSpec
from megatron_kaiyuan.quantile.tasks import TaskSuite

__all__ = ["SUITE", "load_tasks", "measured_tasks", "task_list"]

SUITE = "kaiyuan"
"""Name of the tasks of the Kaiyuan-2B report, all together."""


def task_list(names: Sequence[str], **settings: Any) -> TaskListSpec:
    """Return the tasks that a command line names.

    Args:
        names: lm-eval's names, paths of task files in its YAML format, or `kaiyuan` for the report's suite.
        settings: Further fields of `TaskListSpec`, and `num_fewshot` for all tasks.

    Raises:
        StudyError: a file is no task, a task is named twice, or a number is out of range.
    """
    num_fewshot = settings.pop("num_fewshot", None)
    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    tasks = [task for name in names for task in _spelled_out(name)]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise StudyError(f"--tasks names {twice[0]!r} twice; name each task once")
    folders = tuple(dict.fromkeys(str(path.resolve().parent) for path in files))
    try:
        specs = tuple(TaskSpec(name=task, num_fewshot=num_fewshot) for task in tasks)
        return TaskListSpec(tasks=specs, task_folders=folders, **settings)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + "-".join(map(str, first["loc"])).replace("_", "-")
        raise StudyError(f"{flag} {first['input']!r}: {first['msg']}") from error


def _spelled_out(name: str) -> tuple[str, ...]:
    if name == SUITE:
        return DEFAULT_TASKS
    return (_name_in(Path(name)),) if name.endswith((".yaml", ".yml")) else (name,)


class _AnyTag(yaml.SafeLoader):
    """Reads a task file without running what its tags (`!function`) name."""


_AnyTag.add_multi_constructor("!", lambda *_: None)


def _name_in(path: Path) -> str:
    """Name of the task that a file holds."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_AnyTag)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StudyError(f"--tasks {path}: cannot be read ({error}); give a task file in lm-eval's format") from error
    name = (content.get("task") or content.get("group")) if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise StudyError(f"--tasks {path}: has no `task: NAME`; give a task file in lm-eval's format")
    return name


def load_tasks(spec: TaskListSpec, tokenizer: str, end: int | None) -> TaskSuite:
    """Load all tasks of a list, or none.

    Args:
        spec: Names the tasks.
        tokenizer: Hugging Face tokenizer folder.
        end: Id that ended the documents of the run; a text without context is conditioned on it. None: the tokenizer's.

    Raises:
        StudyError: lm-eval is not installed, there is no end of text, or tasks cannot be loaded; says which, why, and
            which can.
    """
    suite = TaskSuite.load(spec, tokenizer)
    if suite.failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in suite.failed.items())
        rest = f"; the others: --tasks {','.join(suite.loaded)}" if suite.loaded else ""
        raise StudyError(
            f"--tasks: {len(suite.failed)} of {len(spec.all_tasks())} cannot be loaded:{reasons}\n  Mend the names, "
            f"bring their data into the cache of Hugging Face's datasets, or leave them out{rest}"
        )
    if end is not None:
        suite.tokenizer.eos_token = suite.tokenizer.convert_ids_to_tokens(end)
    if suite.tokenizer.eos_token_id is None:
        raise StudyError(
            f"--tokenizer-model {tokenizer}: neither it nor the checkpoint tells the end of text, which tasks need; "
            "name eos_token in its tokenizer_config.json"
        )
    return suite


def measured_tasks(suite: TaskSuite, model: Any, positions: int) -> dict[str, Any]:
    """Return the scores of a model on a suite, ready for JSON.

    `tasks` has them keyed with the tasks' names, and `not_evaluated` has the reasons.
    """
    results, failed = suite.evaluate(model, positions)
    few = {task.name: task.num_fewshot for task in suite.spec.all_tasks()}
    tasks = {}
    for name, result in results.items():
        columns = {"answer_bits_per_byte": result.answer_bits_per_byte, **result.metrics}
        shots = {task.get_config("num_fewshot") for task in suite.loaded[name]["tasks"].values()}
        tasks[name] = {
            "items": len(result.answer_bits_per_byte),
            "num_fewshot": shots.pop() if len(shots) == 1 else few[name],
            "limit": suite.spec.limit,
            "scores": {score: _mean(values) for score, values in columns.items()},
            "standard_errors": {score: _standard_error(values) for score, values in columns.items()},
        }
    plain: dict[str, Any] = json.loads(json.dumps({"tasks": tasks, "not_evaluated": failed}))
    return plain


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean over items, from their spread.

    None of one item.
    """
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
