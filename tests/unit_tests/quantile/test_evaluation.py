"""Held-out losses are booked to the document that each predicted token belongs to."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import PlanError, StudyError
from megatron_kaiyuan.quantile import tasks
from megatron_kaiyuan.quantile.held_out import HeldOutDocuments
from megatron_kaiyuan.quantile.results import Identity, RunResult, check_comparable, result_path
from megatron_kaiyuan.quantile.runs import Run, run_folder, write_slices
from megatron_kaiyuan.quantile.study import parse_study
from tests.helpers import run_distributed
from tests.unit_tests.data.tiny import write_shard
from tests.unit_tests.quantile.tiny_study import invent_results, nothing, sliced_study, study_content, write_sources

LENGTHS = [5, 9, 1, 14, 3, 8, 2, 30, 6, 4]


def held_out(
    folder: Path, documents: int, max_windows: int | None = None, seq_length: int = 7, least: int = 1
) -> tuple[HeldOutDocuments, list[int]]:
    texts = [[number] * length for number, length in enumerate(LENGTHS)]
    prefix = write_shard(folder / "s", texts)
    plan = Plan.from_spec(
        {
            "seq_length": seq_length,
            "sources": {"s": {"shards": prefix}},
            "phases": [{"name": "p", "order": "shuffled", "sources": {"s": {"max_repeat": 9}}}],
            "validation": {"s": {"documents": documents}},
        }
    )
    return HeldOutDocuments(plan, "s", max_windows, least=least), plan.opened["s"].held_out.tolist()


@pytest.mark.parametrize("max_windows", [None, 2])
def test_every_predicted_token_counts_for_its_own_document(tmp_path: Path, max_windows: int | None) -> None:
    documents, numbers = held_out(tmp_path, 8, max_windows)
    # each token is its document's number, so what is predicted says whose it is
    stream = [number for number in numbers for _ in range(LENGTHS[number])]
    predicted = stream[1 : 1 + documents.num_windows * 7]
    expected = [predicted.count(number) for number in numbers if number in predicted]
    rows = documents.rows(0, documents.num_windows)
    assert rows[:, 1:].ravel().tolist() == predicted
    assert documents.sum_by_document(0, np.ones_like(rows[:, 1:])).tolist() == expected
    sums = documents.sum_by_document(0, rows[:, 1:])
    assert sums.tolist() == [number * predicted.count(number) for number in numbers if number in predicted]


def test_batches_add_up_to_the_whole(tmp_path: Path) -> None:
    documents, _ = held_out(tmp_path, 8)
    values = np.random.default_rng(0).random((documents.num_windows, 7))
    parts = sum(documents.sum_by_document(start, values[start : start + 2]) for start in range(0, len(values), 2))
    assert np.allclose(parts, documents.sum_by_document(0, values))


def test_held_out_documents_that_fill_no_window_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="one window needs 32"):
        held_out(tmp_path, 3, seq_length=31)


@pytest.mark.parametrize(
    ("max_windows", "message"),
    [
        (
            2,
            r"2 of \d+ windows are evaluated, with parts of \d documents.* raise evaluation\.max_windows, or leave",
        ),
        (None, r"with parts of 8 documents, too few .*; 9 are needed: hold out more"),
    ],
)
def test_windows_of_too_few_documents_are_refused(tmp_path: Path, max_windows: int | None, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        held_out(tmp_path, 8, max_windows, least=9)
    held_out(tmp_path, 8, least=8)


def test_a_limit_of_windows_that_leaves_too_few_documents_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    write_sources(tmp_path)
    content = study_content(tmp_path)
    content["evaluation"] |= {"max_windows": 5}
    with pytest.raises(StudyError, match=r"held_out\.clean: 5 of \d+ windows .* 20 are needed"):
        write_slices(parse_study(content))
    assert not (tmp_path / "study" / "slices.json").exists()


def test_a_task_that_only_a_later_run_has_does_not_compare(tmp_path: Path) -> None:
    _, sliced = sliced_study(tmp_path)
    results = invent_results(sliced, nothing, task=True)
    check_comparable(results)
    first = next(iter(results))
    with pytest.raises(StudyError, match="task 'quiz' has other items, or was evaluated in one of them only"):
        check_comparable({**results, first: replace(results[first], tasks={})})


def test_the_reason_of_an_error_that_begins_with_empty_lines_is_told() -> None:
    assert (
        tasks.error_summary(ValueError("\n\n  ####\n  set HF_ALLOW_CODE_EVAL\nmore"))
        == "ValueError: #### set HF_ALLOW_CODE_EVAL"
    )
    assert tasks.error_summary(KeyError()) == "KeyError: "


def evaluate_until_mended(_rank: int, folder: Path) -> None:
    """Entry of `run_distributed`: importing the evaluation imports Megatron, which takes a process of its own."""
    from megatron_kaiyuan.quantile import evaluation

    (folder / "tasks").mkdir()
    (folder / "tasks" / "quiz.yaml").write_text("task: quiz")
    held_out = study_content(folder)["evaluation"]
    study, sliced = sliced_study(folder, evaluation=held_out | {"task_folders": [str(folder / "tasks")]})
    run = sliced.runs[0]
    identity = Identity("tok", "model", 1024, study.evaluation_digest)
    result = invent_results(sliced, nothing, identities={run.name: identity})[run.name]
    failed = {"quiz": "no network"}
    evaluator = SimpleNamespace(measure=lambda *_: replace(result, not_evaluated=dict(failed)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "finished_run", lambda *_: object())
        patch.setattr(evaluation, "_Evaluator", lambda *_: evaluator)
        for _ in range(2):
            outcome = evaluation.evaluate_runs(study, sliced, [run])
            assert (outcome.evaluated, outcome.not_evaluated) == (1, failed)
        failed.clear()
        assert evaluation.evaluate_runs(study, sliced, [run]).evaluated == 1
        assert evaluation.evaluate_runs(study, sliced, [run]).up_to_date == 1
        (folder / "tasks" / "quiz.yaml").write_text("task: quiz, edited")
        assert evaluation.evaluate_runs(study, sliced, [run]).evaluated == 1


def evaluate_around_failures(_rank: int, folder: Path) -> None:
    """Entry of `run_distributed`."""
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_kaiyuan.quantile import evaluation

    study, sliced = sliced_study(folder)
    runs = list(sliced.runs[:4])
    identity = Identity("tok", "model", 1024, study.evaluation_digest)
    whole = invent_results(sliced, nothing, identities={run.name: identity for run in runs})
    errors = {
        runs[0].name: CheckpointException("load", {0: (OSError("torn file"), None)}),  # type: ignore[dict-item]
        runs[2].name: RuntimeError("out of memory\nand more"),
    }

    def measure(run: Run, _finished: object) -> RunResult:
        if run.name in errors:
            raise errors[run.name]
        return whole[run.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "finished_run", lambda *_: object())
        patch.setattr(evaluation, "_Evaluator", lambda *_: SimpleNamespace(measure=measure))
        outcome = evaluation.evaluate_runs(study, sliced, runs)
        assert outcome.failed == {
            runs[0].name: "OSError: torn file",
            runs[2].name: "RuntimeError: out of memory and more",
        }
        assert (outcome.evaluated, outcome.up_to_date) == (2, 0)
        errors.clear()
        result_path(study, runs[1]).write_text('{"format": "of another version"}')
        outcome = evaluation.evaluate_runs(study, sliced, runs)
        assert (outcome.evaluated, outcome.up_to_date, outcome.failed) == (3, 1, {})


def evaluate_around_damage(_rank: int, folder: Path) -> None:
    """Entry of `run_distributed`."""
    import torch

    from megatron_kaiyuan.quantile import evaluation
    from tests.unit_tests.export.small_models import KAIYUAN, save_model

    study, sliced = sliced_study(folder)
    cut, torn, whole = runs = list(sliced.runs[:3])
    folders = {
        run.name: save_model(KAIYUAN, run_folder(study, run) / "checkpoints", torch.float32).folder for run in runs
    }
    data = next(folders[cut.name].glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    (folders[torn.name] / "metadata.json").write_text('{"sharded')

    def prepare(evaluator: Any, *_: object) -> None:
        suite = SimpleNamespace(evaluate=lambda *_: ({}, {}))
        values = {"study": study, "sliced": sliced, "suite": suite, "held_out": {}, "arguments": None, "model": None}
        for name, value in values.items():
            setattr(evaluator, f"_{name}", value)
        evaluation.start_single_process()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "finished_run", lambda *_: SimpleNamespace(tokens_per_second=1.0))
        patch.setattr(evaluation._Evaluator, "__init__", prepare)
        patch.setattr(evaluation, "_model_digest", lambda _: "model")
        outcome = evaluation.evaluate_runs(study, sliced, runs)
    assert outcome.failed.keys() == {cut.name, torn.name}
    for name, reason in (
        (cut.name, rf"has only [\d,]+ of [\d,]+ bytes in {data.name}"),
        (torn.name, r"metadata\.json that is unreadable"),
    ):
        told = outcome.failed[name]
        assert re.match(rf"ConfigError: {folders[name]}.* {reason}.*restore it", told), told
    assert outcome.evaluated == 1
    assert result_path(study, whole).is_file()


def test_a_damaged_checkpoint_is_named_and_the_other_runs_are_evaluated(tmp_path: Path) -> None:
    run_distributed(evaluate_around_damage, 1, tmp_path)


def test_a_run_that_cannot_be_evaluated_does_not_cost_the_others_their_results(tmp_path: Path) -> None:
    run_distributed(evaluate_around_failures, 1, tmp_path)


def test_a_run_whose_task_failed_is_evaluated_again_until_it_does_not(tmp_path: Path) -> None:
    run_distributed(evaluate_until_mended, 1, tmp_path)
