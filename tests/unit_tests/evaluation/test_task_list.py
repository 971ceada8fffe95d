"""Tasks that a command line names: which ones, what is refused, and the scores of a checkpoint on a local task."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kaiyuan.commands import evaluate
from megatron_kaiyuan.errors import ConfigError, StudyError
from megatron_kaiyuan.quantile.evaluation_spec import DEFAULT_TASKS
from megatron_kaiyuan.quantile.results import TaskResult
from megatron_kaiyuan.quantile.task_list import load_tasks, measured_tasks, task_list
from megatron_kaiyuan.quantile.tasks import TaskSuite
from tests.unit_tests.export.small_models import SmallModel, save_model
from tests.unit_tests.model.reference import Features, Shape
from tests.unit_tests.quantile.test_language_model import write_tokenizer

TOOL = Path(__file__).parents[3] / "tools/evaluate.py"
TASK = """task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_names_files_and_the_suite_become_tasks(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: quiz\nprocess_docs: !function utils.process\n")
    spec = task_list(["hellaswag", str(tmp_path / "mine.yaml")], num_fewshot=5, limit=7)
    assert [(task.name, task.num_fewshot) for task in spec.all_tasks()] == [("hellaswag", 5), ("quiz", 5)]
    assert spec.task_folders == (str(tmp_path),)
    assert spec.limit == 7
    assert tuple(task.name for task in task_list(["kaiyuan"]).all_tasks()) == DEFAULT_TASKS


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (["hellaswag", "hellaswag"], {}, "'hellaswag' twice"),
        (["kaiyuan", "piqa"], {}, "'piqa' twice"),
        (["nowhere.yaml"], {}, "--tasks nowhere.yaml: cannot be read"),
        (["piqa"], {"limit": 0}, "--limit 0"),
        (["piqa"], {"num_fewshot": -1}, "--num-fewshot -1"),
    ],
)
def test_what_cannot_be_is_refused(names: list[str], settings: dict[str, int], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        task_list(names, **settings)


def test_a_file_without_a_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("dataset_path: json\n")
    with pytest.raises(StudyError, match="no `task: NAME`"):
        task_list([str(tmp_path / "plain.yaml")])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to evaluate"),
        (["--plan", "p.yaml", "--limit", "3"], "--limit is about tasks"),
        (["--plan", "p.yaml", "--generate"], "--generate is about tasks"),
        (["--tasks", "piqa", "--windows", "3"], "--windows is about held-out documents"),
    ],
)
def test_flags_without_effect_are_refused(flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", "checkpoint", *flags])
    with pytest.raises(ConfigError, match=words):
        evaluate.main()


class _Suite(TaskSuite):
    """A suite whose one task gave these scores."""

    def evaluate(self, model: Any, positions: int) -> tuple[dict[str, TaskResult], dict[str, str]]:
        result = TaskResult("digest", (1.0, 2.0, 6.0), {"accuracy": (1.0, 0.0, 1.0)})
        return {"quiz": result}, {"essay": "ValueError: no"}


class _Task:
    def get_config(self, name: str) -> int:
        assert name == "num_fewshot"
        return 2


def test_scores_are_means_with_their_standard_errors() -> None:
    """By hand: mean 3, sample variance 7, so sqrt(7 / 3); mean 2/3, variance 1/3, so 1/3."""
    suite = _Suite(task_list(["quiz"], limit=3), {"quiz": {"tasks": {"quiz": _Task()}}}, {})
    found = measured_tasks(suite, None, 8)
    row = found["tasks"]["quiz"]
    assert (row["items"], row["num_fewshot"], row["limit"]) == (3, 2, 3)
    assert row["scores"] == pytest.approx({"answer_bits_per_byte": 3.0, "accuracy": 2 / 3})
    assert row["standard_errors"] == pytest.approx({"answer_bits_per_byte": math.sqrt(7 / 3), "accuracy": 1 / 3})
    assert found["not_evaluated"] == {"essay": "ValueError: no"}


@pytest.fixture
def quiz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": f"the cat {n}", "choices": ["sat on", "bird", "hand"], "gold": n % 3} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "quiz.yaml"
    path.write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    return path


def test_a_checkpoint_is_scored_on_a_local_task(quiz: Path, tmp_path: Path) -> None:
    """In a process of its own: the CPU platform has to come before Megatron."""
    model = SmallModel("words", Features(qk_norm=True, sandwich=True, softcap=30.0), Shape(vocab=384))
    save_model(model, tmp_path / "run", torch.float32)
    write_tokenizer(tmp_path / "tokenizer")
    written = tmp_path / "scores.json"
    flags = ["--tokenizer-model", str(tmp_path / "tokenizer"), "--tasks", str(quiz), "--json", str(written)]
    command = [sys.executable, str(TOOL), str(tmp_path / "run"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    [result] = json.loads(written.read_text())["results"]
    assert result["tasks"]["quiz"]["items"] == 4
    assert result["tasks"]["quiz"]["scores"]["accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert result["sources"] == {}
    assert "quiz" in done.stdout


@pytest.mark.filterwarnings("default")  # of the harness and its own dependencies
def test_tasks_that_cannot_be_loaded_are_refused_with_those_that_can(quiz: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    gone = tmp_path / "gone.yaml"
    gone.write_text(TASK.format(data=tmp_path / "nowhere.jsonl").replace("quiz", "gone"))
    with pytest.raises(StudyError, match="1 of 2 cannot be loaded") as refused:
        load_tasks(task_list([str(quiz), str(gone)]), str(tmp_path / "tokenizer"), None)
    assert "gone: " in str(refused.value)
    assert str(refused.value).endswith("--tasks quiz")
