"""Who holds a save folder, and how a start decides whether the holder still lives."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_kaiyuan.checkpoints import hold
from megatron_kaiyuan.checkpoints.hold import HOLD_NAME, Holder, hold_folder, release_holds, taken_by
from megatron_kaiyuan.errors import ResumeError

REPOSITORY = Path(__file__).parents[3]
HOLD = """
import sys, time
from pathlib import Path
from megatron_kaiyuan.checkpoints.hold import hold_folder, release_holds
from megatron_kaiyuan.errors import ResumeError
try:
    hold_folder(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
    release_holds()
except ResumeError as error:
    print(error, flush=True)
"""


@pytest.fixture(autouse=True)
def own_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hold, "_holds", {})


def start(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    while (line := process.stdout.readline()).startswith("> "):
        pass
    return line.strip()


def put(folder: Path, holder: Holder) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / HOLD_NAME
    path.write_text(json.dumps(asdict(holder)))
    return path


def elsewhere(**changes: object) -> Holder:
    return replace(Holder.of_this_process(), **{"host": "n7", "boot": "another machine", **changes})


def test_a_second_run_is_told_who_holds_the_folder_until_it_is_released(tmp_path: Path) -> None:
    with start(tmp_path / "saved") as first:
        assert told(first) == "held"
        with start(tmp_path / "saved") as second:
            refusal = told(second)
        assert f"--save {tmp_path / 'saved'} is in use by another run: process {first.pid} on host" in refusal
        assert ", since 20" in refusal
        assert f"kill -TERM {first.pid}" in refusal
        first.communicate("", timeout=10)
    with start(tmp_path / "saved") as third:
        assert told(third) == "held"
        third.communicate("", timeout=10)
    assert list((tmp_path / "saved").iterdir()) == []


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path) -> None:
    with start(tmp_path) as first:
        assert told(first) == "held"
        first.kill()
    began = time.monotonic()
    held = hold_folder(tmp_path)
    assert time.monotonic() - began < 2
    assert held.taken_by() is None
    release_holds()


def test_a_process_of_the_same_number_that_started_later_is_not_the_holder(tmp_path: Path) -> None:
    put(tmp_path, replace(Holder.of_this_process(), process_start=1))
    began = time.monotonic()
    hold_folder(tmp_path)
    assert time.monotonic() - began < 2
    release_holds()


@pytest.mark.parametrize("content", ["", '{"token": 1'], ids=["empty", "torn"])
def test_a_file_that_a_crash_tore_is_watched_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(hold, "_PATIENCE_SECONDS", 2.0)
    (tmp_path / HOLD_NAME).write_text(content)
    began = time.monotonic()
    hold_folder(tmp_path)
    assert 1.5 < time.monotonic() - began < 4
    assert json.loads((tmp_path / HOLD_NAME).read_text())["process"] == os.getpid()
    release_holds()


@pytest.mark.parametrize("beats", [True, False])
def test_another_host_lives_if_it_touches_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, beats: bool
) -> None:
    monkeypatch.setattr(hold, "_PATIENCE_SECONDS", 3.0)
    path = put(tmp_path, elsewhere())
    if beats:
        threading.Timer(1.0, os.utime, [path]).start()
        with pytest.raises(ResumeError, match=r"process \d+ on host n7, since .* on n7\)"):
            hold_folder(tmp_path)
        assert json.loads(path.read_text())["host"] == "n7"
    else:
        hold_folder(tmp_path)
        assert json.loads(path.read_text())["host"] != "n7"
        release_holds()


def test_a_holder_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "_BEAT_SECONDS", 0.05)
    hold_folder(tmp_path)
    before = (tmp_path / HOLD_NAME).stat().st_mtime_ns
    time.sleep(0.5)
    assert (tmp_path / HOLD_NAME).stat().st_mtime_ns > before
    release_holds()


@pytest.mark.parametrize(
    ("squeue", "restarts", "proof"),
    [
        ("echo RUNNING", (0, 0), ""),
        ("echo COMPLETING", (0, 0), ""),
        ("echo TIMEOUT", (0, 0), "Slurm says TIMEOUT of the job"),
        ("echo PENDING", (0, 0), "Slurm says PENDING of the job"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", (0, 0), ""),
        ("true", (0, 0), ""),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", (0, 0), ""),
        ("exit 9", (0, 1), "Slurm has started the job again"),
        ("exit 9", (1, 0), ""),
    ],
)
def test_slurm_decides_where_it_knows_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, restarts: tuple[int, int], proof: str
) -> None:
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\n{squeue}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    other = elsewhere(job="77@cluster", job_restart=restarts[0])
    me = replace(Holder.of_this_process(), job="77@cluster", job_restart=restarts[1])

    assert hold._why_dead(other, me) == proof


@pytest.mark.parametrize("job", ["77@here", ""], ids=["of another cluster", "outside of Slurm"])
def test_slurm_is_not_asked_for_a_job_of_another_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\necho TIMEOUT\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    me = replace(Holder.of_this_process(), job=job)

    assert hold._why_dead(elsewhere(job="77@there"), me) == ""


def test_a_holder_that_was_taken_for_dead_detects_it_and_leaves_the_other_alone(tmp_path: Path) -> None:
    held = hold_folder(tmp_path)
    assert taken_by(tmp_path) is None
    other = elsewhere()
    path = put(tmp_path, other)

    assert held.taken_by() == other
    assert taken_by(tmp_path) == other
    release_holds()
    assert path.exists()


def test_two_starts_that_find_a_dead_holder_do_not_both_hold(tmp_path: Path) -> None:
    """The slower one has read the dead holder's file when the faster one has already replaced it."""
    dead = replace(Holder.of_this_process(), process_start=1)
    faster = elsewhere()
    path = put(tmp_path, faster)

    hold._remove(path, dead)

    assert Holder(**json.loads(path.read_text())) == faster
    assert [found.name for found in tmp_path.iterdir()] == [HOLD_NAME]


def test_many_starts_at_once_make_one_holder(tmp_path: Path) -> None:
    put(tmp_path, replace(Holder.of_this_process(), process_start=1))
    processes = [start(tmp_path) for _ in range(6)]
    answers = [told(process) for process in processes]
    for process in processes:
        process.communicate("", timeout=10)

    assert sum(answer == "held" for answer in answers) == 1
    assert sum("is in use by another run" in answer for answer in answers) == 5


def test_a_file_system_without_links_makes_one_holder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    me = Holder.of_this_process()

    assert hold._create(tmp_path / HOLD_NAME, me)
    assert not hold._create(tmp_path / HOLD_NAME, Holder.of_this_process())
    assert [found.name for found in tmp_path.iterdir()] == [HOLD_NAME]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match=r"--save .* cannot be written: .*; mend it or name another folder"):
        hold_folder(tmp_path / "file" / "saved")


def test_the_fields_are_plain_data() -> None:
    holder = Holder.of_this_process()
    assert Holder(**json.loads(json.dumps(asdict(holder)))) == holder
    assert {type(value) for value in asdict(holder).values()} == {str, int}
    assert holder.boot
    assert holder.process_start
    assert dataclasses.is_dataclass(holder)
