"""A run that is resumed with another global batch ends with the last sample of its plan, at the plan's rate."""

import shutil
from pathlib import Path

import pytest

from megatron_kaiyuan.checkpoints.identity import AVERAGING
from megatron_kaiyuan.checkpoints.reading import open_checkpoint
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.monitoring.metrics_file import read_metrics
from megatron_kaiyuan.training.scheduler import learning_rate_at
from tests.functional_tests.training_run import BATCH, TRAINING_FLAGS, train_well, write_corpus

SAVED = 3
"""Steps of `BATCH` samples before the change: half of the plan."""
SEQ_LENGTH = 32
"""Of the plan."""


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plan, and a run that stopped after half of it."""
    folder = tmp_path_factory.mktemp("half_done")
    plan = write_corpus(folder)
    plan.write_text(plan.read_text() + "averaging: {last: 2, every: 1}\n")
    train_well(folder, "--plan", str(plan), "--save", "saved", "--save-interval", "3", "--exit-interval", "3")
    return folder


@pytest.mark.parametrize("batch", [12, 4])
def test_all_samples_are_seen_with_a_larger_batch_and_with_a_smaller(
    half_done: Path, tmp_path: Path, batch: int
) -> None:
    path, saved = half_done / "plan.yaml", tmp_path / "saved"
    shutil.copytree(half_done / "saved", saved)
    plan = Plan.load(path)
    flags = ("--plan", str(path), "--save", "saved", "--load", "saved", "--save-interval", "100")

    finished = train_well(tmp_path, *flags, "--global-batch-size", str(batch))

    consumed = SAVED * BATCH
    final = SAVED + (plan.num_samples - consumed) // batch
    last = open_checkpoint(saved)
    assert last.iteration == final
    assert last.arguments.consumed_train_samples == plan.num_samples == 48
    assert getattr(last.arguments, AVERAGING)["iterations"] == [final - 1, final]
    assert (saved / f"iter_{final - 1:07d}").is_dir()
    rates = {SAVED + 1 + step: learning_rate_at(plan, consumed + step * batch) for step in range(final - SAVED)}
    assert finished.logged("learning-rate") == pytest.approx(rates, rel=1e-6)
    again = train_well(tmp_path, *flags, "--global-batch-size", str(batch))
    assert "the run is complete" in again.output


def test_the_first_line_after_a_resume_counts_the_tokens_of_its_steps(tmp_path: Path) -> None:
    """Two lines of steps of 4 samples, and of 8 from the 17th sample on; resumed in the midst of both."""
    plan = write_corpus(tmp_path)
    flags = ("--plan", str(plan), "--save", "saved", "--load", "saved", "--save-interval", "100", "--log-interval", "2")
    fixed = TRAINING_FLAGS.index("--global-batch-size")
    batch = ["--step-batch-size-schedule", f"0:4 {16 * SEQ_LENGTH}:8", "--eval-global-batch-size", str(BATCH)]
    training = [*TRAINING_FLAGS[:fixed], *TRAINING_FLAGS[fixed + 2 :], *batch]
    for step in ("3", "5", "8"):
        train_well(tmp_path, *flags, "--exit-interval", step, training=training)
    lines = read_metrics(tmp_path / "saved" / "metrics.jsonl")
    assert [(line["iteration"], line["consumed_samples"]) for line in lines] == [(2, 8), (4, 16), (6, 32), (8, 48)]
    # Step 3 was saved and in no line, so the line of step 4 has its own tokens alone; so has that of step 6.
    assert [line["tokens"] for line in lines] == [8 * SEQ_LENGTH, 4 * SEQ_LENGTH, 8 * SEQ_LENGTH, 16 * SEQ_LENGTH]
