"""Simulated sources: their arithmetic is an order of documents like any other, up to the sizes of the real run."""

import time
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.data.plan_schema import ExpectedSpec
from megatron_kaiyuan.data.simulation import SimulatedOrder, SimulatedSource
from megatron_kaiyuan.documents.invented_lengths import GROUP
from megatron_kaiyuan.documents.order import RankedOrder, StorageOrder
from megatron_kaiyuan.errors import PlanError
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

SETTINGS = settings(deadline=None, max_examples=150)


@st.composite
def orders(draw, most_documents=10**10, spreads=st.one_of(st.just(0.0), st.floats(0, 2))):  # noqa: B008
    """A simulated order: documents, tokens, and a trend of length over quality with a scatter about it."""
    documents = draw(st.one_of(st.integers(1, 300), st.integers(1, most_documents)))
    tokens = documents * draw(st.integers(1, 3000)) + draw(st.integers(0, documents - 1))
    trend = draw(st.one_of(st.just(0.0), st.floats(-0.95, 0.95)))
    return simulated(documents, tokens, trend, ranked=draw(st.booleans()), spread=draw(spreads))


def simulated(documents, tokens, trend=0.0, *, ranked=True, spread=0.9, seed=0):
    expected = ExpectedSpec(documents=documents, tokens=tokens, length_by_quality=trend, length_spread=spread)
    return SimulatedOrder(SimulatedSource("s", expected=expected), ranked=ranked, seed=seed)


def offsets(order, *positions):
    return order.token_offsets(np.array(positions, dtype=np.int64)).tolist()


@SETTINGS
@given(order=orders(), data=st.data())
@example(order=simulated(542_451_381, 610 * 10**9, 0.3), data=None)
@example(order=simulated(10**10, 10**13, 1e-15), data=None)
@example(order=simulated(10**10, 10**10, -0.95), data=None)
def test_locate_is_the_inverse_of_token_offsets(order, data):
    tokens = order.source.num_tokens
    asked = [0, 1, tokens // 3, tokens - 1]
    if data is not None:
        asked.append(data.draw(st.integers(0, tokens - 1)))
    for token in asked:
        position = order.locate(min(token, tokens - 1))
        assert 0 <= position < order.num_documents
        start, end = offsets(order, position, position + 1)
        assert start <= min(token, tokens - 1) < end


@SETTINGS
@given(order=orders(), data=st.data())
def test_token_offsets_never_fall_and_are_exact_at_both_ends(order, data):
    count = order.num_documents
    first = data.draw(st.integers(0, count))
    asked = sorted({*data.draw(st.lists(st.integers(0, count), max_size=30)), *range(first, min(first + 200, count))})
    found = np.array(offsets(order, 0, *asked, count))
    assert found[0] == 0
    assert found[-1] == order.source.num_tokens
    assert (np.diff(found) >= np.diff([0, *asked, count])).all(), "every document has a token"


@SETTINGS
@given(order=orders(most_documents=3000, spreads=st.just(0.0)))
def test_without_spread_documents_are_as_long_as_the_trend_says(order):
    """One token, and of the others the mean times `1 + trend (2 q - 1)`, q in the middle of the document."""
    count, tokens = order.num_documents, order.source.num_tokens
    trend = Fraction(order.source.expected.length_by_quality) if order.ranked else Fraction(0)
    lengths = np.diff(order.token_offsets(np.arange(count + 1)))
    for position in {0, count // 3, count - 1}:
        quantile = (position + Fraction(1, 2)) / count
        expected = 1 + Fraction(tokens - count, count) * (1 + trend * (2 * quantile - 1))
        assert abs(int(lengths[position]) - expected) <= 2 + Fraction(1, 1000)


@SETTINGS
@given(order=orders(), data=st.data())
def test_any_range_has_the_tokens_of_the_trend_but_for_two_groups_at_either_end(order, data):
    count, tokens = order.num_documents, order.source.num_tokens
    trend = Fraction(order.source.expected.length_by_quality) if order.ranked else Fraction(0)
    low, high = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    found = offsets(order, low, high)

    def expected(position):
        share = Fraction(position, count)
        return position + (tokens - count) * (share + trend * (share * share - share))

    group = GROUP * Fraction(tokens, count) * (1 + abs(trend)) + 2
    assert abs(found[1] - found[0] - (expected(high) - expected(low))) <= 4 * group


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("trend", [0.0, 0.6, -0.6])
def test_lengths_scatter_as_a_log_normal_distribution_about_the_trend(ranked, trend):
    """Two million documents: the spread in each tenth of quality, its mean, and a tail far beyond the mean."""
    count, mean, spread = 2_000_000, 1000, 0.9
    order = simulated(count, count * mean, trend, ranked=ranked, spread=spread)
    lengths = np.diff(order.token_offsets(np.arange(count + 1)))
    for number, tenth in enumerate(np.split(lengths, 10)):
        quantile = (number + 0.5) / 10
        expected = mean * (1 + (trend if ranked else 0) * (2 * quantile - 1))
        assert tenth.mean() == pytest.approx(expected, rel=0.01)
        assert np.log(tenth).std() == pytest.approx(spread, abs=0.06)
        assert np.median(tenth) == pytest.approx(expected * np.exp(-(spread**2) / 2), rel=0.05)
    assert lengths.max() > 15 * mean
    assert (lengths > 5 * mean).mean() == pytest.approx(
        1 - NormalDist(-(spread**2) / 2, spread).cdf(np.log(5)), rel=0.4
    )
    groups = lengths.reshape(-1, GROUP).sum(axis=1)
    if not trend or not ranked:
        assert groups.std() / groups.mean() == pytest.approx(np.sqrt(np.expm1(spread**2) / GROUP), rel=0.05)
    pairs = np.corrcoef(lengths[:-1], lengths[1:])[0, 1]
    assert abs(pairs) < 0.12, "neighbours are as good as independent"


def test_the_scatter_is_of_the_seed_the_source_and_the_order_alone():
    some = np.arange(0, 10**6, 997)
    one = simulated(10**6, 10**9).token_offsets(some)
    assert (one == simulated(10**6, 10**9).token_offsets(some)).all()
    for other in (simulated(10**6, 10**9, seed=1), simulated(10**6, 10**9, ranked=False)):
        assert (one != other.token_offsets(some)).mean() > 0.9


def test_two_billion_documents_are_looked_up_a_million_times_in_seconds():
    order = simulated(2 * 10**9, 2 * 10**12, 0.3)
    some = np.sort(np.random.default_rng(0).integers(0, 2 * 10**9, 10**6))
    started = time.process_time()
    order.token_offsets(some)
    for token in range(0, 2 * 10**12, 10**10):
        order.locate(token)
    assert time.process_time() - started < 5, "0.4 s on an idle machine"


@pytest.mark.parametrize("documents", [10, 2**14, 2**14 + 1, 2**18 + 1, 10**9])
def test_random_parts_come_in_the_blocks_of_a_real_source(documents):
    source = simulated(documents, 2 * documents).source
    assert SimulatedOrder(source, ranked=False).block == StorageOrder(source).block
    assert SimulatedOrder(source, ranked=True).block == RankedOrder(source, None, "score").block


def test_a_plan_of_simulated_sources_counts_what_the_same_plan_of_real_ones_shows(tmp_path):
    """Documents of one length, so that both have the same documents and tokens; held-out ones included."""
    real = {
        "a": write_source(tmp_path / "a", numbered_documents([7] * 300), range(300)),
        "b": write_source(tmp_path / "b", numbered_documents([5] * 200)),
    }
    sizes = {
        "a": {"documents": 300, "tokens": 2100, "length_spread": 0},
        "b": {"documents": 200, "tokens": 1000, "length_spread": 0},
    }
    phases = [
        phase_of("shuffled", {"a": "all", "b": "random 30%"}, "p1"),
        phase_of("curriculum", {"a": {"keep": "top 20%", "repeat": 2}, "b": {"repeat": 1.5}}, "p2", tokens=1000),
    ]
    spec = plan_of(
        {n: s | {"expected": sizes[n]} for n, s in real.items()}, *phases, validation={"b": {"documents": 9}}
    )
    told, simulated_told = Plan.from_spec(spec).describe(5), Plan.from_spec(spec, simulate=True).describe(5)
    assert told.pop("fingerprint") != simulated_told.pop("fingerprint")
    assert told == simulated_told


def test_a_simulated_source_can_be_planned_with_and_not_read():
    spec = plan_of(
        {"s": {"shards": "none", "expected": {"documents": 10, "tokens": 100}}}, phase_of("shuffled", {"s": "all"})
    )
    order = CurriculumDataset(Plan.from_spec(spec, simulate=True))
    assert len(order) == 24
    for access in (lambda: order[0], lambda: order.provenance(0)):
        with pytest.raises(PlanError, match="source 's' is simulated"):
            access()


def test_a_source_without_expected_sizes_cannot_be_simulated():
    spec = plan_of({"s": {"shards": "none"}}, phase_of("shuffled", {"s": "all"}))
    with pytest.raises(PlanError, match=r"sources\.s: --simulate needs expected"):
        Plan.from_spec(spec, simulate=True)
    spec["sources"]["s"]["expected"] = {"documents": 5, "tokens": 50}
    with pytest.raises(PlanError, match=r"validation\.s\.documents: 5 of 5 leaves none"):
        Plan.from_spec(spec | {"validation": {"s": {"documents": 5}}}, simulate=True)


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("order", ["curriculum", "shuffled"])
def test_a_block_of_samples_is_the_samples_one_by_one(count, order):
    """With few streams of many samples, and many streams of few: they are found in different ways."""
    sources = {
        f"s{n}": {"shards": "none", "score": "score", "expected": {"documents": 90, "tokens": 9000 + 7000 * (n % 5)}}
        for n in range(count)
    }
    parts = {name: {"keep": "all", "repeat": 2.5, "sorted": n % 3 > 0} for n, name in enumerate(sources)}
    phase = Plan.from_spec(plan_of(sources, phase_of(order, parts), seq_length=64), simulate=True).phases[0]
    for start in (0, phase.num_samples // 3, phase.num_samples - 70):
        numbers, windows = phase.block(start, start + 70)
        singly = [phase.sample(sample) for sample in range(start, start + 70)]
        assert list(zip(numbers.tolist(), windows.tolist(), strict=True)) == singly
