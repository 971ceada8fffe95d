"""Held-out documents that come in groups: told by a sidecar, checked before training, and part of the evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.held_out import HeldOutDocuments, group_numbers
from megatron_kaiyuan.quantile.results import HeldOutResult, groups_of
from megatron_kaiyuan.quantile.runs import write_slices
from tests.unit_tests.quantile.tiny_study import tiny_study, write_sources


def grouped(folder: Path, groups: str | None = "package") -> dict[str, Any]:
    """The held-out set with its groups."""
    told = {"shards": str(folder / "clean"), "documents": 80}
    return {"held_out": {"clean": told | ({} if groups is None else {"groups": groups})}}


def write_groups(folder: Path, numbers: np.ndarray) -> None:
    np.save(f"{folder / 'clean'}.scores.package.npy", numbers.astype(np.float32))


def test_each_document_has_the_group_that_the_sidecar_gives_it(tmp_path: Path) -> None:
    write_sources(tmp_path)
    write_groups(tmp_path, np.arange(900) // 7)
    study = tiny_study(tmp_path, evaluation=grouped(tmp_path))
    plan = Plan.load(write_slices(study)[0].runs[0].plan)
    documents = HeldOutDocuments(plan, "clean", None).documents
    held_out = plan.opened["clean"].held_out
    assert set(documents.tolist()) <= set(held_out.tolist())
    assert 80 <= len(held_out) < 87
    assert held_out.tolist() == [number for number in range(900) if number // 7 in set((held_out // 7).tolist())]
    assert group_numbers(plan, "clean", "package", documents) == tuple((documents // 7).tolist())


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (None, r"evaluation.held_out.clean.groups: .*package"),
        (np.arange(900) + 0.5, "holds numbers that are not whole"),
        (np.arange(900) // 300, r"documents are of 1 group, too few.* 10 are needed"),
    ],
)
def test_wrong_groups_are_refused_before_anything_is_trained(
    tmp_path: Path, numbers: np.ndarray | None, words: str
) -> None:
    write_sources(tmp_path)
    if numbers is not None:
        write_groups(tmp_path, numbers)
    with pytest.raises(StudyError, match=words):
        write_slices(tiny_study(tmp_path, evaluation=grouped(tmp_path)))


def test_groups_change_the_training_only_where_they_are_held_out_of_a_source(tmp_path: Path) -> None:
    plain, told = (tiny_study(tmp_path, evaluation=grouped(tmp_path, groups)) for groups in (None, "package"))
    assert told.training_digest == plain.training_digest
    assert told.evaluation_digest != plain.evaluation_digest
    held_out: dict[str, Any] = {"good": {"documents": 80}}
    part = tiny_study(tmp_path, evaluation={"held_out": held_out})
    held_out["good"]["groups"] = "package"
    assert tiny_study(tmp_path, evaluation={"held_out": held_out}).training_digest != part.training_digest


def test_no_slice_holds_a_document_of_a_held_out_package(tmp_path: Path) -> None:
    write_sources(tmp_path)
    packages = np.random.default_rng(3).integers(0, 90, 900)
    np.save(f"{tmp_path / 'good'}.scores.package.npy", packages.astype(np.float32))
    told = {"good": {"documents": 80, "groups": "package"}}
    sliced = write_slices(tiny_study(tmp_path, evaluation={"held_out": told}))[0]
    for run in (run for run in sliced.runs if run.source == "good"):
        samples = CurriculumDataset(plan := Plan.load(run.plan))
        shown = {segment.document for sample in range(len(samples)) for segment in samples.provenance(sample).segments}
        assert not set(packages[sorted(shown)]) & set(packages[plan.opened["good"].held_out])


def test_a_document_without_bytes_has_no_group_either() -> None:
    result = HeldOutResult((1.0, 2.0, 3.0), (4, 5, 6), (7, 0, 8), (1, 2, 3))
    groups = groups_of(result)
    assert groups is not None
    assert groups.tolist() == [1, 3]
