"""A sample has the tensors Megatron's own dataset would give for the same window."""

import itertools

import numpy as np
import pytest
import torch

from megatron_kaiyuan.model.samples import SampleOptions, make_sample

EOD = 9


def test_labels_are_the_tokens_one_later() -> None:
    sample = make_sample(np.array([5, 6, 7, 8]), SampleOptions())
    assert {name: tensor.tolist() for name, tensor in sample.items()} == {
        "tokens": [5, 6, 7],
        "labels": [6, 7, 8],
        "loss_mask": [1.0, 1.0, 1.0],
        "position_ids": [0, 1, 2],
    }
    assert {name: tensor.dtype for name, tensor in sample.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
    }


def test_a_sample_does_not_share_memory_with_its_window() -> None:
    window = np.array([1, 2, 3])
    sample = make_sample(window, SampleOptions())
    window[:] = 0
    assert sample["tokens"].tolist() == [1, 2]
    assert sample["labels"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("mask_loss", "reset_positions", "reset_mask"), list(itertools.product([False, True], repeat=3))
)
def test_document_boundaries_are_treated_as_megatron_does(
    mask_loss: bool,  # noqa: FBT001
    reset_positions: bool,  # noqa: FBT001
    reset_mask: bool,  # noqa: FBT001
) -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    rng = np.random.default_rng(0)
    for _ in range(30):
        window = rng.choice([1, 2, EOD], size=13)
        sample = make_sample(
            window,
            SampleOptions(
                eod_token=EOD,
                eod_mask_loss=mask_loss,
                reset_position_ids=reset_positions,
                reset_attention_mask=reset_mask,
                create_attention_mask=True,
            ),
        )
        attention_mask, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
            torch.from_numpy(window[:-1].copy()), EOD, reset_positions, reset_mask, mask_loss, True
        )[:3]
        torch.testing.assert_close(sample["loss_mask"], loss_mask, rtol=0, atol=0)
        torch.testing.assert_close(sample["position_ids"], position_ids, rtol=0, atol=0)
        torch.testing.assert_close(sample["attention_mask"], attention_mask, rtol=0, atol=0)
