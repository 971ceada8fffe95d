"""What the throughput benchmark runs, keeps and concludes; nothing is trained here."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from benchmarks.benchmark_data import large_plan, plan_digest, require_shards
from benchmarks.packing import pack
from benchmarks.scaling_jobs import default_micro_batch, stop_family
from benchmarks.throughput_report import monitor_cost, print_table, read_row
from benchmarks.throughput_rows import GROUPS, ROWS, TINY, Row
from benchmarks.training_throughput import Session, chosen_rows, search_path
from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import StudyError
from tests.unit_tests.data.tiny import write_shard

LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-X", "faulthandler", "-c", sys.argv[1]], start_new_session=True)
print(rank.pid, flush=True)
rank.wait()
"""
RANK = """
import time
def waits_for_a_collective():
    time.sleep(60)
print("up", flush=True)
waits_for_a_collective()
"""


def test_a_stopped_job_leaves_no_rank_and_says_where_it_stood(tmp_path: Path) -> None:
    """As under torchrun, the rank has a session of its own, so that a signal to the launcher's group misses it."""
    log = tmp_path / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], stdout=stream, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while "up" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        rank = psutil.Process(int(log.read_text().split()[0]))
        stop_family(process, grace=20)
    assert not rank.is_running()
    assert process.poll() is not None
    assert "waits_for_a_collective" in log.read_text()


@pytest.mark.parametrize(("gibibytes", "expected"), [(79, 2), (139, 4)])
def test_the_micro_batch_fits_the_gpu(monkeypatch: pytest.MonkeyPatch, gibibytes: int, expected: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = SimpleNamespace(total_memory=gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: found)
    assert default_micro_batch() == expected


def step(number: int, milliseconds: float, *, skipped: bool = False) -> str:
    loss = "" if skipped else " lm loss: 1.1E+01 |"
    return f" iteration {number:8d}/ 40 | elapsed time per iteration (ms): {milliseconds} |{loss} loss scale: 65536.0 |"


def test_a_row_is_read_from_its_log_and_its_metrics(tmp_path: Path) -> None:
    """Memory is the largest of all steps, skips are those of metrics.jsonl, the first four steps are warm-up."""
    log, metrics = tmp_path / "row.log", tmp_path / "row.jsonl"
    lines = [step(1, 900, skipped=True), *(step(n, 10 * n) for n in range(2, 9))]
    lines += ["number of skipped iterations: 1", "number of skipped iterations: 1"]
    log.write_text("\n".join([*lines, "max allocated: 1024.00", "max allocated: 3072.00", "max allocated: 2048.00"]))
    metrics.write_text("".join(json.dumps({"iteration": n, "skipped_steps": int(n == 1)}) + "\n" for n in range(1, 9)))
    found = read_row(log, metrics, TINY)
    assert (found["milliseconds"], found["peak_gib"], found["skipped"], found["steps"]) == (65.0, 3.0, 1, 7)
    assert found["tokens_per_second"] == pytest.approx(16 * 64 / 0.065)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate\nChildFailedError: x",
            "out of memory",
        ),
        ("[rank0]: TypeError: no float\nE1 torchrun failed\ntorch.ChildFailedError: x", "TypeError: no float"),
    ],
)
def test_a_row_without_numbers_names_its_first_error(tmp_path: Path, said: str, expected: str) -> None:
    (tmp_path / "row.log").write_text(step(1, 10) + "\n" + said)
    assert read_row(tmp_path / "row.log", tmp_path / "row.jsonl", TINY) == {"error": expected}


def test_one_call_gives_the_headline_and_keys_are_unique() -> None:
    assert [row.key for row in GROUPS["headline"]] == ["stocktorch", "stock", "ours", "oursbf", "te", "testock"]
    assert list(ROWS[:6]) == list(GROUPS["headline"])
    assert [row.key for row in chosen_rows("engine,headline")][:2] == ["te", "testock"]
    assert len({row.key for row in chosen_rows("engine,headline")}) == len(chosen_rows("engine,headline"))
    assert not GROUPS.keys() & {row.key for row in ROWS}, "a key would hide a group"
    with pytest.raises(StudyError, match="nothing is unknown"):
        chosen_rows("ours,nothing")


def test_each_row_says_which_layers_it_has() -> None:
    """Without the flag the script falls back on local layers where Transformer Engine is missing."""
    layers = {row.key: row.flags[row.flags.index("--transformer-impl") + 1] for row in ROWS}
    named_te = {key for key, layer in layers.items() if layer == "transformer_engine"}
    assert named_te == {"te", "testock", "tebf", "terecswiglu", "teunscaled"}
    assert {row.key for row in ROWS if row.engine} == named_te | {"oursteadam", "stockteadam"}


def test_local_rows_do_not_find_transformer_engine(tmp_path: Path) -> None:
    site, other = tmp_path / "te_site", tmp_path / "other"
    (site / "transformer_engine").mkdir(parents=True)
    inherited = os.pathsep.join([str(site), str(other)])
    local, engine = Row("local", "local"), Row("engine", "engine", engine=True)
    assert search_path(local, site, inherited).split(os.pathsep)[1:] == [str(other)]
    assert search_path(engine, site, str(other)).split(os.pathsep)[1:] == [str(site), str(other)]


def session(folder: Path, **changed: Any) -> Session:
    told = {
        "logs": folder, "smoke": True, "plan": None, "steps": 9, "micro_batch_size": None, "tar": None, "limit": 500.0,
        "row_seconds": 110.0, "te_site": None, "at_once": 1,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    found = Session(argparse.Namespace(**(told | changed)), TINY)
    found.prepare([])
    return found


def test_finished_rows_are_kept_and_failed_ones_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("good", "good"), Row("large", "too large"), Row("bad", "bad")]
    outcomes: dict[str, dict[str, Any]] = {
        "good": {"milliseconds": 1.0},
        "large": {"error": "out of memory"},
        "bad": {"error": "TypeError: x"},
    }
    tried: list[str] = []

    def outcome(_self: Session, row: Row, _gpu: int) -> dict[str, Any]:
        tried.append(row.key)
        return {"optimizer": "torch.optim.AdamW"} | outcomes[row.key]

    monkeypatch.setattr(Session, "outcome", outcome)
    for _ in range(2):
        again = session(tmp_path, tar=tmp_path / "packed.tgz")
        for row in rows:
            again.measure(row)
    assert tried == ["good", "large", "bad", "bad"]
    assert (tmp_path / "packed.tgz").stat().st_size
    with pytest.raises(StudyError, match="name another --logs"):
        again.measure(Row("good", "good", flags=("--other",)))
    with pytest.raises(StudyError, match="was measured with"):
        session(tmp_path, micro_batch_size=4)


def test_a_row_of_transformer_engine_fails_where_it_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = session(tmp_path)
    found = {"optimizer": "torch.optim.AdamW", "engine_error": "ImportError: no libcublas"}
    monkeypatch.setattr(Session, "found_by", lambda _self, _row: found)
    monkeypatch.setattr(Session, "run", lambda *_: pytest.fail("it must not be started"))
    error = here.outcome(Row("te", "te", engine=True), 0)["error"]
    assert error == "needs Transformer Engine (--te-site): ImportError: no libcublas"


def test_a_broken_transformer_engine_costs_its_own_rows_alone(tmp_path: Path) -> None:
    """Of other errors than ImportError, Megatron's import dies; what local rows find is read as ever."""
    broken = tmp_path / "te_site" / "transformer_engine"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('built for another torch')")
    here = session(tmp_path / "logs", te_site=broken.parent)
    assert here.outcome(Row("te", "te", engine=True), 0)["error"].endswith("RuntimeError: built for another torch")
    assert here.found_by(Row("ours", "ours"))["optimizer"].startswith("torch.optim.")


def test_no_row_starts_that_could_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = session(tmp_path, limit=100.0)
    monkeypatch.setattr(Session, "run", lambda *_: pytest.fail("it must not be started"))
    here.longest = 90.0
    assert "not started" in here.outcome(Row("ours", "ours"), 0)["error"]


def test_rows_at_once_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, gpus = threading.Barrier(2), []

    def outcome(_self: Session, row: Row, gpu: int) -> dict[str, Any]:
        both.wait(timeout=20)  # of four rows, two at a time
        gpus.append(gpu)
        both.wait(timeout=20)
        return {"optimizer": "", "milliseconds": 1.0}

    monkeypatch.setattr(Session, "outcome", outcome)
    here = session(tmp_path, at_once=2)
    rows = [Row(f"row{number}", "") for number in range(4)]
    here.measure_all(rows)
    assert sorted(gpus[:2]) == sorted(gpus[2:]) == [0, 1]
    written = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert sorted(result["key"] for result in written) == [row.key for row in rows]
    variables = [here.environment(rows[0], gpu) for gpu in (0, 1)]
    assert [found["CUDA_VISIBLE_DEVICES"] for found in variables] == ["0", "1"]
    assert variables[0]["MASTER_PORT"] != variables[1]["MASTER_PORT"]


@pytest.mark.parametrize("wanted", [0, 5])
def test_more_rows_at_once_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(StudyError, match=f"--at-once {wanted}: from 1 to the number of GPUs, 4"):
        session(tmp_path, at_once=wanted)


def test_another_plan_is_another_setting(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("seq_length: 64\n")
    first = plan_digest(plan)
    plan.write_text("seq_length: 128\n")
    assert plan_digest(plan) != first
    assert plan_digest(None) == "none"


def test_the_monitors_cost_is_derived_from_two_rows() -> None:
    """A metered step takes 20 ms more: 0.2 ms a step at interval 100, of 1 000."""
    rows = [{"key": "nomonitor", "milliseconds": 1000.0}, {"key": "monitor1", "milliseconds": 1020.0}]
    assert monitor_cost(rows)[0].endswith("+0.200 ms a step, +0.020%.")
    assert monitor_cost(rows[:1]) == []


def test_the_table_names_micro_batch_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"key": "mb16", "name": "large", "micro_batch": 16, "optimizer": "torch.optim.adamw.AdamW"}
    print_table([row | {"error": "out of memory"}, row | {"error": "[rank0]: TypeError: x"}], TINY, "CPU")
    printed = capsys.readouterr().out
    assert "torch AdamW" in printed
    assert "out of memory" in printed
    assert "mb16: [rank0]: TypeError: x" in printed


def test_missing_shards_are_named_before_anything_runs(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"sources: {{a: {{shards: {tmp_path}/a}}, b: {{shards: [{tmp_path}/b]}}}}\n")
    write_shard(tmp_path / "a", [[1, 2]])
    with pytest.raises(StudyError, match=f"no shards at {tmp_path}/b; `make demo` builds"):
        require_shards(plan)
    write_shard(tmp_path / "b", [[1, 2]])
    require_shards(plan)


def test_the_large_shard_has_its_size_and_is_written_once(tmp_path: Path) -> None:
    plan = large_plan(tmp_path, 64, 1000, gigabytes=0.002, samples=500)
    data = tmp_path / "large.bin"
    assert data.stat().st_size == pytest.approx(0.002e9, rel=0.1)
    written = data.stat().st_mtime_ns
    samples = CurriculumDataset(Plan.load(large_plan(tmp_path, 64, 1000, gigabytes=0.002, samples=500)))
    assert data.stat().st_mtime_ns == written
    assert len(samples) == 500
    assert plan.is_file()


def test_only_files_that_exist_are_packed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    pack(tmp_path / "out" / "all.tgz", tmp_path, [tmp_path / "a.json", tmp_path / "b.json"])
    listed = subprocess.run(["tar", "tzf", tmp_path / "out" / "all.tgz"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == ["a.json"]
