"""Each predicted token of a held-out window is booked to its own document and that document's quantile band."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import NUM_BANDS, HeldOutDataset, Plan, band_name
from tests.unit_tests.data.tiny import numbered_documents, write_shard


def held_out(folder: Path, lengths: list[int], scores: list[float] | None, documents: int) -> HeldOutDataset:
    source = {"shards": write_shard(folder / "s", numbered_documents(lengths), scores)}
    return HeldOutDataset(
        Plan.from_spec(
            {
                "seq_length": 7,
                "sources": {"s": source | ({"score": "score"} if scores else {})},
                "phases": [{"name": "p", "order": "shuffled", "sources": {"s": None}}],
                "validation": {"s": {"documents": documents}},
            }
        ),
        "s",
    )


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(3, 12), min_size=20, max_size=40), seed=st.integers(0, 9))
def test_documents_and_bands_are_those_of_the_predicted_tokens(
    lengths: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scores = np.random.default_rng(seed).permutation(len(lengths)).astype(float).tolist()
    windows = held_out(tmp_path_factory.mktemp("held"), lengths, scores, len(lengths) - 3)
    document_of_token = [number for number, length in enumerate(lengths) for _ in range(length)]
    ranks = {number: sorted(scores).index(score) for number, score in enumerate(scores)}
    for window in range(len(windows)):
        own = [document_of_token[token] for token in windows[window]["tokens"].tolist()[1:]]
        assert windows.documents(window).tolist() == own
        assert windows.bands(window).tolist() == [ranks[number] * NUM_BANDS // len(lengths) for number in own]


def test_an_unscored_source_has_no_bands(tmp_path: Path) -> None:
    windows = held_out(tmp_path, [9] * 20, None, 5)
    assert windows.bands(0).tolist() == [-1] * 7
    assert windows.bands(0).dtype == np.int8


def test_bands_have_names() -> None:
    assert [band_name(0), band_name(NUM_BANDS - 1)] == ["0-10%", "90-100%"]
