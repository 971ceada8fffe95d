"""A folder of shards: complete, in order, the same whoever builds it, and refused where it is not what it seems."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.errors import ConfigError, PreprocessError, ShardError
from megatron_kaiyuan.inspection.describe import describe_source
from megatron_kaiyuan.inspection.verify import verify_shards
from megatron_kaiyuan.preprocess import (
    load_build,
    load_manifest,
    missing_shards,
    preprocess,
)
from megatron_kaiyuan.preprocess.inputs import InputFile, cut_into_shards
from tests.unit_tests.preprocess.corpus import (
    SilentReporter,
    build,
    build_folder,
    folder_bytes,
    folder_config,
    number_rows,
    read_shard_by_hand,
    write_jsonl,
    write_parquet,
)

ROWS = [{**row, "id": f"doc-{number}"} for number, row in enumerate(number_rows(120))]
STARTS = [0, 70, 90, 100]
"""First row of each input file."""
SETTINGS: dict[str, Any] = {"score_keys": ("score", "metadata.quality"), "id_key": "id", "shard_bytes": 1500}


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    return [
        write_jsonl(folder / "a.jsonl", ROWS[: STARTS[1]]),
        write_parquet(folder / "b.parquet", ROWS[STARTS[1] : STARTS[2]]),
        write_jsonl(folder / "c.jsonl.gz", ROWS[STARTS[2] : STARTS[3]]),
        write_jsonl(folder / "d.jsonl.zst", ROWS[STARTS[3] :]),
    ]


def documents(folder: Path) -> list[list[int]]:
    return [
        document for index in sorted(folder.glob("*.idx")) for document in read_shard_by_hand(index.with_suffix(""))
    ]


def test_a_folder_holds_the_documents_of_one_shard_in_their_order(tmp_path: Path, inputs: list[Path]) -> None:
    build_folder(inputs, tmp_path / "out", **SETTINGS)
    build(inputs, tmp_path / "one", score_keys=("score",))
    assert len(list((tmp_path / "out").glob("*.idx"))) > 4
    assert documents(tmp_path / "out") == read_shard_by_hand(tmp_path / "one_text_document")
    source = open_source("numbers", str(tmp_path / "out"))
    assert source.num_documents == len(ROWS)
    assert source.load_scores("metadata.quality").tolist() == [row["metadata"]["quality"] for row in ROWS]
    assert verify_shards(str(tmp_path / "out")).findings == []


def test_the_table_says_where_each_document_comes_from(tmp_path: Path, inputs: list[Path]) -> None:
    """By the row in the file, or, in a shard that begins within a plain file, by the byte; never by a row of a part."""
    build_folder(inputs, tmp_path / "out", **SETTINGS)
    lines = inputs[0].read_bytes().split(b"\n")
    ids_of = {str(path): [row["id"] for row in ROWS[first:]] for path, first in zip(inputs, STARTS, strict=True)}
    found, without_row, places = [], 0, set()
    for index in sorted((tmp_path / "out").glob("*.idx")):
        prefix = str(index.with_suffix(""))
        table = pq.read_table(f"{prefix}.documents.parquet").to_pylist()
        for entry, document in zip(table, read_shard_by_hand(prefix), strict=True):
            assert entry["tokens"] == len(document)
            places.add((entry["file"], entry["row"], entry["offset"]))
            if entry["offset"] is not None:
                line = inputs[0].read_bytes()[entry["offset"] :].split(b"\n")[0]
                assert f'"id": "{entry["id"]}"'.encode() in line
                assert entry["row"] is None or lines[entry["row"]] == line
            if entry["row"] is None:
                assert entry["file"] == str(inputs[0])
                without_row += 1
            else:
                assert ids_of[entry["file"]][entry["row"]] == entry["id"]
            found.append((entry["id"], entry["score.score"], entry["score.metadata.quality"]))
    assert found == [(row["id"], np.float32(row["score"]), row["metadata"]["quality"]) for row in ROWS]
    assert 0 < without_row < STARTS[1]
    assert len(places) == len(ROWS)


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_tasks_in_any_order_give_the_bytes_of_one_run(tmp_path: Path, inputs: list[Path], num_tasks: int) -> None:
    build_folder(inputs, tmp_path / "one", **SETTINGS, num_tasks=num_tasks, task_id=0)
    built = 0
    for task in reversed(range(num_tasks)):
        summary = build_folder(inputs, tmp_path / "many", **SETTINGS, num_tasks=num_tasks, task_id=task)
        assert summary.shards_kept == 0, "two tasks share a shard"
        built += summary.shards_built
    assert built == len(list((tmp_path / "many").glob("*.idx")))
    for task in range(1, num_tasks):
        build_folder(inputs, tmp_path / "one", **SETTINGS, num_tasks=num_tasks, task_id=task)
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


def test_workers_do_not_change_a_folder(tmp_path: Path, inputs: list[Path]) -> None:
    build_folder(inputs, tmp_path / "one", **SETTINGS)
    build_folder(inputs, tmp_path / "two", **SETTINGS, workers=2, block_bytes=300)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_missing_tasks_are_named_and_no_plan_reads_half_a_folder(tmp_path: Path, inputs: list[Path]) -> None:
    out = tmp_path / "out"
    for task in (0, 2):
        build_folder(inputs, out, **SETTINGS, num_tasks=3, task_id=task)
    record = load_build(out)
    assert record is not None
    shards = len(record.shards)
    assert missing_shards(out, record) == list(range(1, shards, 3))
    with pytest.raises(ShardError, match=r"shards are missing \(1, .*--num-tasks 3 and --task-id 1 "):
        open_source("numbers", str(out))
    findings = describe_source("numbers", str(out))["findings"]
    assert [finding["kind"] for finding in findings] == ["missing"]
    assert "--task-id 1 " in findings[0]["message"]
    assert open_source("part", [str(path)[:-4] for path in out.glob("*.idx")]).num_documents < len(ROWS)
    build_folder(inputs, out, **SETTINGS, num_tasks=3, task_id=1)
    assert describe_source("numbers", str(out))["findings"] == []
    assert describe_source("numbers", str(out))["manifests"]["input_rows"] == len(ROWS)


def test_a_second_run_keeps_what_is_whole_and_mends_what_is_not(tmp_path: Path, inputs: list[Path]) -> None:
    out = tmp_path / "out"
    whole = build_folder(inputs, out, **SETTINGS)
    before = folder_bytes(out)
    (out / "shard_00001_text_document.scores.score.npy").unlink()
    (out / "shard_00002_text_document.manifest.json").unlink()
    (out / "shard_00003_text_document.bin").write_bytes(b"short")
    (out / "shard_00002_text_document.manifest.json.host-1.partial").write_bytes(
        before["shard_00002_text_document.manifest.json"]
    )
    again = build_folder(inputs, out, **SETTINGS)
    assert (again.shards_built, again.shards_kept) == (3, whole.shards_built - 3)
    assert (again.rows, again.skipped) == (whole.rows, whole.skipped)
    assert folder_bytes(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"append_eod": True}, "append_eod was False, now True"),
        ({"shard_bytes": 4000}, "shard_bytes was 1500, now 4000"),
        ({"score_keys": ()}, "score_keys was"),
        ({"max_document_tokens": 100}, "max_document_tokens was None, now 100"),
    ],
)
def test_other_flags_are_refused_and_leave_everything_as_it_was(
    tmp_path: Path, inputs: list[Path], change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    build_folder(inputs, out, **SETTINGS)
    before = folder_bytes(out)
    with pytest.raises(ConfigError, match=rf"{message}.*--overwrite"):
        build_folder(inputs, out, **{**SETTINGS, **change})
    assert folder_bytes(out) == before
    build_folder(inputs, out, **{**SETTINGS, **change}, overwrite=True)
    build_folder(inputs, tmp_path / "fresh", **{**SETTINGS, **change})
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")


def test_input_that_changed_is_refused_even_at_the_same_size(tmp_path: Path, inputs: list[Path]) -> None:
    build_folder(inputs, tmp_path / "out", **SETTINGS)
    text = inputs[0].read_bytes()
    inputs[0].write_bytes(text.replace(b"doc-0", b"doc-x", 1))
    with pytest.raises(ConfigError, match=r"input .*a\.jsonl has changed"):
        build_folder(inputs, tmp_path / "out", **SETTINGS)
    with pytest.raises(ConfigError, match="4 input files then, 3 now"):
        build_folder(inputs[1:], tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize("searched", ["in", "."])
def test_an_output_inside_a_searched_directory_is_refused(tmp_path: Path, inputs: list[Path], searched: str) -> None:
    before = folder_bytes(tmp_path / "in")
    for build_it, name in ((build_folder, "out"), (build, "out/one")):
        with pytest.raises(ConfigError, match=r"is searched for documents, and the output goes to .* inside it"):
            build_it([tmp_path / searched], tmp_path / "in" / name)
    assert folder_bytes(tmp_path / "in") == before
    build_folder(inputs, tmp_path / "in" / "out")  # files named one by one cannot be mistaken


def test_a_folder_with_foreign_shards_is_refused(tmp_path: Path, inputs: list[Path]) -> None:
    build(inputs, tmp_path / "out" / "other")
    with pytest.raises(ConfigError, match=r"holds other_text_document\.idx, which this build did not make"):
        build_folder(inputs, tmp_path / "out", **SETTINGS)
    build_folder(inputs, tmp_path / "out", **SETTINGS, overwrite=True)
    assert not list((tmp_path / "out").glob("other*"))


def test_a_shard_of_faulty_rows_only_is_complete_and_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "1"}] * 5 + [{"text": ""}] * 5 + [{"text": "2"}] * 5)
    summary = build_folder([path], tmp_path / "out", shard_bytes=30, on_error="skip")
    assert summary.skipped == {"empty_document": 5}
    assert documents(tmp_path / "out") == [[1]] * 5 + [[2]] * 5
    assert open_source("a", str(tmp_path / "out")).num_documents == 10
    assert describe_source("a", str(tmp_path / "out"))["manifests"]["skipped"] == {"empty_document": 5}


def test_what_finished_shards_skipped_is_counted_in_every_later_run(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "1"}] * 5 + [{"text": ""}] * 5)
    first, again = (build_folder([path], tmp_path / "out", shard_bytes=30, on_error="skip") for _ in range(2))
    assert again.shards_built == 0
    assert (again.rows, again.skipped) == (first.rows, first.skipped) == (10, {"empty_document": 5})


def test_names_stay_with_their_documents_where_rows_are_skipped(tmp_path: Path) -> None:
    rows = [{"text": text, "id": name} for text, name in (("", "a"), ("1", "b"), ("x", "c"), ("2 3", "d"))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    build([path], tmp_path / "out", id_key="id", on_error="skip")
    table = pq.read_table(tmp_path / "out_text_document.documents.parquet")
    assert table.column("id").to_pylist() == ["b", "d"]
    assert table.column("row").to_pylist() == [1, 3]


def test_a_fault_in_a_cut_file_is_found_by_its_place(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "1"}] * 10 + [{"text": ""}])
    with pytest.raises(PreprocessError, match=r"a\.jsonl, the line at byte 140: "):
        build_folder([path], tmp_path / "out", shard_bytes=40)
    assert path.read_bytes()[140:] == b'{"text": ""}\n'
    assert len(list((tmp_path / "out").glob("*.manifest.json"))) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_id": 2, "num_tasks": 2}, r"--task-id 2: must lie in \[0, 2\)"),
        ({"shard_bytes": 0}, "--shard-size 0"),
        ({"output_prefix": "p"}, "give one of --output-prefix"),
    ],
)
def test_flags_of_a_folder_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_folder([tmp_path], tmp_path / "out", **settings)
    with pytest.raises(ConfigError, match="standard input cannot be read twice"):
        build_folder([Path("-")], tmp_path / "out")
    with pytest.raises(ConfigError, match="tasks share a folder"):
        build([tmp_path], tmp_path / "out", num_tasks=2)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_standard_input_gives_the_shard_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    data = write_jsonl(tmp_path / f"rows{suffix}", ROWS).read_bytes()

    def pipe() -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    pipe()
    build([Path("-")], tmp_path / "piped", block_bytes=1000)
    build([write_jsonl(tmp_path / "rows.jsonl", ROWS)], tmp_path / "file")
    for end in (".bin", ".idx"):
        piped, file = (tmp_path / f"{name}_text_document{end}" for name in ("piped", "file"))
        assert piped.read_bytes() == file.read_bytes()
    pipe()
    with pytest.raises(ConfigError, match="standard input is the same again cannot be known"):
        build([Path("-")], tmp_path / "piped", block_bytes=1000)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), max_size=8), kinds=st.randoms(), shard_bytes=st.integers(1, 50))
def test_shards_cover_every_byte_of_the_input_once_and_in_order(sizes: list[int], kinds: Any, shard_bytes: int) -> None:
    files = [InputFile(str(n), size, kinds.choice(["plain", "gzip"])) for n, size in enumerate(sizes)]
    shards = cut_into_shards(files, shard_bytes)
    covered: dict[str, list[int]] = {file.name: [] for file in files}
    order = []
    for parts in shards:
        sizes_of_parts = [(part.stop - part.start) if part.stop is not None else part.file.bytes for part in parts]
        assert sum(sizes_of_parts) <= shard_bytes or len(parts) == 1
        for part, size in zip(parts, sizes_of_parts, strict=True):
            covered[part.file.name] += range(part.start, part.start + size)
            order.append(int(part.file.name))
            assert part.stop is None or part.file.kind == "plain"
    assert order == sorted(order)
    assert set(order) == set(range(len(files)))
    assert all(covered[file.name] == list(range(file.bytes)) for file in files)


def test_a_shard_whose_rows_were_all_skipped_is_whole(tmp_path: Path) -> None:
    """Its manifest has no range of scores, and it can be checked, opened with the others, and left as it is."""
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS[:40], *([{**ROWS[0], "text": ""}] * 40)])
    settings: dict[str, Any] = {**SETTINGS, "on_error": "skip"}
    build_folder([path], tmp_path / "out", **settings)
    manifests = [load_manifest(str(file).removesuffix(".manifest.json")) for file in manifest_files(tmp_path / "out")]
    assert manifests[-1].documents == 0
    assert manifests[-1].scores == {}
    assert manifests[0].scores.keys() == {"score", "metadata.quality"}
    assert verify_shards(str(tmp_path / "out")).findings == []
    assert open_source("numbers", str(tmp_path / "out")).num_documents == 40
    summary = build_folder([path], tmp_path / "out", **settings)
    assert (summary.shards_built, summary.shards_kept) == (0, len(manifests))


def manifest_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.manifest.json"))


@pytest.mark.parametrize(("files", "workers"), [(1, 1), (4, 1), (4, 2)])
def test_progress_ends_at_all_of_the_input_whichever_parts_a_task_has(tmp_path: Path, files: int, workers: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    paths = [
        write_parquet(folder / "a.parquet", ROWS, row_group_size=3),
        write_jsonl(folder / "b.jsonl", ROWS),
        write_parquet(folder / "c.parquet", [], row_group_size=3),
        write_jsonl(folder / "d.jsonl.gz", []),
    ][:files]
    totals = []
    for task in range(3):
        reporter = SilentReporter([])
        config = folder_config(paths, tmp_path / "out", shard_bytes=900, num_tasks=3, task_id=task, workers=workers)
        preprocess(config, reporter)
        assert reporter.last is not None
        assert reporter.last.input_bytes == reporter.total_bytes
        totals.append(reporter.total_bytes)
    assert min(totals) > 0
    assert sum(totals) == sum(path.stat().st_size for path in paths)


def test_a_shard_without_its_manifest_is_built_again(tmp_path: Path, inputs: list[Path]) -> None:
    build_folder(inputs, tmp_path / "out", **SETTINGS)
    before = folder_bytes(tmp_path / "out")
    (tmp_path / "out" / "shard_00001_text_document.manifest.json").unlink()
    assert build_folder(inputs, tmp_path / "out", **SETTINGS).shards_built == 1
    assert folder_bytes(tmp_path / "out") == before
