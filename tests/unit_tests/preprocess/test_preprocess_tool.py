"""The command as a user runs it: exit codes, messages, and a SIGKILL in the middle."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_kaiyuan.preprocess import verify_manifest
from tests.unit_tests.preprocess.corpus import REPOSITORY, number_rows, read_shard_by_hand, write_jsonl

TOOL = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py")]
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_done_is_zero_and_tells_what_was_written_and_skipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*number_rows(3), {"text": ""}])
    flags = ["--score-key", "score", "--score-key", "metadata.quality", "--on-error", "skip", "--append-eod"]
    done = run(
        "--input", path, "--output-prefix", tmp_path / "out", *NULL, *flags, "--workers", "2", "--log-interval", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "out_text_document: 3 documents" in done.stdout
    assert "skipped 1 of 4 rows: missing_score" in done.stdout
    assert "tokenizing: 3 documents" in done.stderr
    assert verify_manifest(str(tmp_path / "out_text_document")).documents == 3


def test_a_mistake_is_one_line_and_exit_code_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(3))
    assert run("--input", path, "--output-prefix", tmp_path / "out", *NULL, "--workers", "1").returncode == 0
    other = ["--input", path, "--output-prefix", tmp_path / "out", *NULL, "--append-eod"]
    refused = run(*other)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: output:")
    assert "--overwrite" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run(*other, "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--num-tasks", "2", "--task-id", "5"], "--num-tasks 2: tasks share a folder"),
        (["--output-prefix", ""], "--output-prefix '': names nothing"),
        (["--tokenizer-type", "TikTokenizer"], "--tokenizer-model is missing"),
    ],
)
def test_wrong_usage_is_exit_code_two(tmp_path: Path, flags: list[str], message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(3))
    refused = run("--input", path, "--output-prefix", tmp_path / "out", *NULL, *flags)
    assert refused.returncode == 2
    assert f"error: {message}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_a_piped_dev_stdin_is_refused(tmp_path: Path) -> None:
    command = " ".join([*TOOL, "--input", "/dev/stdin", "--output-prefix", str(tmp_path / "out"), *NULL])
    refused = subprocess.run(
        ["bash", "-c", f"echo '{{}}' | {command}"], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert refused.returncode == 1
    assert "--input /dev/stdin: a pipe or a device" in refused.stderr
    assert "`--input -`" in refused.stderr


def test_the_same_command_again_has_nothing_to_do(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(3))
    command = ["--input", path, "--output-prefix", tmp_path / "out", *NULL, "--workers", "1"]
    assert run(*command).returncode == 0
    before = {name.name: name.stat().st_mtime_ns for name in tmp_path.iterdir()}
    again = run(*command)
    assert again.returncode == 0
    assert "1 complete already" in again.stdout
    assert {name.name: name.stat().st_mtime_ns for name in tmp_path.iterdir()} == before


def test_a_killed_run_shows_no_final_name_and_leaves_no_process(tmp_path: Path) -> None:
    rows = number_rows(25_000)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    command = [*TOOL, "--input", str(path), "--output-prefix", str(out / "p"), *NULL, "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 30
    while not list(out.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.random() * 0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed; give it more rows"
    assert [path.name for path in out.iterdir() if not path.name.endswith(".partial")] == []
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True).returncode == 0
    assert list(out.glob("*.partial")) == []
    assert len(read_shard_by_hand(out / "p_text_document")) == len(rows)
