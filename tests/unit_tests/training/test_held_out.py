"""Held-out losses by source and band: the sums, and where an evaluation is told."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.monitoring.held_out_losses import NUM_BANDS, HeldOutLosses
from megatron_kaiyuan.monitoring.held_out_report import HeldOutReport
from megatron_kaiyuan.monitoring.metrics_file import held_out_path

SOURCES = ("a", "b", "c")


def batch(seed: int, rows: int = 4, length: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, len(SOURCES), (rows,), generator=generator),
        torch.randint(-1, NUM_BANDS, (rows, length), generator=generator).to(torch.int8),
        torch.randn(rows, length, generator=generator),
        torch.randint(0, 2, (rows, length), generator=generator).float(),
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=4))
def test_losses_by_band_are_those_of_a_loop_over_the_tokens(seeds: list[int]) -> None:
    losses = HeldOutLosses(SOURCES)
    expected = {name: [[0.0, 0] for _ in range(NUM_BANDS + 1)] for name in SOURCES}
    for ids, bands, values, mask in map(batch, seeds):
        losses.add(ids, bands, values, mask)
        for row, number in enumerate(ids.tolist()):
            for band, value, counts in zip(bands[row].tolist(), values[row].tolist(), mask[row].tolist(), strict=True):
                if counts:
                    cell = expected[SOURCES[number]][band]  # band -1 is the last one
                    cell[0], cell[1] = cell[0] + value, cell[1] + 1
    for name, found in losses.take().items():
        cells = expected[name]
        assert list(found.tokens) == [tokens for _, tokens in cells]
        assert list(found.loss_sums) == pytest.approx([loss for loss, _ in cells], abs=1e-5)
        tokens = sum(found.tokens)
        assert found.loss == (pytest.approx(sum(loss for loss, _ in cells) / tokens, abs=1e-5) if tokens else None)
    assert all(sum(found.tokens) == 0 for found in losses.take().values()), "an evaluation starts at zero"


def test_a_masked_nan_is_not_counted() -> None:
    losses = HeldOutLosses(("a",))
    values = torch.tensor([[1.0, float("nan")]])
    losses.add(torch.tensor([0]), torch.tensor([[9, 9]]), values, torch.tensor([[1.0, 0.0]]))
    assert losses.take()["a"].bands[9] == 1.0


def test_an_evaluation_is_told_to_the_log_the_writers_and_the_file(tmp_path: Path) -> None:
    losses, said, scalars = HeldOutLosses(SOURCES), [], {}
    path = held_out_path(tmp_path / "metrics.jsonl")
    report = HeldOutReport(losses, path, lambda name, value, step: scalars.update({(name, step): value}), said.append)
    losses.add(torch.tensor([0]), torch.tensor([[0, 9, 9]]), torch.tensor([[2.0, 1.0, 3.0]]), torch.ones(1, 3))
    losses.add(torch.tensor([2]), torch.tensor([[-1, -1, -1]]), torch.full((1, 3), 4.0), torch.ones(1, 3))
    report.after_evaluation(100, 800)
    assert said == [
        " held-out loss at step 100 by source (by quantile band): a 2.0000 (0-10% 2.000, 90-100% 2.000); c 4.0000"
    ]
    assert scalars == {
        ("held-out loss/a", 100): 2.0,
        ("held-out loss/a 0-10%", 100): 2.0,
        ("held-out loss/a 90-100%", 100): 2.0,
        ("held-out loss/c", 100): 4.0,
    }
    [line] = map(json.loads, path.read_text().splitlines())
    assert path.name == "metrics.held_out.jsonl"
    assert (line["iteration"], line["consumed_samples"], list(line["sources"])) == (100, 800, ["a", "c"])
    assert line["sources"]["a"]["band_tokens"] == [1] + [0] * 8 + [2]
    assert line["sources"]["c"] == {"loss": 4.0, "tokens": 3, "bands": [None] * 10, "band_tokens": [0] * 10}
    report.after_evaluation(200, 1600)
    assert len(path.read_text().splitlines()) == 1, "nothing was evaluated"


def test_a_rank_that_does_not_log_adds_up_and_says_nothing(tmp_path: Path) -> None:
    losses, said = HeldOutLosses(("a",)), []
    losses.add(torch.tensor([0]), torch.tensor([[0]]), torch.ones(1, 1), torch.ones(1, 1))
    HeldOutReport(losses, tmp_path / "x.jsonl", None, said.append).after_evaluation(1, 8)
    assert said == []
    assert not list(tmp_path.iterdir())
    assert sum(losses.take()["a"].tokens) == 0
