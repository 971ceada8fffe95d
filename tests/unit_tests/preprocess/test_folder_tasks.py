"""Starts of one folder at the same moment: each leaves to the others what they are writing and what they finished."""

from pathlib import Path

import pytest

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.preprocess import load_manifest, pipeline, verify_manifest
from megatron_kaiyuan.preprocess import partial as partial_files
from megatron_kaiyuan.preprocess.partial import HashedFile, Ownership
from tests.unit_tests.preprocess.corpus import build_folder, folder_bytes, number_rows, write_jsonl

ROWS = number_rows(120)


def folder_of_another_command(tmp_path: Path) -> list[Path]:
    paths = [write_jsonl(tmp_path / "a.jsonl", ROWS)]
    build_folder(paths, tmp_path / "out", shard_bytes=1500, append_eod=True)
    return paths


def test_a_task_leaves_to_others_what_they_are_writing(tmp_path: Path) -> None:
    paths = folder_of_another_command(tmp_path)
    prefix = str(tmp_path / "out" / "shard_00001_text_document")
    owned = Ownership(prefix)
    partials = [HashedFile(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")]
    summary = build_folder(paths, tmp_path / "out", shard_bytes=1500, overwrite=True, num_tasks=3, task_id=0)
    assert summary.shards_built > 1
    assert all(partial.partial.exists() for partial in partials)
    assert not (tmp_path / "out" / "shard_00001_text_document.manifest.json").exists()
    for partial in partials:
        partial.discard()
    owned.release()
    for task in range(3):
        build_folder(paths, tmp_path / "out", shard_bytes=1500, overwrite=True, num_tasks=3, task_id=task)
    for task in range(3):
        build_folder(paths, tmp_path / "fresh", shard_bytes=1500, num_tasks=3, task_id=task)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


def test_a_shard_that_another_task_finishes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the moment when its old manifest is read and the one when it is taken away."""
    paths = folder_of_another_command(tmp_path)
    build_folder(paths, tmp_path / "new", shard_bytes=1500)
    published: list[str] = []

    def publish(prefix: str, patience: float | None = None) -> Ownership:
        if not published:
            for path in (tmp_path / "new").glob(f"{Path(prefix).name}.*"):
                (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
            published.append(prefix)
        return Ownership(prefix, patience)

    monkeypatch.setattr(partial_files, "Ownership", publish)
    build_folder(paths, tmp_path / "out", shard_bytes=1500, overwrite=True, num_tasks=50, task_id=49)
    (prefix,) = published
    assert verify_manifest(prefix).build == load_manifest(str(tmp_path / "new" / Path(prefix).name)).build
    assert len(list((tmp_path / "out").glob("*.idx"))) == 1, "those of the other command are gone"


def test_a_folder_that_another_task_claims_meanwhile_is_not_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_jsonl(tmp_path / "a.jsonl", ROWS)]

    def just_before(folder: Path) -> None:
        """The record is not there yet when it is looked for; then the other task begins to publish."""
        monkeypatch.undo()
        build_folder(paths, folder, shard_bytes=1500, num_tasks=2, task_id=0)
        (folder / "shard_00000_text_document.manifest.json").unlink()

    monkeypatch.setattr(pipeline, "load_build", just_before)
    build_folder(paths, tmp_path / "out", shard_bytes=1500, num_tasks=2, task_id=1)
    build_folder(paths, tmp_path / "out", shard_bytes=1500, num_tasks=2, task_id=0)
    assert open_source("numbers", str(tmp_path / "out")).num_documents == len(ROWS)
