"""What a phase shows in all: coverage, passes, exact budgets, for phases of either order."""

import re
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import PlanError
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import all_samples, numbered_documents, phase_of, plan_of, write_source

SETTINGS = settings(deadline=None, max_examples=40)


@SETTINGS
@given(
    lengths=st.lists(st.integers(0, 9), min_size=3, max_size=30).filter(lambda some: sum(some) > 12),
    order=st.sampled_from(["shuffled", "curriculum"]),
    scored=st.booleans(),
    repeat=st.fractions(Fraction(1, 4), 4, max_denominator=8),
    seq_length=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_each_document_is_shown_as_often_as_asked_but_for_one_window_of_its_stream(
    lengths, order, scored, repeat, seq_length, seed
):
    documents = numbered_documents(lengths)
    with tempfile.TemporaryDirectory() as folder:
        scores = np.random.default_rng(seed).permutation(len(lengths)) if scored else None
        sources = {"s": write_source(Path(folder) / "s", documents, scores, [len(lengths) // 3])}
        entry = {"repeat": f"{repeat.numerator}/{repeat.denominator}"}
        spec = plan_of(sources, phase_of(order, {"s": entry}), seq_length=seq_length, seed=seed)
        try:
            samples = all_samples(spec)
        except PlanError as error:  # a stream of less than one window
            assume("one window needs" not in str(error))
            raise
    shown = Counter(token for tokens in samples for token in tokens[1:])
    whole, fraction = divmod(repeat, 1)
    more = {d[0] for d in documents if any(shown[token] > whole for token in d)}
    assert max(shown.values()) <= whole + (1 if fraction else 0)
    assert len(more) <= oracle.half_up(fraction * len(lengths))
    expected = Counter({token: int(whole) + (d[0] in more) for d in documents for token in d})
    missing = expected - shown  # nobody predicts the first token of a stream, and less than a window of others
    assert missing.total() <= seq_length


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 9), min_size=3, max_size=25),
    repeat=st.integers(1, 4),
    seq_length=st.integers(1, 12),
    keep=st.sampled_from(["all", "top 60%"]),
)
def test_a_shuffled_stream_is_a_permutation_of_its_packed_windows_pass_by_pass(lengths, repeat, seq_length, keep):
    assume(sum(lengths) > 12 * 3)
    part = oracle.Part(numbered_documents(lengths), range(len(lengths)), repeat=1)
    if keep == "top 60%":
        part = oracle.Part(part.documents, part.scores, low=Fraction(2, 5))
    tokens = [t for document in oracle.selected(part) for t in document]
    expected = oracle.windows(tokens * repeat, seq_length, drop_first=False)
    assume(expected)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"s": write_source(Path(folder) / "s", part.documents, part.scores)}
        spec = plan_of(sources, phase_of("shuffled", {"s": {"keep": keep, "repeat": repeat}}), seq_length=seq_length)
        order = CurriculumDataset(Plan.from_spec(spec))
        samples = [tuple(order[s]["tokens"].tolist()) for s in range(len(order))]
        passes = [order.provenance(s).pass_number for s in range(len(order))]
    assert passes == sorted(passes)
    starts = [seq_length * w // len(tokens) for w in range(len(expected))]  # pass in which a window starts
    for number in range(repeat):
        mine = [w for w, p in zip(samples, passes, strict=True) if p == number]
        assert sorted(mine) == sorted(w for w, p in zip(expected, starts, strict=True) if p == number)


def test_passes_of_a_shuffled_phase_are_shuffled_independently(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 200))}
    spec = plan_of(sources, phase_of("shuffled", {"s": {"repeat": 4}}), seq_length=1)
    shown = [tokens[0] for tokens in all_samples(spec)]
    passes = [shown[200 * number : 200 * number + 199] for number in range(4)]
    for one in range(4):
        assert sorted(passes[one]) == list(range(199))
        for other in range(one):
            same = sum(a == b for a, b in zip(passes[one], passes[other], strict=True))
            assert same < 8  # one is expected; 8 has a chance below 1e-5
            ranks = np.argsort(passes[one]), np.argsort(passes[other])
            assert abs(np.corrcoef(*ranks)[0, 1]) < 5 / np.sqrt(199)


def test_phases_and_seeds_shuffle_independently(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 200))}
    two = plan_of(sources, phase_of("shuffled", {"s": "all"}, "a"), phase_of("shuffled", {"s": "all"}, "b"))
    samples = all_samples(two | {"seq_length": 1})
    assert samples[:199] != samples[199:]
    assert sorted(samples[:199]) == sorted(samples[199:])
    other_seed = all_samples(two | {"seq_length": 1, "seed": 99})
    assert other_seed[:199] != samples[:199]


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
@pytest.mark.parametrize("tokens", [4, 40, 43, 100, 156, 159])
def test_a_budget_is_met_to_the_last_whole_window(tmp_path, order, tokens):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([8] * 20), range(20))}
    plan = Plan.from_spec(plan_of(sources, phase_of(order, {"s": "all"}, tokens=tokens)))
    assert plan.num_samples == tokens // 4
    described = plan.describe()["phases"][0]
    assert described["tokens"] + described["tokens_unused_of_budget"] == tokens


def test_a_budget_of_a_shuffled_phase_leaves_out_a_random_part(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 401))}
    spec = plan_of(sources, phase_of("shuffled", {"s": "all"}, tokens=200), seq_length=1)
    shown = [tokens[0] for tokens in all_samples(spec)]
    assert len(set(shown)) == 200
    assert 60 < sum(token < 200 for token in shown) < 140  # 5 sigma about the half


def test_a_shuffled_stream_is_stretched_by_whole_new_passes(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 100))}
    entry = {"keep": "all", "max_repeat": 3}
    spec = plan_of(sources, phase_of("shuffled", {"s": entry}, tokens=250), seq_length=1)
    shown = [tokens[0] for tokens in all_samples(spec)]
    counts = Counter(shown)
    assert set(counts) == set(range(100))
    assert set(counts.values()) <= {2, 3}
    assert Counter(shown[:100]) == Counter(range(100))


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_a_budget_is_refused_from_one_window_past_what_may_be_shown_on(tmp_path, order):
    """31 documents of 4 tokens are 30 windows of 4; 2.25 passes of them, 279 tokens, are 69."""
    sources = {"s": write_source(tmp_path / "s", numbered_documents([4] * 31), range(31))}
    for entry, most in (({}, 30), ({"max_repeat": 1}, 30), ({"max_repeat": 2.25}, 69)):
        fits = plan_of(sources, phase_of(order, {"s": entry}, tokens=4 * most + 3))
        assert len(all_samples(fits)) == most
        with pytest.raises(PlanError, match=f"Lower the phase's tokens to {4 * most}, or"):
            Plan.from_spec(plan_of(sources, phase_of(order, {"s": entry}, tokens=4 * most + 4)))


def remedies(message):
    """The budget and, by source, the repetitions that an error proposes."""
    budget = re.search(r"Lower the phase's tokens to ([\d,]+)", message)[1]
    repeats = re.findall(r"sources\.(\w+)\.max_repeat to at least ([\d.]+\d)", message)
    return int(budget.replace(",", "")), {source: float(repeat) for source, repeat in repeats}


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(10, 90), min_size=1, max_size=4),
    excess=st.floats(1.02, 4.0),
    order=st.sampled_from(["shuffled", "curriculum"]),
    weights=st.one_of(st.none(), st.lists(st.sampled_from([1, 2, 0.3]), min_size=4, max_size=4)),
    capped=st.booleans(),
)
def test_a_budget_too_large_is_refused_with_numbers_that_work(sizes, excess, order, weights, capped):
    with tempfile.TemporaryDirectory() as folder:
        sources, entries = {}, {}
        for n, size in enumerate(sizes):
            sources[f"s{n}"] = write_source(Path(folder) / f"s{n}", numbered_documents([5] * size), range(size))
            entries[f"s{n}"] = {} if weights is None else {"weight": weights[n]}
            if capped:
                entries[f"s{n}"]["max_repeat"] = 1.01
        tokens = int(sum(sizes) * 5 * excess) + 50
        spec = plan_of(sources, phase_of(order, entries, tokens=tokens))
        with pytest.raises(PlanError, match=r"phase 'main': tokens [\d,]+ asks source 's\d' for") as caught:
            Plan.from_spec(spec)
        budget, repeats = remedies(str(caught.value))
        assert "above its max_repeat 1.01" in str(caught.value) if capped else True
        lowered = plan_of(sources, phase_of(order, entries, tokens=budget))
        assert Plan.from_spec(lowered).num_samples == budget // 4  # first remedy
        assert repeats
        for name, repeat in repeats.items():  # second remedy, for all sources that are short at once
            entries[name]["max_repeat"] = repeat
        assert Plan.from_spec(spec).num_samples == tokens // 4


def test_a_budget_that_shows_a_source_not_even_once_is_refused(tmp_path):
    sources = {
        "big": write_source(tmp_path / "big", numbered_documents([9] * 50)),
        "small": write_source(tmp_path / "small", numbered_documents([9])),
    }
    spec = plan_of(sources, phase_of("shuffled", {"big": "all", "small": "all"}, tokens=40))
    with pytest.raises(PlanError, match="source 'small': a budget of 10 samples is too small to show it even once"):
        Plan.from_spec(spec)


def test_a_budget_that_no_smaller_one_mends_says_so(tmp_path):
    """Nine parts of ten from a source of one window: any budget that shows the other source asks it for more."""
    sources = {
        "s": write_source(tmp_path / "s", numbered_documents([5])),
        "t": write_source(tmp_path / "t", numbered_documents([5] * 30)),
    }
    parts = {"s": {"weight": 9}, "t": {"weight": 1}}
    with pytest.raises(PlanError, match=r"No smaller budget shows every source of the phase\. Set sources\.s\.max_r"):
        Plan.from_spec(plan_of(sources, phase_of("shuffled", parts, tokens=40)))
    with pytest.raises(PlanError, match=r"Set sources\.s\.weight lower, since a source has at most 1,000,000 passes"):
        Plan.from_spec(plan_of(sources, phase_of("shuffled", parts, tokens=40_000_000)))


def test_passes_shuffled_long_ago_are_forgotten(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 50))}
    order = CurriculumDataset(
        Plan.from_spec(plan_of(sources, phase_of("shuffled", {"s": {"repeat": 500}}), seq_length=1))
    )
    first = [order[sample]["tokens"][0] for sample in range(60)]
    for sample in range(0, len(order), 7):
        order[sample]
    assert len(order.plan.phases[0].streams["s"]._permutations) <= 32
    assert [order[sample]["tokens"][0] for sample in range(60)] == first
