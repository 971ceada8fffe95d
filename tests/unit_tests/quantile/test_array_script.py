"""The job array's script gives a task its own share however the array was submitted; the tool is a stand-in."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


def submitted(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as Slurm would run one task of an array, with a tool that prints its arguments."""
    python = folder / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    variables = {"PATH": os.environ["PATH"], "PYTHON": str(python), "STUDY": "s.yaml"} | environment
    script = ["bash", "examples/quantile/train.sbatch"]
    return subprocess.run(script, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("array", "count"), [("0-9", "10"), ("3", "1"), ("3,7", "2")])
def test_a_task_keeps_its_share_when_it_is_submitted_again(tmp_path: Path, array: str, count: str) -> None:
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": count, "SLURM_ARRAY_TASK_MIN": array[0]}
    shown = submitted(tmp_path, NUM_TASKS="10", **slurm)
    assert shown.returncode == 0, shown.stderr
    train, evaluate = shown.stdout.splitlines()
    assert train == "tools/quantile_benchmark.py train s.yaml --task-id 3 --num-tasks 10 --concurrent 1"
    assert evaluate == "tools/quantile_benchmark.py evaluate s.yaml --task-id 3 --num-tasks 10"


def test_an_array_without_its_size_is_refused(tmp_path: Path) -> None:
    shown = submitted(tmp_path, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="1", SLURM_ARRAY_TASK_MIN="3")
    assert shown.returncode != 0
    assert "NUM_TASKS: the number of tasks" in shown.stderr
    assert shown.stdout == ""
