"""A begun curriculum made shorter or longer: what was shown stays, the rest is thinned anew and ends with the best."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import PlanError, ResumeError
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import (
    all_samples,
    assert_resumes_anywhere,
    numbered_documents,
    phase_of,
    plan_of,
    write_source,
)

LENGTHS = {"a": [1 + n * 7 % 5 for n in range(60)], "b": [2 + n % 3 for n in range(40)]}
SCORES = {name: np.random.default_rng(7).permutation(len(some)).tolist() for name, some in LENGTHS.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("amended")
    scored = {
        name: write_source(folder / name, numbered_documents(some, 1000 * number), SCORES[name])
        for number, (name, some) in enumerate(LENGTHS.items())
    }
    return scored | {"c": write_source(folder / "c", numbered_documents([3] * 30, 5000))}


def plan_with(sources, tokens, amended=(), parts=("a", "b"), before=8, **more):
    phases = [
        phase_of("shuffled", {"c": "all"}, "first", tokens=4 * before),
        phase_of("curriculum", dict.fromkeys(parts, "all"), "main", tokens=4 * tokens)
        | ({"amended": [{"at": before + at, "tokens": 4 * length} for at, length in amended]} if amended else {}),
        phase_of("shuffled", {"c": "all"}, "last", tokens=12),
    ]
    return plan_of(sources, *phases, **more)


def expected(tokens, amended):
    """Brute force: after each amendment what lies above the last window shown is thinned to the samples left."""
    parts = [
        oracle.Part(numbered_documents(some, 1000 * number), SCORES[name])
        for number, (name, some) in enumerate(LENGTHS.items())
    ]
    left = [oracle.stream(part, 4) for part in parts]
    rates = [float(len(some)) for some in left]
    shown, length = [], tokens
    for at, after in [*amended, (None, None)]:
        order = oracle.merged(rates, length - len(shown))
        used = [sum(1 for i, _ in order if i == number) for number in range(2)]
        if any(count > len(some) for count, some in zip(used, left, strict=True)):
            return None
        count = len(order) if at is None else at - len(shown)
        places = [(i, (j + 1) * len(left[i]) // used[i] - 1) for i, j in order[:count]]
        shown += [left[i][place] for i, place in places]
        reached = [max([place for i, place in places if i == number], default=-1) for number in range(2)]
        left = [some[place + 1 :] for some, place in zip(left, reached, strict=True)]
        length = after
    return shown


@st.composite
def amendments(draw):
    tokens = draw(st.integers(10, 60))
    found, length, at = [], tokens, 0
    for _ in range(draw(st.integers(1, 3))):
        if length - at < 3:
            break
        at = draw(st.integers(at + 1, length - 1))
        length = draw(st.integers(at + 1, 70))
        found.append((at, length))
    return tokens, found


@settings(deadline=None, max_examples=120)
@given(case=amendments())
def test_an_amended_curriculum_is_the_brute_force_order(sources, case):
    tokens, amended = case
    assume(amended)
    samples = expected(tokens, amended)
    if samples is None:
        with pytest.raises(PlanError, match=r"more samples; at sample .* left\. Give it fewer tokens, or add a phase"):
            Plan.from_spec(plan_with(sources, tokens, amended))
        return
    plan = Plan.from_spec(plan_with(sources, tokens, amended))
    order = CurriculumDataset(plan)
    main = plan.phases[1]
    got = [tuple(order[8 + s]["tokens"].tolist()) for s in range(main.num_samples)]
    assert got == samples
    singly = [tuple(order[8 + s]["tokens"].tolist()) for s in reversed(range(main.num_samples))]
    assert singly[::-1] == samples
    before = all_samples(plan_with(sources, tokens))
    assert [tuple(order[s]["tokens"].tolist()) for s in range(8 + amended[0][0])] == before[: 8 + amended[0][0]]
    assert len(order) == 8 + amended[-1][1] + 3


@pytest.mark.parametrize("length", [20, 60])
def test_the_rest_still_ends_with_the_best_data_and_ascends(sources, length):
    plan = Plan.from_spec(plan_with(sources, 40, [(15, length)]))
    order, main = CurriculumDataset(plan), plan.phases[1]
    for number, name in enumerate(("a", "b")):
        quality = [
            order.provenance(8 + s).quantile[1] for s in range(main.num_samples) if order.source_index(8 + s) == number
        ]
        assert quality == sorted(quality)
        assert quality[-1] == 1.0, name


def test_unscored_sources_go_on_where_they_were(sources):
    samples = {
        length: all_samples(plan_with(sources, 30, [(12, length)] if length != 30 else (), parts=("a", "c")))
        for length in (20, 30, 34)
    }
    shown = {length: [s for s in some[8:-3] if s[0] >= 5000] for length, some in samples.items()}
    assert shown[20] == shown[30][: len(shown[20])]
    assert shown[34][: len(shown[30])] == shown[30]


def test_it_may_be_resumed_anywhere(sources):
    assert_resumes_anywhere(plan_with(sources, 30, [(10, 24), (16, 40)], parts=("a", "b", "c")))


def test_a_resume_may_amend_what_follows_and_nothing_before(sources):
    begun = json.loads(json.dumps(Plan.from_spec(plan_with(sources, 40)).order_record()))
    once = Plan.from_spec(plan_with(sources, 40, [(15, 50)]))
    for consumed in (1, 20, 8 + 15):
        once.check_resume(begun, consumed)
    with pytest.raises(ResumeError, match=r"phases\.1 \(main\)\.amended was \[\] and is now \[\[15, 50\]\]"):
        once.check_resume(begun, 8 + 16)
    record = json.loads(json.dumps(once.order_record()))
    twice = Plan.from_spec(plan_with(sources, 40, [(15, 50), (30, 36)]))
    twice.check_resume(record, 8 + 30)
    for changed in ([(15, 49)], [(14, 50)], []):
        with pytest.raises(ResumeError, match=r"\.amended was \[\[15, 50\]\] and is now"):
            Plan.from_spec(plan_with(sources, 40, changed)).check_resume(record, 8 + 30)
    Plan.from_spec(plan_with(sources, 40)).check_resume(record, 8 + 15)
    with pytest.raises(ResumeError, match=r"samples was 40 and is now 50"):
        Plan.from_spec(plan_with(sources, 50)).check_resume(begun, 9)
    assert len({plan.fingerprint for plan in (once, twice, Plan.from_spec(plan_with(sources, 40)))}) == 3


def test_the_dry_run_counts_what_an_amended_phase_shows(sources):
    plan = Plan.from_spec(plan_with(sources, 30, [(10, 24)], parts=("a", "b", "c")))
    told = plan.describe()
    assert told["phases"][1]["samples"] == 24
    rows = told["phases"][1]["sources"]
    assert sum(row["samples"] for row in rows.values()) == 24
    owner = [n for n, length in enumerate(LENGTHS["a"]) for _ in range(length)]
    order = CurriculumDataset(plan)
    seen = np.zeros(10)
    for sample in range(8, 8 + 24):
        tokens = order[sample]["tokens"][1:]
        if tokens[0] < 1000:
            np.add.at(seen, [SCORES["a"][owner[token]] * 10 // 60 for token in tokens], 1)
    told_seen = [band["seen"]["main"] for band in told["sources"]["a"]["bands"]]
    assert np.abs(np.array(told_seen) - seen).max() <= 4, "to a window, which has one band in its middle"
    strip = [value for value in told["sources"]["a"]["quality"] if value is not None]
    assert strip == sorted(strip)
    assert strip[-1] > 0.9


@pytest.mark.parametrize(
    ("amended", "message"),
    [
        ([(40, 50)], r"amended at sample 48, which is not inside of samples 8 to 48"),
        ([(15, 15)], r"amended to tokens 60, which are 15 samples, when 15 had been consumed; give it at least 64"),
        ([(15, 50), (12, 60)], r"amended at sample 20, which is not inside of samples 23 to 58"),
        ([(39, 400)], r"more samples; at sample 47 it has \d+ left"),
    ],
)
def test_amendments_that_cannot_be_are_refused(sources, amended, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_spec(plan_with(sources, 40, amended))


def test_a_shuffled_phase_needs_no_amendment(sources):
    spec = plan_of(sources, phase_of("shuffled", {"a": "all"}, amended=[{"at": 3, "tokens": 40}]))
    with pytest.raises(PlanError, match="a shuffled phase just gets other tokens"):
        Plan.from_spec(spec)
