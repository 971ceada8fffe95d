"""Training samples are the plan's; held-out samples are the same in each evaluation."""

import itertools
from argparse import Namespace
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.training.provider import HeldOutSamples, PlanDatasetsProvider, PlanSamples, spread_evenly
from megatron_kaiyuan.training.samples import SampleOptions


class Windows:
    """`length` windows of three tokens; the first one tells which window of which list it is."""

    def __init__(self, length: int, first: int) -> None:
        self.length, self.first = length, first

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert 0 <= index < self.length
        return {"tokens": np.array([self.first + index, 1, 2])}

    def bands(self, index: int) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
        return np.array([index % 10, -1], dtype=np.int8)


def first_tokens(samples: HeldOutSamples, count: int) -> list[int]:
    return [int(samples[index]["tokens"][0]) for index in range(count)]


def test_every_item_occurs_once_and_each_list_keeps_its_order_and_share() -> None:
    for lengths in itertools.product(range(5), repeat=3):
        if not any(lengths):
            continue
        order = spread_evenly(lengths).tolist()
        assert sorted(order) == [[number, item] for number, length in enumerate(lengths) for item in range(length)]
        for number, length in enumerate(lengths):
            places = [place for place, (owner, _) in enumerate(order) if owner == number]
            assert [order[place][1] for place in places] == list(range(length))
            for place in range(len(order) + 1):
                share = place * length / len(order)
                assert abs(sum(other < place for other in places) - share) < len(lengths)


def test_each_evaluation_sees_the_same_windows_of_every_source() -> None:
    samples = HeldOutSamples({3: Windows(4, 0), 5: Windows(2, 100)}, SampleOptions(), 9, samples_per_evaluation=3)
    first, second, third = itertools.batched(first_tokens(samples, 9), 3)
    assert first == second == third == (0, 100, 1)
    assert len(samples) == 9
    assert [samples[index]["dataset_id"].item() for index in range(4)] == [3, 5, 3, 3]
    assert [samples[index]["token_bands"].tolist() for index in range(3)] == [[0, -1], [0, -1], [1, -1]]


def test_an_evaluation_larger_than_what_is_held_out_starts_over() -> None:
    samples = HeldOutSamples({0: Windows(2, 0)}, SampleOptions(), 10, samples_per_evaluation=5)
    assert samples.period == 2
    assert first_tokens(samples, 10) == [0, 1, 0, 1, 0] * 2, "and the next one sees the same"


def test_a_full_validation_counts_each_window_once() -> None:
    """Two batches of four for five windows: three of the second batch come again and do not count."""
    sources = {0: Windows(3, 0), 1: Windows(2, 100)}
    samples = HeldOutSamples(sources, SampleOptions(), 16, samples_per_evaluation=8, once=True)
    for evaluation in (range(8), range(8, 16)):
        counted = [samples[index]["tokens"][0].item() for index in evaluation if samples[index]["loss_mask"].any()]
        assert sorted(counted) == [0, 1, 2, 100, 101]


def test_rarer_evaluations_after_a_resume_have_samples_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 evaluations of 3 windows were made; at the new interval Megatron asks for 6 in all."""
    args = Namespace(eval_iters=3, eval_global_batch_size=1, consumed_valid_samples=180, kaiyuan_every_window=False)
    flags = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask", "create_attention_mask_in_dataloader")
    vars(args).update(dict.fromkeys(flags, False))
    plan: Any = None
    sources: Any = {0: Windows(4, 0)}
    provider = PlanDatasetsProvider(plan, args, None)
    monkeypatch.setattr(provider, "_held_out_sources", lambda: sources)
    samples = provider._validation(18)
    assert samples is not None
    assert len(samples) >= 180 + 18
    assert [int(samples[180 + step]["tokens"][0]) for step in range(6)] == [0, 1, 2, 0, 1, 2]


class Order(Windows):
    """What is asked of a `CurriculumDataset`."""

    def source_index(self, sample: int) -> int:
        return 10 + sample

    def band_tokens(self, sample: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([sample, 0, 1])


def test_a_training_sample_is_the_window_of_its_number_with_its_source() -> None:
    order: Any = Order(3, 40)
    samples = PlanSamples(order, SampleOptions())
    assert len(samples) == 3
    assert samples[2]["tokens"].tolist() == [42, 1]
    assert samples[2]["labels"].tolist() == [1, 2]
    assert samples[2]["dataset_id"].item() == 12
    assert samples[2]["band_tokens"].tolist() == [2, 0, 1]
