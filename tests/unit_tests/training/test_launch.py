"""What a process is set to when Megatron's loop begins, seen by a stand-in for the loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.training_run import MODEL_FLAGS, TRAINING_FLAGS, write_corpus
from tests.unit_tests.training.test_plan_arguments import write_manifest

REACH_THE_LOOP = """
import torch
from megatron_kaiyuan.host import cpu_platform
cpu_platform.install()
from megatron_kaiyuan.training import launch
allowed = lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
print("BEFORE", allowed())
launch.pretrain = lambda *_arguments, **_more: print("IN THE LOOP", allowed())
launch.run_pretraining()
"""
COUNT_READS = """
import sys
from collections import Counter
from pathlib import Path
from megatron_kaiyuan.data import Plan
reads, load = Counter(), Plan.load
def count(event, given):
    if event == "open" and str(given[0]).endswith(".manifest.json"):
        reads[Path(given[0]).name] += 1
def load_and_forget(path):
    plan = load(path)
    print("OPENED", dict(sorted(reads.items())))
    reads.clear()
    return plan
sys.addaudithook(count)
Plan.load = load_and_forget
"""


def reach_the_loop(folder: Path, *flags: str, before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{before}{REACH_THE_LOOP}{after}", *MODEL_FLAGS, *TRAINING_FLAGS, *flags],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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


@pytest.mark.parametrize("tokenizer", [(), ("--tokenizer-type", "NullTokenizer")], ids=["of the shards", "named"])
def test_a_start_reads_each_manifest_once(tmp_path: Path, tokenizer: tuple[str, ...]) -> None:
    plan = str(write_corpus(tmp_path))
    for name in ("scored", "plain"):
        write_manifest(tmp_path / name, vocab_size=96)
    done = reach_the_loop(
        tmp_path, "--plan", plan, *tokenizer, before=COUNT_READS, after='print("STARTED", dict(sorted(reads.items())))'
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "IN THE LOOP" in done.stdout
    once = "{'plain.manifest.json': 1, 'scored.manifest.json': 1}"
    assert f"OPENED {once}" in done.stdout
    assert "STARTED {}" in done.stdout  # what the plan has read is enough
