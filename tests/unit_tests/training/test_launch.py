"""What a process is set to when Megatron's loop begins, seen by a stand-in for the loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.training_run import MODEL_FLAGS, REPOSITORY, TRAINING_FLAGS, write_corpus

REACH_THE_LOOP = """
import torch
from megatron_kaiyuan import cpu_platform
cpu_platform.install()
from megatron_kaiyuan.training import launch
allowed = lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
print("BEFORE", allowed())
launch.pretrain = lambda *_arguments, **_more: print("IN THE LOOP", allowed())
launch.run_pretraining()
"""


@pytest.mark.parametrize(("precision", "allowed"), [(["--fp16"], False), ([], True)])
def test_fp16_runs_allow_no_fp16_partial_sums(
    precision: list[str],
    allowed: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    flags = [*MODEL_FLAGS, *TRAINING_FLAGS, "--plan", str(write_corpus(tmp_path)), *precision]
    done = subprocess.run(
        [sys.executable, "-c", REACH_THE_LOOP, *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "BEFORE True" in done.stdout
    assert f"IN THE LOOP {allowed}" in done.stdout
