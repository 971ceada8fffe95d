"""`shuffle: documents`: each pass packs its documents in a random order of its own, and the rest holds as before."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.data.rank_plan import rank_plan_sources
from megatron_kaiyuan.documents import shuffled
from megatron_kaiyuan.errors import PlanError, RankIndexError, ResumeError
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import (
    all_samples,
    assert_resumes_anywhere,
    numbered_documents,
    phase_of,
    plan_of,
    write_source,
)

LENGTHS = [1 + number * 7 % 5 for number in range(80)]
DOCUMENTS = numbered_documents(LENGTHS)
SCORES = np.random.default_rng(5).permutation(80).tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return {"a": write_source(tmp_path_factory.mktemp("a") / "a", DOCUMENTS, SCORES, cuts=(33,))}


def spec_of(source, order="shuffled", seq_length=4, seed=1234, **part):
    parts = {"a": {"shuffle": "documents"} | part}
    return plan_of(source, phase_of(order, parts), seq_length=seq_length, seed=seed)


def packed_documents(windows, dropped=()):
    """First tokens of the documents in the order they were packed; each is whole and follows the one before."""
    tokens = [*dropped, *windows[0], *(token for window in windows[1:] for token in window[1:])]
    firsts = {document[0]: document for document in DOCUMENTS}
    found = []
    while tokens and tokens[0] in firsts and tokens[: len(firsts[tokens[0]])] == firsts[tokens[0]]:
        found.append(tokens[0])
        tokens = tokens[len(firsts[tokens[0]]) :]
    return found, tokens


def windows_of(plan):
    """Windows of the first phase's stream in the order they were packed."""
    stream = plan.phases[0].streams["a"]
    return [tuple(stream.read(window).tolist()) for window in range(stream.num_windows)]


def test_each_pass_packs_every_document_once_in_another_order(source):
    spec = spec_of(source, repeat=3, seq_length=3)
    windows = windows_of(Plan.from_spec(spec))
    for before, after in pairwise(windows):
        assert before[-1] == after[0], "a target is the next window's first input"
    found, rest = packed_documents(windows)
    assert len(rest) <= 5, "what is left is the begun last document"
    passes = [found[:80], found[80:160], found[160:]]
    for one in passes[:2]:
        assert sorted(one) == sorted(document[0] for document in DOCUMENTS)
    assert passes[0] != passes[1] != sorted(passes[0])
    assert len(set(passes[2])) == len(passes[2]) >= 79
    shown = all_samples(spec)
    assert Counter(shown) == Counter(windows), "the phase shows these windows"
    assert shown != windows, "and shuffles them too"


def test_the_order_is_that_of_chance(source):
    """Neighbours of one order are neighbours of another as often as in two independent permutations."""

    def neighbours(seed, number):
        documents = Plan.from_spec(spec_of(source, repeat=2, seed=seed)).phases[0].streams["a"]
        order = documents.documents_of_pass(number).order
        firsts = order.pieces(0, sum(LENGTHS)).documents.tolist()
        return {frozenset(pair) for pair in pairwise(firsts)}, firsts

    common, places = 0, np.zeros(80)
    for seed in range(60):
        (one, firsts), (other, _) = neighbours(seed, 0), neighbours(seed, 1)
        common += len(one & other)
        places[firsts] += np.arange(80)
    expected = 60 * 79 * 79 / (80 * 79 / 2)
    assert abs(common - expected) < 5 * np.sqrt(expected)
    assert np.all(np.abs(places / 60 - 39.5) < 5 * np.sqrt((80**2 - 1) / 12 / 60))


@pytest.mark.parametrize("repeat", [1, 3])
def test_a_curriculum_shuffles_within_bands_that_ascend(source, repeat):
    plan = Plan.from_spec(spec_of(source, "curriculum", repeat=repeat, keep="top 80%", repeat_spacing="25%"))
    part = oracle.Part(DOCUMENTS, SCORES, low=oracle.Fraction(1, 5))
    ranked = [document[0] for document in oracle.selected(part)]
    bands = [set(ranked[16 * band : 16 * band + 16]) for band in range(4)]
    windows = windows_of(plan)
    leftover = repeat * sum(LENGTHS[DOCUMENTS.index(d)] for d in oracle.selected(part)) - len(windows) * 4 - 1
    order = plan.phases[0].streams["a"]
    assert order.leftover == leftover, "dropped from the lowest band"
    tokens = [token for window in windows[::-1] for token in window[:0:-1]]
    first_of = {token: document[0] for document in DOCUMENTS for token in document}
    bands_met = [next(n for n, band in enumerate(bands) if first_of[token] in band) for token in tokens]
    assert bands_met == sorted(bands_met, reverse=True)
    top = [first_of[token] for token in tokens if first_of[token] in bands[3]]
    copies = Counter(top)
    assert {first: count // len(next(d for d in DOCUMENTS if d[0] == first)) for first, count in copies.items()} == (
        dict.fromkeys(bands[3], repeat)
    )
    best_band = list(dict.fromkeys(top))
    assert best_band not in (ranked[:-17:-1], sorted(best_band)), "in random order"
    assert plan.describe()["phases"][0]["sources"]["a"]["order"] == "random in 4 ascending bands"


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_it_resumes_at_any_sample_however_it_was_read(source, order):
    spec = spec_of(source, order, repeat=2.5, keep="top 60%")
    assert_resumes_anywhere(spec)
    plan = Plan.from_spec(spec)
    dataset = CurriculumDataset(plan)
    backwards = [tuple(dataset[s]["tokens"].tolist()) for s in reversed(range(len(dataset)))]
    assert backwards[::-1] == all_samples(spec)
    for sample in range(len(dataset)):
        told = dataset.provenance(sample)
        numbers = [plan.opened["a"].source.number(segment) for segment in told.segments]
        assert [t for n, s in zip(numbers, told.segments, strict=True) for t in DOCUMENTS[n][s.start : s.stop]] == (
            dataset[sample]["tokens"].tolist()
        )
        ranks = [SCORES[number] for number in numbers]
        assert told.quantile == (min(ranks) / 80, (max(ranks) + 1) / 80)
        assert dataset.band_tokens(sample).sum() == 4


def test_more_passes_leave_the_earlier_ones_as_they_were(source):
    few, many = (all_samples(spec_of(source, repeat=repeat)) for repeat in (2, 3))
    assert many[: len(few) - 1] == few[:-1]


def test_what_is_unseen_goes_on_with_the_same_packing(source):
    first = phase_of("shuffled", {"a": {"shuffle": "documents"}}, "p", tokens=100)
    second = phase_of("shuffled", {"a": {"from": "unseen"}}, "q")
    cut = all_samples(plan_of(source, first, second, seq_length=3))
    assert cut == all_samples(plan_of(source, phase_of("shuffled", {"a": {"shuffle": "documents"}}, "p"), seq_length=3))
    second["sources"]["a"]["shuffle"] = "windows"
    with pytest.raises(PlanError, match=r"packed the source with shuffle: documents.*leave out shuffle"):
        all_samples(plan_of(source, first, second, seq_length=3))


def test_a_run_does_not_go_on_with_another_packing(source):
    documents, windows = (Plan.from_spec(spec_of(source, shuffle=shuffle)) for shuffle in ("documents", "windows"))
    for one, other in ((documents, windows), (windows, documents)):
        with pytest.raises(ResumeError, match=r"sources\.a\.shuffle"):
            one.check_resume(other.order_record(), 5)
    with pytest.raises(PlanError, match="shuffle: not in version 1"):
        Plan.from_spec(spec_of(source) | {"version": 1})


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_sums_of_a_large_source_are_stored_by_the_tool(tmp_path, order, monkeypatch):
    source = {"a": write_source(tmp_path / "a", DOCUMENTS, SCORES, cuts=(20, 50))}
    spec = spec_of(source, order, repeat=2)
    in_memory = all_samples(spec)
    monkeypatch.setattr(shuffled, "_SMALL_SET", 10)
    with pytest.raises(RankIndexError, match=r"rank_data.py --plan PLAN"):
        Plan.from_spec(spec)
    (tmp_path / "plan.yaml").write_text(str(spec))
    built = [one for one in rank_plan_sources(tmp_path / "plan.yaml") if one.path.suffix == ".shuffle"]
    assert [one.built for one in built] == [True, True], "one a pass"
    assert all_samples(spec) == in_memory
    assert sum(one.path.stat().st_size - 4096 for one in built) <= 8 * 80
    assert not any(one.built for one in rank_plan_sources(tmp_path / "plan.yaml") if one.path.suffix == ".shuffle")
    content = built[0].path.read_bytes()
    built[0].path.write_bytes(content[:-8])
    with pytest.raises(RankIndexError, match="damaged"):
        Plan.from_spec(spec)
    wrong = bytearray(content)
    wrong[4096 + 8] ^= 1
    built[0].path.write_bytes(wrong)
    with pytest.raises(RankIndexError, match="do not add up"):
        all_samples(spec)


def test_sums_of_many_passes_keep_at_most_eight_bytes_a_document():
    for passes in (1, 16, 17, 100, 1000):
        assert passes * 8 / shuffled.stride_of(passes) <= 8
