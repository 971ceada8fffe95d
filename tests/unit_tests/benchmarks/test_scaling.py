"""What the scaling benchmark concludes from traces, logs and recorded samples, and the arithmetic of its projection."""

import argparse
import gzip
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling import measured_from, rows_for, throughput
from benchmarks.scaling_faults import Elastic, lines_that_name, loss_tolerance, recorded_steps, resume_layouts
from benchmarks.scaling_jobs import FULL, SMOKE, Budget, Job, Layout, communication_of, read_steps, write_data
from benchmarks.scaling_model import Measured, Network, as_json, load_measured, project
from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import StudyError


def kernel(name: str, start: float, length: float, category: str = "kernel") -> dict[str, Any]:
    return {"name": name, "cat": category, "ts": start, "dur": length, "ph": "X"}


def write_trace(path: Path, events: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as stream:
        json.dump({"traceEvents": events}, stream)
    return path


def test_the_exposed_part_of_collectives_is_what_no_other_kernel_covers(tmp_path: Path) -> None:
    """Microseconds: collectives 0-100, 90-150 (union 150) and 300-400; others 50-120 and 350-500. Hidden: 70 and 50."""
    events = [
        kernel("ncclDevKernel_ReduceScatter", 0, 100), kernel("ncclDevKernel_AllGather", 90, 60),
        kernel("ncclDevKernel_AllReduce", 300, 100), kernel("gemm", 50, 70), kernel("Memcpy", 350, 150, "gpu_memcpy"),
        kernel("aten::add", 0, 1000, "cpu_op"), {"name": "mark", "ph": "i", "ts": 3},
    ]  # fmt: skip
    found = communication_of(write_trace(tmp_path / "trace.json.gz", events), steps=2)
    assert found.milliseconds == pytest.approx(0.250 / 2)
    assert found.exposed == pytest.approx(0.130 / 2)


def test_without_a_gpu_gloos_calls_are_counted_and_all_exposed(tmp_path: Path) -> None:
    events = [kernel("gloo:all_reduce", 0, 40, "user_annotation"), kernel("aten::mm", 10, 20, "cpu_op")]
    found = communication_of(write_trace(tmp_path / "trace.json.gz", events), steps=1)
    assert (found.milliseconds, found.exposed) == (pytest.approx(0.04), pytest.approx(0.04))


def test_the_median_leaves_out_warm_up_and_profiled_steps(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    times = [900, 30, 10, 20, 30, 500]
    lines = [
        f" iteration {n:8d}/ 6 | elapsed time per iteration (ms): {ms:.1f} |" for n, ms in enumerate(times, start=1)
    ]
    log.write_text("\n".join([*lines, "max allocated: 2048.00", "max allocated: 1024.00"]))
    assert read_steps(log, warm_up=2, last=5) == {"milliseconds": 20.0, "peak_gib": 2.0}
    with pytest.raises(StudyError, match="no step between"):
        read_steps(log, warm_up=6, last=9)


def test_steps_are_put_together_from_what_the_ranks_read(tmp_path: Path) -> None:
    """Two data-parallel ranks, each with two of the four samples of a step; a rank that loads nothing has no lines."""
    for rank, numbers in enumerate(([0, 1, 4, 5, 8], [2, 3, 6, 7], [])):
        (tmp_path / f"rank{rank}-7.txt").write_text("".join(f"{number}\n" for number in numbers))
    assert recorded_steps(tmp_path, 4, 2, 2) == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    with pytest.raises(StudyError, match=r"rank0-7\.txt: 5 samples, but 3 steps of 2"):
        recorded_steps(tmp_path, 4, 2, 3)


def test_a_resume_holds_only_with_equal_samples_and_close_losses() -> None:
    proof = Elastic("DP 1", 1, 20, True, [0], 1e-6, 0.0, 1e-5)
    assert proof.holds
    assert not replace(proof, same_samples=False).holds
    assert not replace(proof, largest_difference=2e-5).holds


def test_the_tolerance_is_the_formula_of_its_docstring() -> None:
    """2 x 2^-10 x 1e-4 x 20 x sqrt(1e8) x 1.5 + 2^-10 x 8 = 0.0586 + 0.0078."""
    assert loss_tolerance("fp16", 20, 10**8, 1.5, 8.0) == pytest.approx(0.05859375 + 0.0078125)


def test_the_rank_is_found_in_torchruns_summary(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("rank 1 says\n[0]:\n  host : a\n  rank      : 11 (local_rank: 3)\n  exitcode : 1\n")
    assert lines_that_name(1, log) == []
    log.write_text(
        "Root Cause\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 4)\n  error_file: <N/A>\n  traceback"
    )
    assert lines_that_name(1, log)[:2] == ["rank      : 1 (local_rank: 1)", "exitcode  : -9 (pid: 4)"]


@pytest.mark.parametrize(
    ("processes", "expected"), [(2, [(2, 2, 1), (1, 1, 1)]), (4, [(2, 2, 1), (1, 1, 1)]), (8, [(4, 2, 2), (2, 1, 2)])]
)
def test_a_run_is_resumed_on_half_the_ranks_and_on_a_quarter(
    processes: int, expected: list[tuple[int, int, int]]
) -> None:
    assert [(part.processes, part.tensor, part.data) for part in resume_layouts(processes)] == expected


def test_eight_gpus_are_timed_in_every_layout_once() -> None:
    rows = rows_for(8, samples=16)
    assert len({row.key for row in rows}) == len(rows)
    assert len({(row.layout, row.global_batch) for row in rows}) == len(rows)
    weak = {row.layout.data: row.global_batch for row in rows if row.key.startswith("weak")}
    assert weak == {1: 16, 2: 32, 4: 64, 8: 128}
    # two GPUs of strong scaling are the row weak2
    assert {row.layout.data: row.global_batch for row in rows if row.key.startswith("strong")} == {1: 32, 4: 32, 8: 32}
    assert [row.layout.name for row in rows if row.key in ("tensor", "pipeline")] == ["DP 4 x TP 2", "DP 4 x PP 2"]
    switches = {(row.layout.distributed_optimizer, row.layout.overlap) for row in rows if row.layout.data == 8}
    assert len(switches) == 4
    assert [row.key for row in rows_for(1, 16)] == ["weak1", "strong1"]


def test_flags_and_multicast_of_a_job(tmp_path: Path) -> None:
    job = Job(SMOKE, Layout(4, tensor=2, overlap=False), tmp_path / "plan.yaml", tmp_path, 2, 8, 10, "fp32")
    command = " ".join(job.command())
    assert "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --use-distributed-optimizer" in command
    assert "overlap" not in command
    assert "--overlap-grad-reduce --overlap-param-gather" in " ".join(replace(job, layout=Layout(4)).command())
    replicated = " ".join(replace(job, layout=Layout(4, distributed_optimizer=False)).command())
    assert "--overlap-grad-reduce" in replicated
    assert "param-gather" not in replicated
    assert job.environment()["NCCL_NVLS_ENABLE"] == "0"


def test_the_full_shape_is_that_of_the_report() -> None:
    """What benchmarks/training_throughput.py counts for the stock model, and the two output norms of each layer."""
    everything = 2_031_739_904 + 28 * 2 * 2048
    assert FULL.parameters == everything
    matrices = 6 * (everything - 151_936 * 2048)
    assert FULL.flops_per_token == matrices + 12 * 28 * 2048 * 4096 / 2


def test_the_invented_data_fill_the_plan(tmp_path: Path) -> None:
    plan = write_data(SMOKE, tmp_path, samples=500)
    assert len(CurriculumDataset(Plan.load(plan))) == 500


MEASURED = Measured(
    parameters=10**9,
    micro_batch_tokens=8192,
    micro_batch_seconds=0.3,
    step_overhead_seconds=0.1,
    host_bytes_per_second=200e9,
    gpus_per_node=8,
    hidden_share=0.5,
    flops_per_token=6e9,
)


def test_one_node_by_hand() -> None:
    """R = 4e9 x 7/8 / 200e9 = 17.5 ms of which 0.5 x 2/3 x 300 = 100 ms can hide; A likewise: nothing is exposed."""
    [one] = project(MEASURED, Network(25e9, 0.0), [1], micro_batches=4)
    assert (one.gpus, one.exposed_seconds, one.efficiency) == (8, 0.0, 1.0)
    assert one.seconds == pytest.approx(4 * 0.3 + 0.1)
    assert one.tokens_per_second == pytest.approx(8 * 4 * 8192 / 1.3)
    assert one.model_flops_per_gpu == pytest.approx(4 * 8192 / 1.3 * 6e9)


def test_a_slow_network_by_hand() -> None:
    """8 nodes, 64 GPUs, 10 GB/s, 100 us a hop, 2 buckets: R = 4e9 x 63/64 / 1e10 + 63 x 2 x 1e-4 = 0.40635, less 0.1;
    A = 2e9 x 63/64 / 1e10 + 0.0126 = 0.209475, less 0.05."""
    [eight] = project(MEASURED, Network(10e9, 1e-4, bucket_bytes=2e9), [8], micro_batches=4)
    assert eight.exposed_seconds == pytest.approx(0.30635 + 0.159475)
    assert eight.efficiency == pytest.approx(1.3 / (1.3 + 0.465825))


def test_strong_scaling_shares_the_step_and_refuses_what_does_not_divide() -> None:
    rows = project(MEASURED, Network(1e15, 0.0), [1, 2, 4], micro_batches=1, total_micro_batches=64)
    assert [row.micro_batches for row in rows] == [8, 4, 2]
    with pytest.raises(StudyError, match="64 micro-batches cannot be shared by 24 GPUs"):
        project(MEASURED, Network(1e15, 0.0), [3], 1, 64)


def test_measured_values_are_read_back_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(as_json(MEASURED))
    assert load_measured(path) == MEASURED
    told = json.loads(path.read_text())
    for change, message in (({"more": 1}, "unknown \\['more'\\]"), ({"hidden_share": 2}, "a share"),
                            ({"parameters": 0}, "above 0")):  # fmt: skip
        path.write_text(json.dumps(told | change))
        with pytest.raises(StudyError, match=message):
            load_measured(path)
    path.write_text("{")
    with pytest.raises(StudyError, match=r"measured\.json cannot be read"):
        load_measured(path)


def test_rows_of_another_number_of_gpus_are_not_gone_on_with(tmp_path: Path) -> None:
    """`exposed` of four would be taken for that of eight."""
    args = argparse.Namespace(
        smoke=True, samples=None, rows="weak2", processes=2, steps=4, out=tmp_path, micro_batch_size=None
    )
    known = {"device": "CPU", "processes": 4, "shape": "smoke", "micro_batch": 2, "steps": 4, "samples": 4}
    (tmp_path / "throughput.json").write_text(json.dumps({"setting": known, "rows": {}}))
    with pytest.raises(StudyError, match=r"was measured with .*'processes': 4.*'processes': 2.*name another --out"):
        throughput(args)


def test_what_a_projection_needs_follows_from_the_rows() -> None:
    """One GPU: 4 micro-batches take 1.3 s, 8 take 2.5 s: 0.3 s each and 0.1 s beside them."""
    setting = {"device": "a GPU", "micro_batch": 4, "shape": "", "samples": 16}
    rows = {
        "weak1": {"milliseconds": 1300.0, "global_batch": 16},
        "strong1": {"milliseconds": 2500.0, "global_batch": 32},
        "weak2": {"milliseconds": 1400.0, "communication_ms": 100.0, "exposed_ms": 40.0},
        "exposed": {"milliseconds": 1500.0, "communication_ms": 50.0},
    }
    found = measured_from({"setting": setting, "rows": rows}, 2)
    assert found is not None
    assert found.micro_batch_seconds == pytest.approx(0.3)
    assert found.step_overhead_seconds == pytest.approx(0.1)
    assert found.hidden_share == pytest.approx(0.060 / 0.3)
    assert found.host_bytes_per_second == pytest.approx(6 * FULL.parameters / 2 / 0.050)
    assert measured_from({"setting": setting | {"device": "CPU"}, "rows": rows}, 2) is None
    assert measured_from({"setting": setting, "rows": {**rows, "weak1": {"error": "out of memory"}}}, 2) is None


def test_no_job_starts_without_a_third_of_its_limit_or_outlives_the_call() -> None:
    soon = Budget(limit=150, deadline=time.monotonic() + 60)
    assert 59 < soon.seconds() <= 60
    soon.require(1, "a row")
    with pytest.raises(StudyError, match=r"lost: not started: (59|60) s are left, it needs 100 s"):
        soon.require(2, "lost")
    assert Budget(limit=150).seconds() == 150


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layouts whose proof was run; that of one rank fails at first."""
    tried: list[str] = []

    def elastic_proof(_whole: Job, layout: Layout, _folder: Path, _budget: Budget) -> Elastic:
        tried.append(layout.name)
        if layout == Layout(1) and tried.count("DP 1") == 1:
            raise StudyError("it did not end")
        return Elastic(layout.name, layout.processes, 20, True, [0], 0.0, 0.0, 1.0)

    def lost_rank_proof(*_: object) -> None:
        raise StudyError("it hung")

    monkeypatch.setattr(scaling, "elastic_proof", elastic_proof)
    monkeypatch.setattr(scaling, "lost_rank_proof", lost_rank_proof)
    monkeypatch.setattr(scaling, "proof_run", lambda _args: None)
    return tried


def test_a_proof_that_holds_is_kept_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proven: list[str]
) -> None:
    told = ["--smoke", "--parts", "elastic,lost", "--processes", "2", "--out", str(tmp_path), "--minutes", "9"]
    monkeypatch.setattr(sys, "argv", ["", *told, "--tar", str(tmp_path / "packed.tgz")])
    with pytest.raises(StudyError) as told_first:
        scaling.main()
    assert str(told_first.value).splitlines() == ["elastic: it did not end", "lost: it hung"]
    assert (tmp_path / "packed.tgz").is_file()
    with pytest.raises(StudyError, match=r"^lost: it hung$"):
        scaling.main()
    assert proven == ["DP 1 x TP 2", "DP 1", "DP 1"]
    monkeypatch.setattr(sys, "argv", ["", *told, "--proof-steps", "10"])
    with pytest.raises(StudyError, match=r"elastic\.json: is of"):
        scaling.main()
