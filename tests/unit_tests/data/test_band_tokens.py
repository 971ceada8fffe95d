"""Tokens by quantile band against a count of the tokens themselves."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_kaiyuan.data import NUM_BANDS, CurriculumDataset
from tests.unit_tests.data.tiny import write_shard

SEQ_LENGTH = 16
NUM_DOCUMENTS = 57


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Documents whose tokens are their own number, two shards of one scored source, and an unscored one."""
    folder = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(3)
    values = rng.permutation(NUM_DOCUMENTS).astype(float).tolist()
    documents = [[number] * int(rng.integers(1, 40)) for number in range(NUM_DOCUMENTS)]
    (folder / "scored").mkdir()
    write_shard(folder / "scored" / "s0", documents[:20], values[:20])
    write_shard(folder / "scored" / "s1", documents[20:], values[20:])
    write_shard(folder / "plain", documents, None)
    plan = {
        "seq_length": SEQ_LENGTH,
        "seed": 5,
        "sources": {
            "scored": {"shards": str(folder / "scored"), "score": "score"},
            "plain": {"shards": str(folder / "plain")},
        },
        "phases": [
            {"name": "mixed", "order": "shuffled", "sources": {"scored": "all", "plain": "all"}},
            {"name": "ranked", "order": "curriculum", "sources": {"scored": {"keep": "top 60%", "repeat": 1.5}}},
        ],
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml", values


def test_each_input_token_is_counted_in_the_tenth_of_its_document(scores: tuple[Path, list[float]]) -> None:
    plan, values = scores
    order = CurriculumDataset(plan)
    band_of_document = [int(value) * NUM_BANDS // NUM_DOCUMENTS for value in values]  # the scores are the ranks
    seen = set()
    for sample in range(len(order)):
        expected = [0] * NUM_BANDS
        if order.provenance(sample).source == "scored":
            for token in order[sample]["tokens"][:-1].tolist():
                expected[band_of_document[token]] += 1
        counted = order.band_tokens(sample)
        assert counted.tolist() == expected
        assert counted.dtype == np.int64
        seen.add((order.provenance(sample).phase, order.provenance(sample).source))
    assert seen == {("mixed", "scored"), ("mixed", "plain"), ("ranked", "scored")}
