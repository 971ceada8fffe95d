"""Bands by one look-up a document are the tenths of its rank, ties, few documents and huge numbers included."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import NUM_BANDS, CurriculumDataset, Plan
from megatron_kaiyuan.documents.bands import band_edges
from megatron_kaiyuan.documents.ranking import rank_by_score, tie_hash
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source


@settings(deadline=None, max_examples=200)
@given(
    grades=st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0, np.inf]), min_size=1, max_size=90),
    noise=st.floats(0, 1),
    seed=st.integers(0, 9),
)
@example(grades=[1.0] * 57, noise=0.0, seed=0)
@example(grades=[1.0], noise=0.0, seed=0)
@example(grades=[1.0, 2.0], noise=0.0, seed=3)
def test_a_band_is_the_tenth_of_the_rank(grades, noise, seed):
    count = len(grades)
    some = np.random.default_rng(seed).random(count) < noise
    scores = np.where(some, np.random.default_rng(seed + 1).random(count), np.array(grades)).astype(np.float32)
    order = rank_by_score(scores, seed)
    ranks = np.empty(count, dtype=np.int64)
    ranks[order] = np.arange(count)
    documents = np.random.default_rng(seed + 2).permutation(count)
    edges = band_edges(order, lambda some: scores[some], seed)
    found = edges.bands_of(documents, scores[documents].astype(np.float64))
    assert found.tolist() == [int(ranks[document]) * NUM_BANDS // count for document in documents]


class Sparse:
    """The order of a source of equal scores past 2**32 documents, of which ten ranks are known."""

    def __init__(self, total, documents):
        self.total, self.documents = total, documents

    def __len__(self):
        return self.total


def test_bands_of_more_than_two_to_the_32_documents(monkeypatch):
    """Every score is equal, so that the 64-bit hash of the numbers decides alone."""
    total = 2**33 + 11
    sample = np.random.default_rng(0).integers(0, total, 2000)
    by_hash = sample[np.argsort(tie_hash(sample, total, 1))]
    firsts = by_hash[[len(sample) * band // NUM_BANDS for band in range(1, NUM_BANDS)]]
    asked = []

    def known(order, ranks):
        asked.extend(ranks.tolist())
        return firsts.astype(np.uint64)

    monkeypatch.setattr("megatron_kaiyuan.documents.bands.look_up", known)
    edges = band_edges(Sparse(total, firsts), lambda some: np.zeros(len(some)), 1)
    assert asked == [-(-band * total // NUM_BANDS) for band in range(1, NUM_BANDS)]
    assert max(asked) > 2**32
    found = edges.bands_of(by_hash, np.zeros(len(by_hash)))
    assert found.tolist() == [place * NUM_BANDS // len(sample) for place in range(len(sample))]


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_asking_for_a_sample_in_several_ways_finds_its_place_once(tmp_path, order, monkeypatch):
    """A loader asks for the tokens, the source and the bands of each sample, at random too."""
    source = write_source(tmp_path / "s", numbered_documents([5] * 3000), range(3000))
    data = CurriculumDataset(Plan.from_spec(plan_of({"s": source}, phase_of(order, {"s": "all"}))))
    phase, blocks, singles = data.plan.phases[0], [], []
    one, many = type(phase).sample, type(phase).block
    monkeypatch.setattr(type(phase), "sample", lambda self, *args: singles.append(args) or one(self, *args))
    monkeypatch.setattr(type(phase), "block", lambda self, *args: blocks.append(args) or many(self, *args))
    for sample in (5, 2500, 100, 3500):
        tokens, bands = data[sample]["tokens"], data.band_tokens(sample)
        assert data.source_index(sample) == 0
        wanted = np.bincount(tokens[:-1] // 5 * NUM_BANDS // 3000, minlength=NUM_BANDS)
        assert bands.tolist() == wanted.tolist()
    assert len(singles) == 4
    assert not blocks


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_a_window_of_very_many_documents_names_them_all(tmp_path, order):
    """Among them some without a token, across shards; the documents are looked for beyond the first guess."""
    lengths = [number % 3 for number in range(900)]
    source = write_source(tmp_path / "s", numbered_documents(lengths), range(900), cuts=(100, 101, 450))
    spec = plan_of({"s": source}, phase_of(order, {"s": "all"}), seq_length=200)
    data = CurriculumDataset(Plan.from_spec(spec))
    starts = np.cumsum([0, *lengths])
    shards = [shard.prefix for shard in data.plan.opened["s"].source.shards]
    firsts = dict(zip(shards, (0, 100, 101, 450), strict=True))
    for sample in range(len(data)):
        named = [
            (starts[firsts[segment.shard] + segment.document] + np.arange(segment.start, segment.stop)).tolist()
            for segment in data.provenance(sample).segments
        ]
        assert len(named) > 100
        assert [token for piece in named for token in piece] == data[sample]["tokens"].tolist()
