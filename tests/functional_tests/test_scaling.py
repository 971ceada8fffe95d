"""The scaling benchmark's own jobs, at toy size on two processes: a row, a resume on one rank, the loss of a rank.

`python -m benchmarks.scaling --smoke` does all layouts and takes some minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling_faults import elastic_proof, lost_rank_proof, undisturbed
from benchmarks.scaling_jobs import SMOKE, Budget, Job, Layout, write_data

REPOSITORY = Path(__file__).parents[2]
LIMIT = 240.0
STEPS = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """24 steps of two ranks, a checkpoint after 12."""
    folder = tmp_path_factory.mktemp("scaling")
    plan = write_data(SMOKE, folder / "data", 2 * STEPS * 8)
    return undisturbed(SMOKE, plan, folder / "undisturbed", 2, "fp32", STEPS, 8, Budget(LIMIT))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resume_on_one_rank_sees_the_same_samples(whole: Job, tmp_path: Path) -> None:
    proof = elastic_proof(whole, Layout(1), tmp_path / "elastic", Budget(LIMIT))
    assert proof.same_samples
    assert proof.first_samples == list(range(8 * STEPS, 8 * STEPS + 8))
    assert proof.holds, proof


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loss_of_a_rank_ends_the_job_names_it_and_is_survived(whole: Job, tmp_path: Path) -> None:
    proof = lost_rank_proof(whole, tmp_path / "lost", interval=3, timeout=60.0, budget=Budget(LIMIT))
    assert proof.holds, proof
    assert "rank      : 1" in proof.message
    assert "SIGKILL" in proof.message
    assert proof.resumed_from >= 3
    assert proof.largest_difference == 0, "the same layout repeats the same sums"


@pytest.mark.distributed
def test_a_row_is_timed_once_and_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "--smoke", "--parts", "throughput", "--rows", "weak2"]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--out", str(tmp_path)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert '"row": "weak2"' not in done.stdout, "measured again"
    row = json.loads((tmp_path / "throughput.json").read_text())["rows"]["weak2"]
    assert row["tokens_per_second"] > 0
    assert 0 < row["communication_ms"] < row["milliseconds"] * 3
    assert row["mfu"] is None, "a CPU has none"
