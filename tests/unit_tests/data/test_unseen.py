"""`from: unseen`: phases that go on with a source show each window once, as one phase cut in pieces would."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.data.unseen import left_out, left_out_one
from megatron_kaiyuan.errors import PlanError
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import (
    all_samples,
    assert_resumes_anywhere,
    numbered_documents,
    phase_of,
    plan_of,
    write_source,
)

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
"""97 tokens: 24 windows of 4."""
OTHERS = [4] * 15
UNSEEN = {"from": "unseen"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unseen")
    scores = np.random.default_rng(3).permutation(len(LENGTHS)).tolist()
    return {
        "web": write_source(folder / "web", numbered_documents(LENGTHS), scores),
        "code": write_source(folder / "code", numbered_documents(OTHERS, 1000)),
    }


def shown(sources, *phases, **more):
    """The samples of each source in each phase, in training order."""
    plan = Plan.from_spec(plan_of(sources, *phases, **more))
    order = CurriculumDataset(plan)
    found = [{name: [] for name in sources} for _ in plan.phases]
    for number, phase in enumerate(plan.phases):
        for sample in range(phase.first_sample, phase.first_sample + phase.num_samples):
            found[number][order.provenance(sample).source].append(tuple(order[sample]["tokens"].tolist()))
    return found


def packed(lengths, first=0):
    """All windows of a source as stored, and by rank if its documents are given in that order."""
    tokens = [token for document in numbered_documents(lengths, first) for token in document]
    return oracle.windows(tokens, 4, drop_first=False)


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(2, 30), min_size=1, max_size=4), repeat=st.integers(1, 3))
def test_shuffled_phases_that_go_on_are_one_phase_cut_in_pieces(sources, cuts, repeat):
    total = sum(cuts)
    assume(total <= 30 * repeat)
    entry = {"web": {"repeat": repeat, "weight": 3}, "code": {"repeat": repeat, "weight": 2}}
    try:
        whole = shown(sources, phase_of("shuffled", entry, "p0", tokens=4 * total))[0]
        pieces = shown(
            sources,
            *(
                phase_of("shuffled", {n: p | (UNSEEN if k else {}) for n, p in entry.items()}, f"p{k}", tokens=4 * cut)
                for k, cut in enumerate(cuts)
            ),
        )
    except PlanError as error:  # a source too small for so many, or a phase too short to show it
        assume("max_repeat" not in str(error) and "too small" not in str(error) and "from: unseen" not in str(error))
        raise
    for name in sources:
        one = [sample for piece in pieces for sample in piece[name]]
        assert one[: len(whole[name])] == whole[name][: len(one)], "the mix is rounded in each phase"


def test_two_halves_show_everything_once_and_the_next_pass_begins_anew(sources):
    halves = shown(
        sources,
        phase_of("shuffled", {"web": "all"}, "a", tokens=48),
        phase_of("shuffled", {"web": UNSEEN, "code": "all"}, "b"),
        phase_of("shuffled", {"web": UNSEEN | {"repeat": 2}, "code": UNSEEN | {"repeat": 3}}, "c"),
    )
    expected = Counter(packed(LENGTHS))
    assert len(halves[0]["web"]) == len(halves[1]["web"]) == 12
    assert Counter(halves[0]["web"] + halves[1]["web"]) == expected
    assert Counter(halves[1]["code"]) == Counter(packed(OTHERS, 1000))
    twice = Counter(t for phase in halves for window in phase["web"] for t in window[1:])
    assert set(twice.values()) <= {1, 2}
    thrice = Counter(t for phase in halves for window in phase["code"] for t in window[1:])
    assert set(thrice.values()) == {3} or sum(3 - count for count in thrice.values()) <= 4


def ranked_windows(sources):
    scores = np.load(f"{sources['web']['shards']}/part-000.scores.score.npy")
    part = oracle.Part(numbered_documents(LENGTHS), scores.tolist())
    return oracle.stream(part, 4)


@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=4))
@example(counts=[1, 1, 1])
@example(counts=[12, 11, 1])
def test_phases_that_ascend_each_take_an_even_part_of_what_is_left(sources, counts):
    left = ranked_windows(sources)
    assume(sum(counts) <= len(left))
    phases = [
        phase_of("curriculum", {"web": UNSEEN if number else "all"}, f"p{number}", tokens=4 * count)
        for number, count in enumerate(counts)
    ]
    for found, count in zip(shown(sources, *phases), counts, strict=True):
        expected = [left[int(Fraction((j + 1) * len(left), count)) - 1] for j in range(count)]
        assert found["web"] == expected
        left = [window for window in left if window not in expected]


def test_what_a_curriculum_left_may_be_shuffled_and_that_continued(sources):
    phases = [
        phase_of("curriculum", {"web": "all"}, "a", tokens=40),
        phase_of("shuffled", {"web": UNSEEN}, "b", tokens=28),
        phase_of("curriculum", {"web": UNSEEN | {"sorted": False}}, "c"),
    ]
    found = [phase["web"] for phase in shown(sources, *phases)]
    windows = ranked_windows(sources)
    assert [len(some) for some in found] == [10, 7, len(windows) - 17]
    assert Counter(window for some in found for window in some) == Counter(windows)
    rest = [window for window in windows if window not in found[0]]
    assert found[1] + found[2] != rest


def test_the_dry_run_tells_what_is_still_unseen(sources):
    phases = [
        phase_of("shuffled", {"web": "all"}, "a", tokens=48),
        phase_of("shuffled", {"web": UNSEEN}, "b", tokens=24),
    ]
    rows = [phase["sources"]["web"] for phase in Plan.from_spec(plan_of(sources, *phases)).describe()["phases"]]
    assert [row["keep"] for row in rows] == ["all", "what is unseen"]
    assert rows[0]["shown"] == [{"times": 0, "tokens": 49}, {"times": 1, "tokens": 48}]
    assert rows[1]["shown"] == [{"times": 0, "tokens": 25}, {"times": 1, "tokens": 72}]
    assert rows[1]["windows_left_out"] == 6


def mixed(sources, *, ended=48):
    return plan_of(
        sources,
        phase_of("shuffled", {"web": "all", "code": {"keep": "all"}}, "a", tokens=ended),
        phase_of("curriculum", {"code": UNSEEN}, "b", tokens=16),
        phase_of("shuffled", {"web": UNSEEN, "code": UNSEEN}, "c"),
    )


def test_it_may_be_resumed_anywhere(sources):
    assert_resumes_anywhere(mixed(sources))


def test_a_mix_changed_in_mid_run_loses_nothing(sources):
    """The running phase is ended after what was consumed, and another one goes on with both sources."""
    before = plan_of(sources, phase_of("shuffled", {"web": "all", "code": "all"}, "a"))
    record = json.loads(json.dumps(Plan.from_spec(before).order_record()))
    after = mixed(sources, ended=80)
    Plan.from_spec(after).check_resume(record, 20)
    assert all_samples(after)[:20] == all_samples(before)[:20]
    assert Counter(all_samples(after)) == Counter(all_samples(before))


def test_other_phases_before_it_are_another_order(sources):
    one, other = (Plan.from_spec(mixed(sources, ended=ended)) for ended in (48, 52))
    assert one.fingerprint != other.fingerprint
    assert "seen" not in one.order_record()["phases"][0]["sources"]["web"]
    assert one.order_record()["phases"][2]["sources"]["web"]["seen"][1] > 0


@given(st.integers(1, 400), st.data())
def test_the_left_out_windows_are_those_that_no_sample_shows(available, data):
    used = data.draw(st.integers(1, available))
    kept = {(j + 1) * available // used - 1 for j in range(used)}
    rest = [w for w in range(available) if w not in kept]
    assert left_out(np.arange(len(rest)), used, available).tolist() == rest if rest else used == available
    assert [left_out_one(place, used, available) for place in range(len(rest))] == rest


@given(st.integers(2, 1 << 44), st.data())
def test_left_out_windows_of_huge_streams_are_exact(available, data):
    used = data.draw(st.integers(1, available - 1))
    places = sorted(data.draw(st.lists(st.integers(0, available - used - 1), min_size=1, max_size=5)))
    exact = [left_out_one(place, used, available) for place in places]
    assert left_out(np.array(places), used, available).tolist() == exact


REFUSED = {
    "nothing earlier": ([], {"web": UNSEEN}, "no earlier phase shows it, so all of it is unseen; leave out from"),
    "nothing left": ([{"web": "all"}], {"web": UNSEEN}, "shown all 24 windows of it once; write repeat: 2"),
    "another part": ([{"web": "top 50%"}], {"web": UNSEEN | {"keep": "all"}}, "kept top 50%, and only that"),
    "less than that part": (
        [{"web": {"keep": "top 50%", "except": "top 5%"}}],
        {"web": UNSEEN | {"keep": "top 50%"}},
        r"kept top 50% except top 5%, and only that can be continued; leave out keep, draw and except",
    ),
    "other exceptions": ([{"web": "top 50%"}], {"web": UNSEEN | {"except": "top 10%"}}, "kept top 50%, and only that"),
    "shown anew before": ([{"web": "all"}, {"web": "all"}], {"web": UNSEEN}, "may have shown the same documents"),
    "a fraction": ([{"web": {"repeat": 1.5}}], {"web": UNSEEN | {"repeat": 2}}, "it counts whole passes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_continued_is_refused_with_a_remedy(sources, case):
    before, parts, message = REFUSED[case]
    phases = [phase_of("shuffled", some, f"p{number}") for number, some in enumerate([*before, parts])]
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_spec(plan_of(sources, *phases))
    assert f"phase 'p{len(before)}', source 'web': from: unseen, but" in str(caught.value)


@pytest.mark.parametrize("sorted_again", [True, False])
def test_what_an_ascent_left_is_stretched_by_nothing(sources, sorted_again):
    first = phase_of("curriculum", {"web": "all"}, "a", tokens=40)
    rest = UNSEEN | {"sorted": sorted_again}
    with pytest.raises(PlanError, match="what an ascending phase left is shown once; leave out max_repeat"):
        Plan.from_spec(plan_of(sources, first, phase_of("curriculum", {"web": rest | {"max_repeat": 3}}, "b")))
    Plan.from_spec(plan_of(sources, first, phase_of("curriculum", {"web": rest | {"max_repeat": 1}}, "b")))


def test_random_order_cannot_be_continued_by_an_ascent(sources):
    phases = [phase_of("shuffled", {"web": "all"}, "a", tokens=40), phase_of("curriculum", {"web": UNSEEN}, "b")]
    with pytest.raises(PlanError, match=r"'a' showed it in random order.*sorted: false.*draw: rest of NAME here"):
        Plan.from_spec(plan_of(sources, *phases))


def test_parts_that_are_disjoint_from_what_is_continued_may_stand_before_it(sources):
    phases = [
        phase_of("curriculum", {"web": "bottom 40%"}, "a"),
        phase_of("curriculum", {"web": "top 60%"}, "b", tokens=20),
        phase_of("curriculum", {"web": UNSEEN}, "c"),
    ]
    found = [phase["web"] for phase in shown(sources, *phases)]
    assert len({window for some in found[1:] for window in some}) == sum(map(len, found[1:]))
