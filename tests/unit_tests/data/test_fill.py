"""`fill: others`: a source that has less than its weight asks for hands the rest to the others, by weight."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.data.interleave import prefix_bound
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.reporting.plan_table import fill_notes
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fill")
    sizes = {"a": 21, "b": 61, "c": 401, "d": 401}
    return {
        name: write_source(folder / name, numbered_documents([1] * size, 1000 * number), range(size))
        for number, (name, size) in enumerate(sizes.items())
    }


def poured(weights, rooms, total):
    """Shares of a total by weight, of which some have only so much room: what water does, in exact fractions."""
    full = {}
    while True:
        left = total - sum(full.values())
        open_ = {name: weight for name, weight in weights.items() if name not in full}
        shares = {name: Fraction(left) * weight / sum(open_.values()) for name, weight in open_.items()}
        over = {name: rooms[name] for name, share in shares.items() if name in rooms and share > rooms[name]}
        if not over:
            return full | shares
        full |= over


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    samples=st.integers(60, 300),
    order=st.sampled_from(["shuffled", "curriculum"]),
)
def test_shares_are_poured_by_weight_into_what_has_room(sources, weights, samples, order):
    parts = {name: {"weight": weight} for name, weight in zip(sources, weights, strict=True)}
    for name in ("a", "b"):
        parts[name]["fill"] = "others"
    plan = Plan.from_spec(plan_of(sources, phase_of(order, parts, tokens=samples), seq_length=1))
    phase = plan.phases[0]
    rooms = {"a": 20, "b": 60}
    expected = poured(dict(zip(sources, weights, strict=True)), rooms, samples)
    for number, name in enumerate(sources):
        used = int(phase.used[number])
        assert used <= rooms.get(name, 400)
        assert abs(used - expected[name]) <= prefix_bound(phase.rates.tolist(), number) + 2
    order_of = CurriculumDataset(plan)
    numbers = np.array([order_of.source_index(sample) for sample in range(len(order_of))])
    for number in range(4):  # and the mix is even over the whole phase, exhausted sources too
        share = phase.used[number] / samples
        ahead = np.cumsum(numbers == number) - share * np.arange(1, samples + 1)
        assert np.abs(ahead).max() <= 2 * prefix_bound(phase.rates.tolist(), number) + 1


def test_the_dry_run_says_who_is_exhausted(sources):
    parts = {"a": {"weight": 1, "fill": "others"}, "c": {"weight": 1}, "d": {"weight": 2}}
    told = Plan.from_spec(plan_of(sources, phase_of("shuffled", parts, tokens=200), seq_length=1)).describe()
    rows = told["phases"][0]["sources"]
    assert [rows[name]["samples"] for name in parts] == [20, 60, 120]
    assert fill_notes(told) == [
        "phase 'main': a is exhausted at 10.0% of the phase, its weight asks for 25.0%; the others fill the rest"
    ]


def test_without_it_the_same_weights_are_refused_and_it_needs_weights_and_others(sources):
    parts = {"a": {"weight": 1}, "c": {"weight": 3}}
    with pytest.raises(PlanError, match="asks source 'a' for 50 tokens"):
        Plan.from_spec(plan_of(sources, phase_of("shuffled", parts, tokens=200), seq_length=1))
    for wrong, message in (
        ({"a": {"fill": "others"}, "c": "all"}, "a has fill and no weight"),
        ({"a": {"weight": 1, "fill": "others"}}, "nobody is left to fill"),
        ({"a": {"weight": 1, "fill": "none"}, "c": {"weight": 1}}, "Input should be 'others'"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan.from_spec(plan_of(sources, phase_of("shuffled", wrong, tokens=20), seq_length=1))
    filled = {"a": {"weight": 9, "fill": "others"}, "b": {"weight": 1}}
    with pytest.raises(PlanError, match="asks source 'b' for"):
        Plan.from_spec(plan_of(sources, phase_of("shuffled", filled, tokens=200), seq_length=1))
