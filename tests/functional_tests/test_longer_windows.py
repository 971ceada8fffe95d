"""A run whose second phase has windows four times as long: stopped before, at or after the border, it is the same."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_kaiyuan.checkpoints.reading import open_checkpoint
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.monitoring.metrics_file import read_metrics
from tests.functional_tests.training_run import BATCH, STEPS, TRAINING_FLAGS, saved_tensors, train_well, write_corpus

LONGER = 128
"""Tokens of a window of the second phase; those of the first have 32. Its border is at step 3 of 6."""
FLAGS = ("--save", "saved", "--load", "saved", "--save-interval", "100", "--log-throughput")


def _train(folder: Path, plan: Path, *flags: str, processes: int) -> str:
    training = list(TRAINING_FLAGS)
    training[training.index("--micro-batch-size") + 1] = "4"
    return train_well(folder, "--plan", str(plan), *FLAGS, *flags, processes=processes, training=training).output


@pytest.mark.slow
def test_a_run_over_two_lengths_is_the_same_wherever_it_stops(tmp_path: Path) -> None:
    path = write_corpus(tmp_path)
    path.write_text(path.read_text().replace("order: curriculum", f"order: curriculum\n    seq_length: {LONGER}"))
    plan = Plan.load(path)
    assert plan.phases[1].first_sample == 3 * BATCH
    whole = tmp_path / "whole"
    whole.mkdir()
    output = _train(whole, path, processes=2)
    assert "default from the plan: max_position_embeddings = 128" in output
    expected = saved_tensors(whole / "saved" / f"iter_{STEPS:07d}")
    lines = read_metrics(whole / "saved" / "metrics.jsonl")
    assert [line["tokens"] for line in lines if "tokens" in line] == [BATCH * plan.seq_length] * STEPS
    for stop, processes in ((2, 1), (3, 2), (4, 2)):
        folder = tmp_path / f"stopped{stop}"
        folder.mkdir()
        _train(folder, path, "--exit-interval", str(stop), processes=processes)
        _train(folder, path, processes=2)
        last = open_checkpoint(folder / "saved")
        assert (last.iteration, last.arguments.consumed_train_samples) == (STEPS, plan.num_samples)
        found = saved_tensors(folder / "saved" / f"iter_{STEPS:07d}")
        assert found.keys() == expected.keys()
        if processes == 2:  # of one process the sums of a step are taken in another order
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        shutil.rmtree(folder)
