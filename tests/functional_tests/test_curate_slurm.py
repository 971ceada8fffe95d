"""examples/curate with datatrove's Slurm executor in a real Slurm: a stage fails, and the same command goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megatron_kaiyuan.data import open_source
from tests.functional_tests.local_slurm import LocalSlurm, local_slurm, missing_programs
from tests.unit_tests.curate.test_curate import CURATE_PYTHON, FOLDER, needs_datatrove, train_classifier, write_raw
from tests.unit_tests.preprocess.corpus import save_bpe

pytestmark = [
    needs_datatrove,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no {', '.join(missing_programs())}; tools/dev/install_test_tools.sh installs Slurm",
    ),
]


def submit(slurm: LocalSlurm, folder: Path, label: str) -> None:
    """Submit all stages, and wait until the queue is empty."""
    flags = ["--input", folder / "raw", "--output", folder / "out", "--tokenizer", folder / "tokenizer"]
    flags += ["--model", folder / "q.bin", "--label", label, "--project-python", sys.executable, "--tasks", "2"]
    flags += ["--executor", "slurm", "--partition", "all", "--time", "00:10:00", "--workers", "8"]
    command = [str(CURATE_PYTHON), str(FOLDER / "curate.py"), *map(str, flags)]
    told = subprocess.run(command, env=slurm.environment, cwd=folder, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    deadline = time.monotonic() + 240
    while queue := slurm.run("squeue", "--noheader", "--format=%i %j %T %r"):
        assert time.monotonic() < deadline, queue
        time.sleep(0.5)


def failed_stages(slurm: LocalSlurm) -> set[str]:
    jobs = [dict(field.split("=", 1) for field in line.split() if "=" in field)
            for line in slurm.run("scontrol", "-o", "show", "job").splitlines()]  # fmt: skip
    return {job["JobName"] for job in jobs if job["JobState"] == "FAILED"}


def test_stages_are_submitted_and_go_on_after_one_that_failed(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    save_bpe(tmp_path / "tokenizer")
    train_classifier(tmp_path)
    with (
        TemporaryDirectory(prefix="slurm") as folder,
        local_slurm(Path(folder), cpus=2 * (os.cpu_count() or 1)) as slurm,
    ):
        submit(slurm, tmp_path, "__label__unknown")
        assert failed_stages(slurm) == {"documents"}, "and the stages behind it have left the queue"
        submit(slurm, tmp_path, "__label__hq")
    assert open_source("curated", str(tmp_path / "out" / "shards")).num_documents == 30
