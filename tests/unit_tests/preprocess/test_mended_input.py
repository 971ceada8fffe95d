"""The same command after a file of its input was mended: what does not depend on that file stays."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.errors import ConfigError, PreprocessError, ShardError
from megatron_kaiyuan.preprocess import RunSummary, load_build, load_manifest, missing_shards, pipeline, preprocess
from megatron_kaiyuan.preprocess.inputs import InputFile, Part, cut_into_shards, keep_cut
from tests.unit_tests.preprocess.corpus import (
    SilentReporter,
    build_folder,
    folder_bytes,
    folder_config,
    number_rows,
    read_shard_by_hand,
    write_jsonl,
    write_parquet,
)

BROKEN = '{"text": "1 2", "sco\n'
MENDED = '{"text": "1 2 3 4 5 6 7"}\n'


def rebuild(inputs: list[Path], out: Path, **options: Any) -> tuple[RunSummary, list[str]]:
    reporter = SilentReporter([])
    return preprocess(folder_config(inputs, out, shard_bytes=1000, **options), reporter), reporter.notes


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return number_rows(200)[first : first + count]


def break_row(path: Path, row: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:row], BROKEN, *lines[row:]]))


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Four plain files and a Parquet file, each cut into shards; the second one has a broken row."""
    folder = tmp_path / "in"
    folder.mkdir()
    paths = [write_jsonl(folder / f"{name}.jsonl", rows(20 * n, 20)) for n, name in enumerate("abcd")]
    break_row(paths[1], 3)
    return [*paths, write_parquet(folder / "e.parquet", rows(80, 20))]


def mend(path: Path, line: str = MENDED) -> None:
    path.write_text(path.read_text().replace(BROKEN, line))


def documents(out: Path) -> list[list[int]]:
    return [ids for index in sorted(out.glob("*.idx")) for ids in read_shard_by_hand(index.with_suffix(""))]


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("shard_*")}


def shards_of(out: Path, path: Path) -> set[int]:
    record = load_build(out)
    assert record is not None
    number = [file.name for file in record.inputs].index(str(path))
    return {shard for shard, parts in enumerate(record.shards) if number in {part[0] for part in parts}}


def told_by_tasks(inputs: list[Path], out: Path, tasks: int = 4) -> list[str]:
    """What stopped the tasks of an array, each started once; the others have finished their shards."""
    told = []
    for task in range(tasks):
        try:
            rebuild(inputs, out, num_tasks=tasks, task_id=task)
        except PreprocessError as error:
            told.append(str(error))
    return told


def stop_at_the_broken_row(inputs: list[Path], out: Path) -> None:
    """One task stops, so shards of the broken file and behind it are there already."""
    (told,) = told_by_tasks(inputs, out)
    assert "b.jsonl" in told


def test_what_does_not_depend_on_the_mended_file_stays(tmp_path: Path, inputs: list[Path]) -> None:
    out = tmp_path / "out"
    stop_at_the_broken_row(inputs, out)
    before = times(out)
    touched = shards_of(out, inputs[1])
    mend(inputs[1])
    summary, notes = rebuild(inputs, out)
    assert any(line.startswith(f"input {inputs[1]} has changed (") for line in notes), notes
    kept = {name for name, time in times(out).items() if before.get(name) == time}
    assert kept == {name for name in before if int(name[6:11]) not in touched}
    assert summary.shards_kept > 5
    assert summary.rows == 101
    rebuild(inputs, tmp_path / "fresh")
    assert documents(out) == documents(tmp_path / "fresh")
    assert open_source("numbers", str(out)).num_documents == 101
    assert rebuild(inputs, out)[0].shards_built == 0


def test_a_file_mended_without_another_size_gives_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, inputs: list[Path]
) -> None:
    stop_at_the_broken_row(inputs, tmp_path / "out")
    mend(inputs[1], '{"text": "1 2 3 4"}\n')
    assert len('{"text": "1 2 3 4"}\n') != len(BROKEN)
    mend_to = '{"text": "1 2 3 4" }\n'
    assert len(mend_to) == len(BROKEN)
    inputs[1].write_text(inputs[1].read_text().replace('{"text": "1 2 3 4"}\n', mend_to))
    for task in (1, 0):  # as an array of another size
        rebuild(inputs, tmp_path / "out", num_tasks=2, task_id=task)
    rebuild(inputs, tmp_path / "fresh", num_tasks=4)
    rebuild(inputs, tmp_path / "fresh")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


def test_offsets_and_rows_of_a_mended_file_lead_to_its_documents(tmp_path: Path, inputs: list[Path]) -> None:
    out = tmp_path / "out"
    stop_at_the_broken_row(inputs, out)
    mend(inputs[1])
    rebuild(inputs, out)
    found = 0
    for shard in sorted(shards_of(out, inputs[1])):
        prefix = out / f"shard_{shard:05d}_text_document"
        table = pq.read_table(f"{prefix}.documents.parquet").to_pylist()
        for entry, ids in zip(table, read_shard_by_hand(prefix), strict=True):
            if entry["file"] == str(inputs[1]):
                line = inputs[1].read_bytes()[entry["offset"] :].split(b"\n")[0]
                assert f'"text": "{" ".join(map(str, ids))}"'.encode() in line
                found += 1
    assert found == 21


def test_tasks_that_are_not_run_again_leave_the_folder_unfinished(tmp_path: Path, inputs: list[Path]) -> None:
    """Another task had built the rest of the broken file before it was mended: a line of it may be missing there."""
    out = tmp_path / "out"
    stop_at_the_broken_row(inputs, out)
    touched = shards_of(out, inputs[1])
    mend(inputs[1])
    first = min(touched)
    rebuild(inputs, out, num_tasks=4, task_id=first % 4)
    record = load_build(out)
    assert record is not None
    assert missing_shards(out, record) == sorted(touched - {first})
    with pytest.raises(ShardError, match=r"shards are missing .*--num-tasks 4"):
        open_source("numbers", str(out))
    for task in range(4):
        rebuild(inputs, out, num_tasks=4, task_id=task)
    assert missing_shards(out, record) == []


def test_a_mended_parquet_file_keeps_its_row_groups_apart(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*rows(0, 60), {**rows(60, 1)[0], "text": ""}], row_group_size=5)
    (told,) = told_by_tasks([path], tmp_path / "out")
    assert "a.parquet:61: " in told, "the row in the file, whatever shard it is in"
    write_parquet(path, rows(0, 70), row_group_size=5)
    rebuild([path], tmp_path / "out")
    rebuild([path], tmp_path / "fresh")
    assert documents(tmp_path / "out") == documents(tmp_path / "fresh")
    write_parquet(path, rows(0, 12), row_group_size=5)
    (tmp_path / "out" / "shard_00000_text_document.manifest.json").unlink()
    rebuild([path], tmp_path / "out")
    assert documents(tmp_path / "out") == documents(tmp_path / "fresh")[:12]


def test_a_finished_folder_is_not_changed_without_being_told_to(tmp_path: Path, inputs: list[Path]) -> None:
    out = tmp_path / "out"
    rebuild(inputs, out, on_error="skip")
    before = folder_bytes(out)
    mend(inputs[1])
    with pytest.raises(ConfigError, match=r"input .*b\.jsonl has changed .* since the build was finished.*--overwrite"):
        rebuild(inputs, out, on_error="skip")
    assert folder_bytes(out) == before
    touched = shards_of(out, inputs[1])
    summary, _ = rebuild(inputs, out, overwrite=True)
    assert summary.shards_built == len(touched)
    assert documents(out) == documents_of_a_fresh_build(inputs, tmp_path / "fresh")


def documents_of_a_fresh_build(inputs: list[Path], out: Path) -> list[list[int]]:
    build_folder(inputs, out, shard_bytes=1000)
    return documents(out)


@pytest.mark.parametrize("what", ["flags", "more files", "other files", "lost", "compressed"])
def test_other_changes_of_an_unfinished_build_are_refused(tmp_path: Path, inputs: list[Path], what: str) -> None:
    out = tmp_path / "out"
    stop_at_the_broken_row(inputs, out)
    before = folder_bytes(out)
    options: dict[str, Any] = {}
    if what == "flags":
        options, message = {"append_eod": True}, "append_eod was False, now True"
    elif what == "more files":
        inputs, message = [*inputs, write_jsonl(tmp_path / "f.jsonl", rows(0, 3))], "5 input files then, 6 now"
    elif what == "other files":
        inputs[4] = inputs[4].rename(tmp_path / "z.parquet")
        message = r"input .*e\.parquet then, .*z\.parquet now"
    elif what == "lost":
        inputs[3].unlink()
        inputs[3].symlink_to(tmp_path / "gone")
        inputs, message = [tmp_path / "in"], r"input .*d\.jsonl cannot be read now"
    else:
        inputs[1].write_bytes(write_jsonl(tmp_path / "b.gz", rows(20, 20)).read_bytes())
        message = r"input .*b\.jsonl has changed .* and cannot be cut as before"
    with pytest.raises(ConfigError, match=rf"{message}.*--overwrite"):
        rebuild(inputs, out, **options)
    assert folder_bytes(out) == before


def test_only_the_manifests_of_changed_shards_are_new(tmp_path: Path, inputs: list[Path]) -> None:
    """A shard's fingerprint covers its own parts and the flags, nothing else."""
    mend(inputs[1])
    rebuild(inputs, tmp_path / "one")
    inputs[3].write_bytes(inputs[3].read_bytes().replace(b"text", b"TEXT", 1))
    rebuild(inputs, tmp_path / "two", on_error="skip")
    prints = [
        {
            path.name: load_manifest(str(path).removesuffix(".manifest.json")).build
            for path in out.glob("*.manifest.json")
        }
        for out in (tmp_path / "one", tmp_path / "two")
    ]
    changed = {int(name[6:11]) for name, build in prints[0].items() if prints[1][name] != build}
    assert changed == shards_of(tmp_path / "one", inputs[3])


def test_a_shard_of_what_was_mended_while_it_was_built_does_not_stay(
    tmp_path: Path, inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    mend(inputs[1])
    rebuild(inputs, out, num_tasks=2, task_id=0)
    build_shard = pipeline.build_shard

    def mend_after_reading(*arguments: Any) -> Any:
        """The first shard is built from the file of before; then another start takes the folder over."""
        monkeypatch.setattr(pipeline, "build_shard", build_shard)
        outcome = build_shard(*arguments)
        inputs[0].write_bytes(inputs[0].read_bytes().replace(b"text", b"TEXT", 1))
        rebuild(inputs, out, num_tasks=2, task_id=0, on_error="skip")
        return outcome

    monkeypatch.setattr(pipeline, "build_shard", mend_after_reading)
    with pytest.raises(
        ConfigError, match=r"another start took the folder over; shard_00001_text_document is of before"
    ):
        rebuild(inputs, out, num_tasks=2, task_id=1)
    assert not list(out.glob("shard_00001*"))
    rebuild(inputs, out, num_tasks=2, task_id=1, on_error="skip")
    assert open_source("numbers", str(out)).num_documents == 100


def test_a_record_whose_parts_do_not_cover_the_input_is_refused(tmp_path: Path, inputs: list[Path]) -> None:
    out = tmp_path / "out"
    rebuild(inputs, out, on_error="skip")
    record = load_build(out)
    assert record is not None
    whole = (out / "build.json").read_text()
    without_the_last_file = [parts for parts in record.shards if parts[-1][0] < len(inputs) - 1]
    for shards in (record.shards[1:], without_the_last_file, [*record.shards, record.shards[-1]]):
        (out / "build.json").write_text(record.model_copy(update={"shards": shards}).model_dump_json())
        with pytest.raises(ShardError, match=r"build\.json: content: .*part.*delete it and run the build again"):
            rebuild(inputs, out)
    (out / "build.json").write_text(whole)
    assert rebuild(inputs, out)[0].shards_built == 0


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    later=st.lists(st.lists(st.integers(0, 90), min_size=5, max_size=5), min_size=1, max_size=3),
    shard_bytes=st.integers(1, 50),
)
def test_a_kept_cut_covers_whatever_the_files_have_become(
    sizes: list[int], later: list[list[int]], shard_bytes: int
) -> None:
    files = [InputFile(str(n), size, "plain") for n, size in enumerate(sizes)]
    shards = cut_into_shards(files, shard_bytes)
    for changes in later:
        cut = [[(int(part.file.name), part.start, part.stop) for part in parts] for parts in shards]
        now = [InputFile(str(n), changes[n], "plain") for n in range(len(files))]
        kept = keep_cut(cut, now, {n for n, file in enumerate(now) if file != files[n]})
        assert kept is not None
        assert [[part.file.name for part in parts] for parts in kept] == [
            [part.file.name for part in parts] for parts in shards
        ]
        assert covered(kept, now) == [list(range(file.bytes)) for file in now]
        files, shards = now, kept


def covered(shards: list[tuple[Part, ...]], files: list[InputFile]) -> list[list[int]]:
    bytes_of: list[list[int]] = [[] for _ in files]
    for parts in shards:
        for part in parts:
            bytes_of[int(part.file.name)] += range(part.start, part.file.bytes if part.stop is None else part.stop)
    return bytes_of
