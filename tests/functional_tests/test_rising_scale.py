"""The branch scale rises in a run of the real entry point, and a resumed run begins where it had come."""

import json
import shlex
from pathlib import Path

import pytest

from tests.functional_tests.training_run import STEPS, train_well, write_corpus

RISING = shlex.split(
    "--fp16 --initial-loss-scale 1024 --kaiyuan-branch-scale-bits 1 --kaiyuan-raise-branch-scale-below 1e7 "
    "--kaiyuan-activation-interval 2 --save saved --load saved --save-interval 3"
)
"""The first reading, of the second step, finds values that are less than ten million times below the end."""


def assert_scale_rises_and_stays(tmp_path: Path, tensor_parallel: int) -> None:
    """Begin on so many ranks, stop, and go on."""
    flags = ("--plan", str(write_corpus(tmp_path)), *RISING, "--tensor-model-parallel-size", str(tensor_parallel))
    begun = train_well(tmp_path, *flags, "--exit-interval", "3", processes=tensor_parallel)
    assert "step 2: headroom" in begun.output
    assert "--kaiyuan-branch-scale-bits goes from 1 to" in begun.output
    metrics = tmp_path / "saved" / "metrics.jsonl"
    reached = [json.loads(line)["branch_scale_bits"] for line in metrics.read_text().splitlines()]
    assert reached[0] == 1
    assert reached[1] == reached[2] > 1
    resumed = train_well(tmp_path, *flags, processes=tensor_parallel)
    assert f"--kaiyuan-branch-scale-bits 1 becomes {reached[2]}, that of the checkpoint" in resumed.output
    assert sorted(resumed.logged("activations/branch scale bits")) == [2, 4, STEPS]


@pytest.mark.distributed
def test_the_scale_rises_on_all_ranks_and_stays_after_a_resume(tmp_path: Path) -> None:
    assert_scale_rises_and_stays(tmp_path, 2)
