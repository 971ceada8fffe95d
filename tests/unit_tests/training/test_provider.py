"""Training samples are the plan's; held-out samples are the same in each evaluation."""

import itertools
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.model.samples import SampleOptions
from megatron_kaiyuan.shards.source import Segment
from megatron_kaiyuan.training.provider import HeldOutSamples, PlanDatasetsProvider, PlanSamples, spread_evenly
from tests.unit_tests.data.tiny import write_shard


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

    def segments(self, index: int) -> list[Segment]:
        raise AssertionError(f"nobody asks where window {index} comes from")


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

    plan = Namespace(seq_length=2, longest=2)

    def padding(self, sample: int) -> int:
        return 0

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


def plan_with_a_bad_id(folder: Path, document: int, token: int) -> Plan:
    """60 documents of 20 tokens in two shards; the id stands in the middle of one document of the second."""
    for shard in (0, 1):
        documents = [[shard * 30 + number] * 20 for number in range(30)]
        if shard == 1:
            documents[document][10] = token
        write_shard(folder / f"s{shard}", documents)
    path = folder / "plan.yaml"
    path.write_text(
        f"seq_length: 16\nsources: {{text: {{shards: {folder}/s*}}}}\n"
        "phases: [{name: only, order: shuffled, sources: {text: all}}]\nvalidation: {text: {documents: 10}}\n"
    )
    return Plan.load(path)


@pytest.mark.parametrize("token", [60, 2**15, -1])
def test_an_id_outside_the_vocabulary_is_named_with_its_sample_shard_and_document(tmp_path: Path, token: int) -> None:
    """Every sample that holds it, training or held out, is refused; all others are as without looking."""
    options, refused = SampleOptions(vocabulary=60), 0
    plan = plan_with_a_bad_id(tmp_path, document := 17, token)
    training = PlanSamples(CurriculumDataset(plan), options)
    windows = HeldOutDataset(plan, "text")
    held_out = HeldOutSamples({0: windows}, options, len(windows), samples_per_evaluation=len(windows))
    for samples, raw, named in (
        (training, training.order, "sample {} (phase 'only', source 'text')"),
        (held_out, windows, "held-out window {} of source 0 of the plan"),
    ):
        for number in range(len(samples)):
            tokens = raw[number]["tokens"]
            if token not in tokens:
                assert samples[number]["tokens"].tolist() == tokens[:-1].tolist()
                continue
            refused += 1
            told = f"{named.format(number)}: token id {token} in document {document} of {tmp_path}/s1.bin, but the "
            with pytest.raises(ShardError, match="^" + re.escape(told) + "vocabulary has 60 ids: .* copy it again"):
                samples[number]
    assert refused in (1, 2), "once, or where two windows meet"
