"""Windows of several samples, put together again from what a data loader deals out, and the flags that allow it."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.training import training
from torch.utils.data import default_collate

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.samples import SampleOptions, make_sample
from megatron_kaiyuan.training import forward_step, longer_windows
from megatron_kaiyuan.training.longer_windows import (
    check_longer_windows,
    joined,
    joined_counts,
    samples_of_window,
)
from megatron_kaiyuan.training.provider import PlanSamples
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

EOD = 7
KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def plan_in(folder: Path, packing: str = "flowing") -> Plan:
    """24 samples of 4 tokens, then windows of three such samples."""
    documents = [[*document, EOD] for document in numbered_documents([5, 9, 3, 8] * 10, 100)]
    sources = {"s": write_source(folder / "s", documents, range(40))}
    phases = [
        phase_of("shuffled", {"s": "all"}, "short", tokens=96),
        phase_of("curriculum", {"s": {"packing": packing}}, "long", seq_length=12),
    ]
    return Plan.from_spec(plan_of(sources, *phases))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("packing", ["flowing", "whole"])
def test_joined_samples_are_the_whole_window(tmp_path: Path, packing: str, reset: bool) -> None:  # noqa: FBT001
    plan = plan_in(tmp_path, packing)
    options = SampleOptions(eod_token=EOD, reset_position_ids=reset, eod_mask_loss=reset)
    order = CurriculumDataset(plan, parts=True)
    samples, border = PlanSamples(order, options), plan.phases[1].first_sample
    assert border == 24
    for first in range(border, len(samples) - 5, 6):  # a micro-batch of six samples: two windows
        batch = default_collate([samples[first + place] for place in range(6)])
        assert samples_of_window(batch) == 3
        whole = joined({key: batch[key] for key in KEYS}, 3)
        numbers, bands = joined_counts(batch["dataset_id"], batch["band_tokens"], 3)
        for row in range(2):
            sample = first + 3 * row
            padding = sum(order.padding(sample + place) for place in range(3))
            expected = make_sample(order.window(sample), options, padding)
            for key in KEYS:
                found = whole[key]
                assert found is not None
                assert torch.equal(found[row], expected[key]), key
            assert int(bands[row].sum()) == 12 - padding
        assert numbers.tolist() == [0, 0]
    early = default_collate([samples[place] for place in range(6)])
    assert samples_of_window(early) == 1


def test_the_forward_step_gives_the_model_whole_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank, whose groups are left out: five samples of a micro-batch would be no whole windows."""
    order = CurriculumDataset(plan_in(tmp_path), parts=True)
    samples = PlanSamples(order, SampleOptions())
    args = Namespace(create_attention_mask_in_dataloader=False, reset_attention_mask=False, seq_length=4)
    vars(args).update(context_parallel_size=1, pipeline_model_parallel_size=1)
    told: list[list[int]] = []
    count = "update_seqlen_stats_from_cu_seqlens"
    monkeypatch.setattr(training, count, lambda ends: told.append(ends.tolist()))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, **_: tensor)
    for name, value in (("get_args", args), ("sees_data", True), ("predicts_further_tokens", False)):
        monkeypatch.setattr(forward_step, name, lambda *_, value=value: value)
    for name in ("get_batch_on_this_tp_rank", "get_batch_on_this_cp_rank"):
        monkeypatch.setattr(forward_step, name, lambda batch, **_: batch)
    for module in (forward_step, longer_windows):
        monkeypatch.setattr(module, "parallel_state", OneRank())
    for first, windows in ((18, 6), (24, 2)):
        loaded = default_collate([samples[first + place] for place in range(6)])
        batch = forward_step._batch_on_this_rank(iter([loaded]), None, 6, several_lengths=True)
        for key in KEYS:
            tensor = batch[key]
            assert tensor is not None
            assert tensor.shape == (windows, 24 // windows)
        positions, tokens, bands = (batch[key] for key in ("position_ids", "tokens", "band_tokens"))
        assert positions is not None
        assert positions.tolist() == [list(range(24 // windows))] * windows
        assert tokens is not None
        assert tokens[-1].tolist() == order.window(first + 5)[:-1].tolist()
        assert bands is not None
        assert bands.sum(1).tolist() == [24 // windows] * windows
    assert told == [[0, 4, 8, 12, 16, 20, 24], [0, 12, 24]]


class OneRank:
    """What is asked of Megatron's `parallel_state`."""

    def __getattr__(self, name: str) -> Any:
        return lambda: {"get_tensor_model_parallel_world_size": 1}.get(name, 0)


def test_plans_of_one_length_carry_nothing_more(tmp_path: Path) -> None:
    sources = {"s": write_source(tmp_path / "s", numbered_documents([9] * 9))}
    samples = PlanSamples(
        CurriculumDataset(Plan.from_spec(plan_of(sources, phase_of("shuffled", {"s": "all"})))), SampleOptions()
    )
    assert set(samples[0]) == {*KEYS, "dataset_id", "band_tokens"}
    assert samples_of_window(default_collate([samples[0]])) == 1


def arguments(**changes: Any) -> Namespace:
    """Flags under which the plan can be trained."""
    given = {
        "max_position_embeddings": 12,
        "micro_batch_size": 3,
        "cuda_graph_impl": "none",
        "create_attention_mask_in_dataloader": False,
        "pipeline_model_parallel_size": 1,
    }
    return Namespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 8}, "--max-position-embeddings 8.*windows of 12"),
        ({"micro_batch_size": 4}, "--micro-batch-size 4 .*windows of up to 12; give a multiple of 3"),
        ({"micro_batch_size": 9}, "begins at sample 24, inside of a micro-batch; give phase 'short' tokens: 72 or 108"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local needs sequences of one length"),
        ({"create_attention_mask_in_dataloader": True}, "--create-attention-mask-in-dataloader"),
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size above 1"),
    ],
)
def test_flags_that_would_mix_lengths_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    plan = plan_in(tmp_path)
    for size in (3, 6, 12, 24):
        check_longer_windows(arguments(micro_batch_size=size), plan)
    with pytest.raises(ConfigError, match=message):
        check_longer_windows(arguments(**changes), plan)
