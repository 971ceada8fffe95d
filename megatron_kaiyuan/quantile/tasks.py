"""Tasks of lm-evaluation-harness: loaded once, scored by likelihood item by item, and named when they cannot be loaded.

Beside the harness's own accuracy every item gets what small models differ in long before their accuracy does
(DataDecide, arXiv 2504.11393): bits per byte of the right answer, its share of the probability of all answers, and its
margin before the best wrong one.
"""

import hashlib
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.evaluation_spec import TaskListSpec
from megatron_kaiyuan.quantile.results import TaskResult
from megatron_kaiyuan.quantile.study import Study

__all__ = ["TaskSuite", "check_requirements", "check_tasks", "choice_scores", "error_summary"]

_FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class TaskSuite:
    """The tasks of a list that could be loaded, and why the others could not."""

    spec: TaskListSpec
    loaded: dict[str, dict[str, Any]]
    """lm-eval's description of each task or group by the list's name for it."""
    failed: dict[str, str]
    tokenizer: Any = None

    @classmethod
    def load(cls, spec: TaskListSpec, tokenizer: str | None) -> "TaskSuite":
        """Load all tasks, and remember a task that fails with its reason.

        Args:
            spec: Names the tasks.
            tokenizer: Hugging Face tokenizer, a folder or a name.

        Raises:
            StudyError: tasks are asked for, and lm-eval is not installed, a folder is missing, or no tokenizer.
        """
        wanted = spec.all_tasks()
        if not wanted:
            return cls(spec, {}, {})
        check_requirements(spec, tokenizer)
        assert tokenizer is not None, "checked"
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        from lm_eval.tasks import TaskManager
        from transformers import AutoTokenizer

        folders = list(spec.task_folders)
        manager = TaskManager(include_path=folders, include_defaults=False)
        if any(task.name not in manager.all_tasks for task in wanted):  # reading the harness's own takes seconds
            manager = TaskManager(include_path=folders or None)
        loaded, failed = {}, {}
        for task in wanted:
            try:
                loaded[task.name] = _prepare(manager.load([task.name]), task.num_fewshot)
            except Exception as error:  # a task is data and code of many authors, and its data may need a network
                failed[task.name] = error_summary(error)
        return cls(spec, loaded, failed, AutoTokenizer.from_pretrained(tokenizer))

    def evaluate(self, model: Any, positions: int) -> tuple[dict[str, TaskResult], dict[str, str]]:
        """Score one model.

        Args:
            model: In evaluation mode.
            positions: Longest context of the model, tokens.

        Returns:
            Results keyed with the names in the list, and the reasons of the tasks that gave none.
        """
        results: dict[str, TaskResult] = {}
        failed = dict(self.failed)
        if not self.loaded:
            return results, failed
        from megatron_kaiyuan.quantile.language_model import MegatronLanguageModel

        batch = self.spec.batch_size
        language_model = MegatronLanguageModel(model, self.tokenizer, positions=positions, batch_size=batch)
        for name, tasks in self.loaded.items():
            try:
                results[name] = _score_tasks(language_model, tasks, self.spec)
            except Exception as error:  # as above: one broken task must not cost the others their results
                failed[name] = error_summary(error)
        return results, failed


def check_tasks(study: Study) -> None:
    """Check that a study has what its tasks need.

    Only the evaluating machine can know whether the harness is installed.

    Raises:
        StudyError: tasks without a tokenizer or their folder.
    """
    _check_tokenizer(study.evaluation, study.tokenizer.model if study.tokenizer else None)
    study.evaluation.digested()


def check_requirements(spec: TaskListSpec, tokenizer: str | None) -> None:
    """Whether tasks can be loaded on this machine.

    Raises:
        StudyError: lm-eval is not installed, a folder is missing, or there is no tokenizer.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise StudyError(
            "evaluation tasks need lm-evaluation-harness, which is not installed: pip install -c constraints.txt "
            '-e ".[eval]", or leave the tasks out'
        )
    _check_tokenizer(spec, tokenizer)
    spec.check_folders()


def _check_tokenizer(spec: TaskListSpec, tokenizer: str | None) -> None:
    if spec.all_tasks() and tokenizer is None:
        raise StudyError("evaluation.tasks needs the tokenizer; add tokenizer: {type, model} to the study")


def error_summary(error: BaseException) -> str:
    """Return the first lines of an error that say something.

    Some errors, like the one of HumanEval, begin with empty lines.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def _prepare(loaded: dict[str, Any], num_fewshot: int | None) -> dict[str, Any]:
    for task in loaded["tasks"].values():
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _score_tasks(language_model: Any, loaded: dict[str, Any], spec: TaskListSpec) -> TaskResult:
    """Scores of all leaf tasks of one name, item after item."""
    rows: list[dict[str, float]] = []
    digest = hashlib.sha256()
    for name, task in loaded["tasks"].items():
        kind = task.get_config("output_type")
        if kind == "multiple_choice":
            items = _choice_items(language_model, name, task, spec.limit)
        elif kind in ("generate_until", "loglikelihood"):
            items = _answer_items(language_model, name, task, spec)
        else:
            raise StudyError(f"{name}: output type {kind!r} has no answer to score; multiple_choice, generate_until do")
        for text, row in items:
            digest.update(text.encode() + b"\0")
            rows.append(row)
    names = [name for name in rows[0] if name != "answer_bits_per_byte" and all(name in row for row in rows)]
    return TaskResult(
        items=digest.hexdigest()[:16],
        answer_bits_per_byte=tuple(round(row["answer_bits_per_byte"], 6) for row in rows),
        metrics={name: tuple(round(row[name], 6) for row in rows) for name in names},
    )


def _choice_items(language_model: Any, name: str, task: Any, limit: int | None) -> list[tuple[str, dict[str, float]]]:
    from lm_eval import evaluator

    output = evaluator.evaluate(
        language_model,
        {"tasks": {name: task}, "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert output is not None, "only ranks above 0 get nothing"
    items = []
    for sample in output["samples"][name]:
        document = sample["doc"]
        choices = len(task.doc_to_choice(document))
        arguments = sample["arguments"][:choices]  # with mutual information, unconditional requests follow
        likelihoods = [float(response[0]) for response in sample["filtered_resps"][:choices]]
        answers = [argument[1] for argument in arguments]
        gold = _gold(task, document, sample["target"])
        row = choice_scores(likelihoods, answers, gold, choices=[str(one) for one in task.doc_to_choice(document)])
        items.append((f"{arguments[0][0]}\n{answers}", row))
    return items


def _gold(task: Any, document: Any, target: Any) -> int:
    """Number of the right choice."""
    if getattr(task, "multiple_input", False):
        target = task.doc_to_text(document)
    if isinstance(target, list):
        target = target[0]
    if isinstance(target, str) and not target.isdigit():
        return int(task.doc_to_choice(document).index(target))
    return int(target)


def choice_scores(
    likelihoods: Sequence[float], answers: Sequence[str], gold: int, choices: Sequence[str] | None = None
) -> dict[str, float]:
    """Return the scores of one multiple-choice item.

    Args:
        likelihoods: Log likelihood of each answer, nats.
        answers: Their texts as the model reads them, which may begin with a space.
        gold: Number of the right one.
        choices: Their texts as the task has them; None: the same.

    Returns:
        `answer_bits_per_byte` (lower is better); `accuracy` and `accuracy_norm`, 0 or 1, which are lm-eval's `acc` and
        `acc_norm` (likelihoods divided by the characters of the choices, without the space before them); of the
        answers' per-character normalised probabilities, `share_of_probability` (the right one's of their sum, in
        [0, 1]) and `margin` (the right one's less the best wrong one's, in [-1, 1]).
    """
    sizes = [max(1, len(answer.encode())) for answer in answers]
    normal = [value / max(1, len(choice)) for value, choice in zip(likelihoods, choices or answers, strict=True)]
    characters = [max(1, len(answer)) for answer in answers]
    normalised = [math.exp(value / count) for value, count in zip(likelihoods, characters, strict=True)]
    others = [value for number, value in enumerate(normalised) if number != gold]
    return {
        "answer_bits_per_byte": -likelihoods[gold] / sizes[gold] / math.log(2),
        "accuracy": float(max(range(len(answers)), key=lambda number: likelihoods[number]) == gold),
        "accuracy_norm": float(max(range(len(answers)), key=lambda number: normal[number]) == gold),
        "share_of_probability": normalised[gold] / sum(normalised),
        "margin": normalised[gold] - max(others, default=0.0),
    }


def _answer_items(language_model: Any, name: str, task: Any, spec: TaskListSpec) -> list[tuple[str, dict[str, float]]]:
    """Return the likelihood of the reference answer of tasks that ask for a text.

    The score of a generated text comes on demand.
    """
    from lm_eval.api.instance import Instance

    task.build_all_requests(limit=spec.limit, rank=0, world_size=1)
    documents = [instance.doc for instance in task.instances if instance.idx == 0]
    contexts = [instance.args[0] for instance in task.instances if instance.idx == 0]
    answers = [_answer(task, document) for document in documents]
    requests = [
        Instance("loglikelihood", document, pair, 0)
        for document, pair in zip(documents, zip(contexts, answers, strict=True), strict=True)
    ]
    scored = language_model.loglikelihood(requests, disable_tqdm=True)
    rows = [
        {"answer_bits_per_byte": -value / math.log(2) / max(1, len(answer.encode()))}
        for (value, _), answer in zip(scored, answers, strict=True)
    ]
    if spec.generate:
        _add_generated_scores(language_model, name, task, spec.limit, rows)
    return [(f"{context}\n{answer}", row) for context, answer, row in zip(contexts, answers, rows, strict=True)]


def _answer(task: Any, document: Any) -> str:
    """Return the reference answer.

    HumanEval's target is its tests, and the solution stands beside it.
    """
    if "canonical_solution" in document:
        return str(document["canonical_solution"])
    target = task.doc_to_target(document)
    return str(task.get_config("target_delimiter") or "") + str(target[0] if isinstance(target, list) else target)


def _add_generated_scores(
    language_model: Any, name: str, task: Any, limit: int | None, rows: list[dict[str, float]]
) -> None:
    from lm_eval import evaluator

    loaded = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    output = evaluator.evaluate(
        language_model,
        loaded,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=os.environ.get("HF_ALLOW_CODE_EVAL") == "1",  # the harness's own switch for such tasks
    )
    assert output is not None, "only ranks above 0 get nothing"
    for row, sample in zip(rows, output["samples"][name], strict=False):
        for metric in sample["metrics"]:
            row[f"generated {metric}"] = float(sample[metric])
