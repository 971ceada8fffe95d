"""What goes wrong on real machines: kills, full disks, links to nothing, dead workers, two runs at once."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.errors import ConfigError, PreprocessError
from megatron_kaiyuan.preprocess import load_manifest, partial, pipeline, readers, verify_manifest
from tests.unit_tests.preprocess.corpus import (
    REPOSITORY,
    build,
    build_folder,
    folder_bytes,
    number_rows,
    read_shard_by_hand,
    write_jsonl,
)
from tests.unit_tests.preprocess.kills import ENVIRONMENT, TOOL, kill_and_finish, run_to_end

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]


def test_a_build_killed_at_random_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(12_000))
    command = [*TOOL, "--input", str(path), "--output-dir", str(tmp_path / "out"), *NULL, "--shard-size", "200KB"]
    seconds = run_to_end([*command, "--workers", "2"])
    whole = folder_bytes(tmp_path / "out")
    for entry in (tmp_path / "out").iterdir():
        entry.unlink()
    kill_and_finish([*command, "--workers", "2"], tmp_path / "out", whole, seconds, seed=3, most=3)


DIE_AT_RENAME = """
import os, pathlib, sys
from tests.unit_tests.preprocess.corpus import build
from pathlib import Path
left = int(sys.argv[1])
plain = pathlib.Path.replace
def replace(self, target):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return plain(self, target)
pathlib.Path.replace = replace
keys = {"score_keys": ("score",), "json_keys": ("text", "more")}
build([Path(sys.argv[2])], Path(sys.argv[3]), overwrite=sys.argv[4] == "1", **keys)
"""


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize("renames", [0, 2, 7])
def test_a_death_between_two_renames_is_mended(tmp_path: Path, renames: int, overwrite: bool) -> None:  # noqa: FBT001
    rows = [{**row, "more": "1 2 3"} for row in number_rows(20)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    arguments: dict[str, Any] = {"score_keys": ("score",), "json_keys": ("text", "more"), "overwrite": overwrite}
    build([path], tmp_path / "whole" / "p", **arguments)
    if overwrite:
        build([path], tmp_path / "out" / "p", json_keys=("text", "more"), append_eod=True)
    died = subprocess.run(
        [
            sys.executable,
            "-c",
            DIE_AT_RENAME,
            str(renames),
            str(path),
            str(tmp_path / "out" / "p"),
            str(int(overwrite)),
        ],
        env=ENVIRONMENT,
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
    )
    assert died.returncode == 9, died.stderr.decode()
    for manifest in (tmp_path / "out").glob("*.manifest.json"):
        verify_manifest(str(manifest).removesuffix(".manifest.json"))  # the last name, so all the others are there
    build([path], tmp_path / "out" / "p", **arguments)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_torn_files_of_another_command_are_not_taken_for_our_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(20))
    build([path], tmp_path / "p", append_eod=True)
    manifest = tmp_path / "p_text_document.manifest.json"
    manifest.rename(f"{manifest}.host-1.partial")
    before = folder_bytes(tmp_path)
    with pytest.raises(ConfigError, match=r"exists \(without a manifest.*--overwrite"):
        build([path], tmp_path / "p")
    assert folder_bytes(tmp_path) == before
    build([path], tmp_path / "p", append_eod=True)
    assert {name: data for name, data in before.items() if "manifest" not in name}.items() <= folder_bytes(
        tmp_path
    ).items()


def test_what_tells_whose_torn_files_are_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("manifest.json", "idx", "bin", "documents.parquet"):
        (tmp_path / f"p.{name}.host-1.partial").write_bytes(b"torn")
    gone: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok: gone.append(self.name))
    with partial.Ownership(str(tmp_path / "p")) as owned:
        partial.remove_dead_partials(str(tmp_path / "p"), owned)
    assert gone.pop() == "p.owner.partial"
    assert len(gone) == 4
    assert gone[-1] == "p.manifest.json.host-1.partial"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_over_the_limit_stops_or_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    rows = number_rows(9)
    rows[4]["text"] = "1 " * 2000 + "1"
    path = write_jsonl(tmp_path / f"rows{suffix}", rows)
    with pytest.raises(PreprocessError, match=r"rows\.jsonl.*:5: a line longer than .*--on-error skip"):
        build([path], tmp_path / "out" / "p", block_bytes=300)
    summary = build([path], tmp_path / "out" / "p", block_bytes=300, on_error="skip")
    assert summary.skipped == {"line_too_long": 1}
    assert load_manifest(str(tmp_path / "out" / "p_text_document")).inputs[0].rows == 9
    texts = [" ".join(map(str, document)) for document in read_shard_by_hand(tmp_path / "out" / "p_text_document")]
    assert texts == [row["text"] for row in rows[:4] + rows[5:]]


def test_a_full_disk_is_told_and_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(200))
    write = partial.HashedFile.write
    room = 20_000

    def until_full(self: partial.HashedFile, data: bytes) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(partial.HashedFile, "write", until_full)
        with pytest.raises(PreprocessError, match=r"No space left on device; free .* run the same command again"):
            build_folder([path], tmp_path / "out", shard_bytes=5000)
    finished = folder_bytes(tmp_path / "out")
    assert not any(name.endswith(".partial") for name in finished)
    assert "shard_00000_text_document.manifest.json" in finished
    build_folder([path], tmp_path / "out", shard_bytes=5000)
    build_folder([path], tmp_path / "fresh", shard_bytes=5000)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


def test_a_file_size_limit_is_one_line_and_exit_code_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(20_000))
    command = " ".join([*TOOL, "--input", str(path), "--output-prefix", str(tmp_path / "out" / "p"), *NULL])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 100; exec {command} --workers 2"],
        env=ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("pattern", ["", "*.jsonl", "*"], ids=["folder", "glob", "star"])
@pytest.mark.parametrize("target", ["gone", "in/b.jsonl"], ids=["nothing", "itself"])
def test_a_link_to_nothing_is_an_unreadable_file_and_not_nothing(tmp_path: Path, pattern: str, target: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": "1"}])
    (folder / "b.jsonl").symlink_to(tmp_path / target)
    told = "No such file" if target == "gone" else "Too many levels of symbolic links"
    with pytest.raises(PreprocessError, match=rf"b\.jsonl: {told}"):
        build([folder / pattern], tmp_path / "out")
    assert build([folder / pattern], tmp_path / "out", on_error="skip").skipped == {"unreadable_file": 1}


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("pattern", ["", "*", "b.jsonl"], ids=["folder", "glob", "name"])
def test_a_pipe_is_refused_and_told_how_to_be_read(tmp_path: Path, pattern: str, policy: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": "1"}])
    os.mkfifo(folder / "b.jsonl")
    with pytest.raises(PreprocessError, match=r"--input .*b\.jsonl: a pipe or a device, not a file.*give `--input -`"):
        build([folder / pattern], tmp_path / "out", on_error=policy)


def test_a_task_that_is_not_one_of_them_is_wrong_usage(tmp_path: Path) -> None:
    command = [*TOOL, "--input", "a.jsonl", "--output-dir", "x", "--num-tasks", "2", "--task-id", "5", *NULL]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--task-id 5" in done.stderr


def test_a_worker_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(200))
    monkeypatch.setattr(pipeline, "_keep_counters", os.abort)
    with pytest.raises(PreprocessError, match="a worker process died"):
        build_folder([path], tmp_path / "out", shard_bytes=3000, workers=2)
    monkeypatch.undo()
    build_folder([path], tmp_path / "out", shard_bytes=3000)


@pytest.mark.parametrize("numbers", [["0", "1"], ["0", "1", "1"]], ids=" ".join)
def test_tasks_side_by_side_do_not_disturb_each_other(tmp_path: Path, numbers: list[str]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(8_000))
    command = [*TOOL, "--input", str(path), "--output-dir", str(tmp_path / "out"), *NULL, "--shard-size", "100KB"]
    tasks = [
        subprocess.Popen(
            [*command, "--num-tasks", "2", "--task-id", task, "--workers", "1"],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in numbers
    ]
    told = [task.communicate()[1] for task in tasks]
    codes = [task.returncode for task in tasks]
    assert codes[0] == 0, told[0]
    # the same task twice: both may get through; where they meet at one shard, one of them is told
    assert 0 in codes[1:], told
    assert all(code == 0 or "another process is writing" in text for code, text in zip(codes, told, strict=True)), told
    build_folder([path], tmp_path / "one", shard_bytes=100_000, num_tasks=2, task_id=0)
    build_folder([path], tmp_path / "one", shard_bytes=100_000, num_tasks=2, task_id=1)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "one")


def test_tasks_that_start_at_once_with_overwrite_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(8_000))
    build_folder([path], tmp_path / "out", shard_bytes=20_000, append_eod=True)
    command = [*TOOL, "--input", str(path), "--output-dir", str(tmp_path / "out"), *NULL, "--shard-size", "20KB"]
    tasks = [
        subprocess.Popen(
            [*command, "--overwrite", "--num-tasks", "3", "--task-id", task, "--workers", "1"],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in "012"
    ]
    told = [task.communicate()[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], told
    for task in range(3):
        build_folder([path], tmp_path / "one", shard_bytes=20_000, num_tasks=3, task_id=task)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "one")


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_a_second_start_takes_nothing_from_a_first_that_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, locks: bool
) -> None:
    """It comes at every moment between two renames of the first, from the same command, on another process."""
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(20))
    build([path], tmp_path / "alone" / "p")
    monkeypatch.setattr(partial, "_PATIENCE", 0.0)
    if not locks:
        monkeypatch.setattr(partial.fcntl, "flock", _no_locks)
    mine, publish, refused = partial.partial_path, partial.HashedFile.publish, []
    # One process has one number: the first one writes under that of its parent, which is alive too.
    monkeypatch.setattr(
        partial, "partial_path", lambda final: Path(f"{final}.{partial._host()}-{os.getppid()}.partial")
    )

    def interrupted(self: partial.HashedFile) -> None:
        publish(self)
        with monkeypatch.context() as patch:
            patch.setattr(partial, "partial_path", mine)
            patch.setattr(partial.HashedFile, "publish", publish)
            if not (tmp_path / "out" / "p_text_document.manifest.json").exists():
                with pytest.raises(ConfigError, match="another process is writing") as error:
                    build([path], tmp_path / "out" / "p")
                refused.append(error)

    monkeypatch.setattr(partial.HashedFile, "publish", interrupted)
    build([path], tmp_path / "out" / "p")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "alone")
    assert len(refused) == 3


def _no_locks(_stream: object, _operation: int) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


def test_two_runs_on_one_shard_are_refused_while_the_first_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "_PATIENCE", 0.0)
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(20))
    held = partial.Ownership(str(tmp_path / "out_text_document"))
    with pytest.raises(ConfigError, match="another process is writing"):
        build([path], tmp_path / "out")
    held.release()
    build([path], tmp_path / "out")
    assert len(read_shard_by_hand(tmp_path / "out_text_document")) == 20
