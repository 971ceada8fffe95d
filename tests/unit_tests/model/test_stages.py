"""The embedding's gradient is summed over the stages that hold the embedding's weights, and over no other."""

from argparse import Namespace

import pytest

from megatron_kaiyuan.model.stages import embedding_ranks


@pytest.mark.parametrize(
    ("mtp", "layout", "untied", "expected"),
    [
        (None, None, True, [4]),
        (None, None, False, [4, 7]),
        (1, None, True, [4, 7]),
        (1, None, False, [4, 7]),
        (1, "Et|t|tm|L", True, [4, 6]),
        (1, "Et|t|tm|L", False, [4, 6, 7]),
        (None, "Et|t|t|L", True, [4]),
    ],
)
def test_the_ranks_that_hold_the_embedding(
    mtp: int | None, layout: str | None, *, untied: bool, expected: list[int]
) -> None:
    args = Namespace(
        mtp_num_layers=mtp,
        pipeline_model_parallel_layout=layout,
        pipeline_model_parallel_size=4,
        untie_embeddings_and_output_weights=untied,
    )
    assert embedding_ranks(args, [4, 5, 6, 7]) == expected
