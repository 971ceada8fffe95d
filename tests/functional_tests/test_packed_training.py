"""A run on documents that are packed whole and shuffled counts its text, and no padding."""

from pathlib import Path

import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.monitoring.metrics_file import read_metrics
from tests.functional_tests.training_run import BATCH, STEPS, train_well, write_corpus


@pytest.mark.slow
def test_padding_is_in_no_loss_and_no_count(tmp_path: Path) -> None:
    plan = write_corpus(tmp_path)
    text = plan.read_text().replace("scored: all, plain: all", "scored: {packing: whole}, plain: {packing: whole}")
    text = text.replace("repeat: 2}", "repeat: 2, packing: whole}")
    plan.write_text(text.replace("keep: random 40%", "keep: random 40%, shuffle: documents"))
    train_well(tmp_path, "--plan", str(plan), "--kaiyuan-metrics", str(tmp_path / "metrics.jsonl"))
    order = CurriculumDataset(Plan.load(plan))
    names = list(order.plan.sources)
    assert sum(order.padding(sample) for sample in range(len(order))) > 0
    lines = [entry for entry in read_metrics(tmp_path / "metrics.jsonl") if "sources" in entry]
    assert len(lines) == STEPS
    for step, entry in enumerate(lines):
        text_of = dict.fromkeys(names, 0)
        for sample in range(step * BATCH, (step + 1) * BATCH):
            text_of[names[order.source_index(sample)]] += order.plan.seq_length - order.padding(sample)
        assert {name: sums["tokens"] for name, sums in entry["sources"].items()} == text_of
        assert sum(entry["sources"]["scored"]["bands"]) == text_of["scored"]
