"""Where samples come from, and what is held out, against the files and brute-force ranks."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan, open_shard
from megatron_kaiyuan.errors import PlanError
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

SETTINGS = settings(deadline=None, max_examples=40)


def tokens_of(segments):
    """Tokens of segments, read from the shards again."""
    found = []
    for segment in segments:
        shard = open_shard(segment.shard)
        first = int(shard.pointers[segment.document]) // shard.dtype.itemsize
        assert 0 <= segment.start < segment.stop <= shard.lengths[segment.document]
        found += shard.token_data[first + segment.start : first + segment.stop].tolist()
    return found


def document_number(folder, segment):
    """Number of a segment's document over all shards of its folder."""
    earlier = [path for path in sorted(Path(folder).glob("*.idx")) if str(path)[:-4] < segment.shard]
    return sum(open_shard(str(path)[:-4]).documents for path in earlier) + segment.document


@SETTINGS
@given(
    lengths=st.lists(st.integers(0, 9), min_size=6, max_size=30).filter(lambda some: sum(some) > 50),
    order=st.sampled_from(["shuffled", "curriculum"]),
    keep=st.sampled_from(["all", "top 60%", "random 70%"]),
    repeat=st.sampled_from([1, 1.5, 3]),
    held_out=st.integers(0, 3),
    seed=st.integers(0, 4),
)
def test_provenance_is_the_sample_and_its_quantiles_are_brute_force_ranks(lengths, order, keep, repeat, held_out, seed):
    documents = numbered_documents(lengths)
    scores = np.random.default_rng(seed).permutation(len(lengths))
    owner = {token: number for number, document in enumerate(documents) for token in document}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        sources = {"s": write_source(path, documents, scores, [len(lengths) // 2])}
        validation = {"validation": {"s": {"documents": held_out}}} if held_out else {}
        entry = {"keep": keep, "repeat": repeat}
        spec = plan_of(sources, phase_of(order, {"s": entry}), seq_length=5, seed=seed, **validation)
        try:
            dataset = CurriculumDataset(Plan.from_spec(spec))
        except PlanError:
            assume(False)
        for sample in range(len(dataset)):
            tokens = dataset[sample]["tokens"].tolist()
            told = dataset.provenance(sample)
            assert (told.phase, told.source) == ("main", "s")
            assert tokens_of(told.segments) == tokens
            numbers = {document_number(path, segment) for segment in told.segments}
            assert numbers == {owner[token] for token in tokens}
            ranks = [int(scores[number]) for number in numbers]  # distinct scores 0..N-1 are their own ranks
            assert told.quantile == (min(ranks) / len(lengths), (max(ranks) + 1) / len(lengths))


def test_an_unscored_source_has_no_quantiles_and_source_index_counts_over_the_plan(tmp_path):
    sources = {
        "unused": write_source(tmp_path / "u", numbered_documents([5] * 4)),
        "plain": write_source(tmp_path / "p", numbered_documents([5] * 40)),
        "scored": write_source(tmp_path / "s", numbered_documents([5] * 40, 1000), range(40)),
    }
    spec = plan_of(sources, phase_of("shuffled", {"scored": "all", "plain": "all"}, "a"))
    order = CurriculumDataset(Plan.from_spec(spec))
    assert {order.source_index(s) for s in range(len(order))} == {1, 2}
    for sample in range(len(order)):
        told = order.provenance(sample)
        assert told.source == list(sources)[order.source_index(sample)]
        assert (told.quantile is None) == (told.source == "plain")
        assert (order[sample]["tokens"][0] >= 1000) == (told.source == "scored")


def test_samples_outside_the_plan_are_index_errors(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([5] * 40))}
    order = CurriculumDataset(Plan.from_spec(plan_of(sources, phase_of("shuffled", {"s": "all"}))))
    for sample in (-1, len(order), 10**9):
        with pytest.raises(IndexError, match=f"sample {sample} of a plan with {len(order)} samples"):
            order[sample]
        with pytest.raises(IndexError):
            order.provenance(sample)


def test_samples_may_be_numpy_integers_and_tokens_are_int64(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([5] * 40))}
    order = CurriculumDataset(Plan.from_spec(plan_of(sources, phase_of("shuffled", {"s": "all"}))))
    tokens = order[np.int64(3)]["tokens"]
    assert tokens.dtype == np.int64
    assert tokens.shape == (5,)
    assert np.array_equal(tokens, order[3]["tokens"])


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 6), min_size=12, max_size=30),
    held_out=st.integers(4, 8),
    order=st.sampled_from(["shuffled", "curriculum"]),
    keep=st.sampled_from(["all", "top 80%", "random 90%", "band [10%, 90%) by tokens"]),
    seed=st.integers(0, 4),
)
def test_held_out_documents_are_always_held_out_and_never_trained_on(lengths, held_out, order, keep, seed):
    documents = numbered_documents(lengths)
    owner = {token: number for number, document in enumerate(documents) for token in document}
    with tempfile.TemporaryDirectory() as folder:
        sources = {"s": write_source(Path(folder) / "s", documents, range(len(lengths)), [3, 9])}
        entry = {"keep": keep, "repeat": 2}
        validation = {"s": {"documents": held_out}}
        spec = plan_of(sources, phase_of(order, {"s": entry}), seq_length=2, seed=seed, validation=validation)
        plan = Plan.from_spec(spec)
        training, held = CurriculumDataset(plan), HeldOutDataset(plan, "s")
        trained = {owner[t] for s in range(len(training)) for t in training[s]["tokens"].tolist()}
        shown = [held[i]["tokens"].tolist() for i in range(len(held))]
        held_numbers = plan.opened["s"].held_out.tolist()
        alone = HeldOutDataset(Plan.from_spec(spec | {"phases": [phase_of("shuffled", {"s": "all"}, "other")]}), "s")
        assert [alone[i]["tokens"].tolist() for i in range(len(alone))] == shown
    assert len(set(held_numbers)) == held_out
    assert not trained & set(held_numbers)
    flat = [token for number in held_numbers for token in documents[number]]
    assert shown == [flat[2 * w : 2 * w + 3] for w in range((len(flat) - 1) // 2)]


def test_which_documents_are_held_out_is_random_and_set_by_the_seed(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([5] * 200))}

    def held(seed, count=20):
        spec = plan_of(sources, phase_of("shuffled", {"s": "all"}), seed=seed, validation={"s": {"documents": count}})
        return Plan.from_spec(spec).opened["s"].held_out.tolist()

    assert held(1) == held(1)
    assert held(1) != held(2)
    assert set(held(1, 10)) < set(held(1, 20))  # holding out more keeps those that were held out
    drawn = Counter(number for seed in range(40) for number in held(seed))
    assert len(drawn) > 150


def test_a_source_without_held_out_documents_says_which_have_some(tmp_path):
    sources = {name: write_source(tmp_path / name, numbered_documents([5] * 20)) for name in "ab"}
    spec = plan_of(sources, phase_of("shuffled", {"a": "all"}), validation={"a": {"documents": 2}})
    with pytest.raises(
        PlanError, match=r"validation\.b: the plan holds out no documents of it; it holds out some of a"
    ):
        HeldOutDataset(Plan.from_spec(spec), "b")
    with pytest.raises(PlanError, match="hold out more documents"):
        HeldOutDataset(Plan.from_spec(spec | {"seq_length": 40}), "a")
    with pytest.raises(IndexError, match="sample 2 of 2 held-out windows of 'a'"):
        HeldOutDataset(Plan.from_spec(spec), "a")[2]
