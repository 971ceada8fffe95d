"""What a process is set to when Megatron's loop begins, seen by a stand-in for the loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.training_run import MODEL_FLAGS, REPOSITORY, TRAINING_FLAGS, write_corpus
from tests.unit_tests.training.test_plan_arguments import write_manifest

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


def reach_the_loop(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REACH_THE_LOOP, *MODEL_FLAGS, *TRAINING_FLAGS, *flags],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("precision", "allowed"), [(["--fp16"], False), ([], True)])
def test_fp16_runs_allow_no_fp16_partial_sums(
    precision: list[str],
    allowed: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    done = reach_the_loop(tmp_path, "--plan", str(write_corpus(tmp_path)), *precision)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "BEFORE True" in done.stdout
    assert f"IN THE LOOP {allowed}" in done.stdout


def test_another_end_of_document_than_the_manifests_name_ends_the_start(tmp_path: Path) -> None:
    plan = str(write_corpus(tmp_path))
    for name in ("scored", "plain"):
        write_manifest(tmp_path / name, vocab_size=96)
    null = ("--plan", plan, "--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id")
    refused = reach_the_loop(tmp_path, *null, "5")
    assert refused.returncode != 0
    assert "ConfigError: --null-tokenizer-eod-id 5: documents end with id 5 there, and with 3" in refused.stderr
    assert "IN THE LOOP" in reach_the_loop(tmp_path, *null, "3").stdout
