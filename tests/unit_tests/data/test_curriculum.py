"""Curriculum phases, sample by sample against the brute-force oracle, and by law where chance has a part."""

import tempfile
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import all_samples, numbered_documents, phase_of, plan_of, write_source

SETTINGS = settings(deadline=None, max_examples=40)
bands = st.one_of(
    st.just(("all", 0, 100)),
    st.integers(20, 100).map(lambda size: (f"top {size}%", 100 - size, 100)),
    st.integers(20, 100).map(lambda size: (f"bottom {size}%", 0, size)),
    st.tuples(st.integers(0, 50), st.integers(60, 100)).map(lambda b: (f"band [{b[0]}%, {b[1]}%)", *b)),
)


@st.composite
def parts(draw, first_token):
    """A scored source with what a phase takes from it, and how its entry in the plan reads."""
    keep, low, high = draw(bands)
    by = draw(st.sampled_from(["documents", "tokens"])) if keep != "all" else "documents"
    shortest = 1 if by == "tokens" else 0  # of empty documents at an edge by tokens, any number is right
    lengths = draw(st.lists(st.integers(shortest, 9), min_size=4, max_size=25).filter(lambda some: sum(some) > 20))
    part = oracle.Part(
        documents=numbered_documents(lengths, first_token),
        scores=draw(st.permutations(range(len(lengths)))),
        low=Fraction(low, 100),
        high=Fraction(high, 100),
        by=by,
        repeat=draw(st.integers(1, 3)),
        spacing=draw(st.sampled_from([Fraction(1), Fraction(1, 20), Fraction(1, 3), Fraction(2, 5)])),
    )
    order = {"repeat_order": "passes"} if part.spacing == 1 else {"repeat_spacing": f"{part.spacing}"}
    return (
        part,
        {"keep": f"{keep} by {by}", "repeat": part.repeat} | order,
        draw(st.lists(st.integers(0, len(lengths)))),
    )


def write_parts(folder, drawn, **more):
    """The sources of a plan and of its only phase."""
    sources = {
        f"s{n}": write_source(Path(folder) / f"s{n}", part.documents, part.scores, cuts[:3])
        for n, (part, _, cuts) in enumerate(drawn)
    }
    return sources, {f"s{n}": entry | more for n, (_, entry, _) in enumerate(drawn)}


@st.composite
def several_parts(draw):
    return [draw(parts(first_token=1000 * n)) for n in range(draw(st.integers(1, 3)))]


def again_of(plan, number, part):
    """First tokens of the documents that a source of the only phase shows in part of a pass."""
    extra = plan.phases[0].stream_list[number].extra
    if extra is None:
        return frozenset()
    by_score = sorted(range(len(part.documents)), key=lambda n: part.scores[n])
    places = [p for run in zip(extra.starts, extra.stops, strict=True) for p in range(*run)]
    return frozenset(part.documents[by_score[place]][0] for place in places if part.documents[by_score[place]])


@SETTINGS
@given(drawn=several_parts(), seq_length=st.integers(1, 7))
def test_a_curriculum_is_the_brute_force_order(drawn, seq_length):
    assume(all(len(oracle.stream(part, seq_length)) for part, _, _ in drawn))
    with tempfile.TemporaryDirectory() as folder:
        sources, entries = write_parts(folder, drawn)
        samples = all_samples(plan_of(sources, phase_of("curriculum", entries), seq_length=seq_length))
    expected = oracle.curriculum([part for part, _, _ in drawn], seq_length)
    assert samples == [tokens for _, tokens in expected]


@SETTINGS
@given(drawn=several_parts(), seq_length=st.integers(1, 5), share=st.fractions(0, 1, max_denominator=20))
def test_a_budget_thins_a_curriculum_as_the_brute_force_order_says(drawn, seq_length, share):
    streams = [oracle.stream(part, seq_length) for part, _, _ in drawn]
    assume(all(streams))
    tokens = int(share * sum(map(len, streams))) * seq_length + seq_length // 2
    parts = [part for part, _, _ in drawn]
    shown = [number for number, _ in oracle.shares(parts, seq_length, tokens)]
    assume(set(shown) == set(range(len(drawn))))
    with tempfile.TemporaryDirectory() as folder:
        sources, entries = write_parts(folder, drawn)
        spec = plan_of(sources, phase_of("curriculum", entries, tokens=tokens), seq_length=seq_length)
        order = CurriculumDataset(Plan.from_spec(spec))
        samples = [tuple(order[s]["tokens"].tolist()) for s in range(len(order))]
        numbers = [order.source_index(s) for s in range(len(order))]
        again = [again_of(order.plan, number, part) for number, part in enumerate(parts)]
    assert len(samples) == tokens // seq_length
    assert list(zip(numbers, samples, strict=True)) == oracle.curriculum(parts, seq_length, tokens, again)
    for number, part in enumerate(parts):  # the part shown once more is the smallest that fills the budget
        missing = oracle.passes(part, seq_length, shown.count(number))[1]
        sizes = [len(document) for document in oracle.selected(part) if document and document[0] in again[number]]
        assert missing <= sum(sizes) < missing + max([*map(len, part.documents), 1]) + 9
    for number, stream in enumerate(streams):  # no budget costs a curriculum its best window
        assert (
            again[number]
            or [tokens for n, tokens in zip(numbers, samples, strict=True) if n == number][-1] == stream[-1]
        )


@SETTINGS
@given(drawn=several_parts(), weights=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_weights_set_the_mix_of_a_curriculum(drawn, weights):
    weighted = [
        (oracle.Part(**vars(part) | {"weight": w, "repeat": 1}), entry | {"repeat": 1}, cuts)
        for (part, entry, cuts), w in zip(drawn, weights, strict=False)
    ]
    total = sum(part.weight for part, *_ in weighted)
    rooms = [len(oracle.stream(part, 3)) * total / part.weight for part, *_ in weighted]
    samples = int(min(rooms)) - len(weighted)
    assume(samples * min(weights) > 2 * total)
    with tempfile.TemporaryDirectory() as folder:
        sources, entries = write_parts(folder, weighted)
        for entry, (part, *_) in zip(entries.values(), weighted, strict=True):
            entry["weight"] = part.weight
        spec = plan_of(sources, phase_of("curriculum", entries, tokens=3 * samples), seq_length=3)
        got = all_samples(spec)
    assert got == [tokens for _, tokens in oracle.curriculum([part for part, *_ in weighted], 3, 3 * samples)]


def test_the_windows_left_out_by_a_budget_are_evenly_spaced(tmp_path):
    part = oracle.Part(numbered_documents([1] * 101), range(101))
    sources = {"s": write_source(tmp_path / "s", part.documents, part.scores)}
    for tokens in (99, 60, 37, 10, 3, 1):
        spec = plan_of(sources, phase_of("curriculum", {"s": "all"}, tokens=tokens), seq_length=1)
        shown = [tokens[1] for tokens in all_samples(spec)]
        gaps = {later - earlier for earlier, later in pairwise([0, *shown])}
        assert shown[-1] == 100
        assert len(shown) == tokens
        assert max(gaps) - min(gaps) <= 1


def test_sources_of_coarse_scores_still_ascend_and_keep_exactly_what_was_asked(tmp_path):
    """All scores are 0, 1 or 2: a band ends inside a tie, and still has the exact number of documents."""
    scores = [number % 3 for number in range(60)]
    sources = {"s": write_source(tmp_path / "s", numbered_documents([2] * 60), scores)}
    samples = all_samples(plan_of(sources, phase_of("curriculum", {"s": "top 45%"}), seq_length=1))
    seen = [scores[tokens[1] // 2] for tokens in samples]
    assert seen == sorted(seen)
    documents = {token // 2 for tokens in samples for token in tokens}
    assert Counter(scores[d] for d in documents) == {2: 20, 1: 7}


def test_tied_documents_kept_by_a_band_and_by_the_rest_are_complements(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 50), [0] * 50)}
    kept = [
        {t for w in all_samples(plan_of(sources, phase_of("curriculum", {"s": k}), seq_length=1)) for t in w}
        for k in ("bottom 30%", "band [30%, 62%)", "top 38%")
    ]
    assert sorted(t for some in kept for t in some) == list(range(50))
    assert [len(some) for some in kept] == [15, 16, 19]


def test_a_fractional_repetition_is_whole_passes_and_a_drawn_part_band_by_band(tmp_path):
    """100 documents of one token, in 4 bands of 25: each band twice, then 30 % of it by chance, then the next band."""
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 200), range(200))}
    entry = {"keep": "top 50%", "repeat": 2.3, "repeat_spacing": "25%"}
    spec = plan_of(sources, phase_of("curriculum", {"s": entry}), seq_length=1)
    shown = [100, *(tokens[1] for tokens in all_samples(spec))]  # and the first, which nobody predicts
    counts = Counter(shown)
    again = sorted(token for token, count in counts.items() if count == 3)
    assert (sorted(counts), set(counts.values()), len(again)) == (list(range(100, 200)), {2, 3}, 30)
    expected = []
    for first in (100, 125, 150, 175):
        band = list(range(first, first + 25))
        expected += [*band, *band, *(token for token in band if token in again)]
    assert shown == expected


def test_pass_by_pass_is_one_ascent_a_pass(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 200), range(200))}
    entry = {"keep": "top 50%", "repeat": 2.3, "repeat_order": "passes"}
    spec = plan_of(sources, phase_of("curriculum", {"s": entry}), seq_length=1)
    shown = [tokens[1] for tokens in all_samples(spec)]
    assert shown[:99] == list(range(101, 200))
    assert shown[99:199] == list(range(100, 200))
    assert shown[199:] == sorted(set(shown[199:]))
    assert len(shown) == 229


def test_copies_of_a_document_are_never_neighbours_and_quality_rises_to_within_a_band(tmp_path):
    lengths = [1 + n * 7 % 5 for n in range(400)]
    sources = {"s": write_source(tmp_path / "s", numbered_documents(lengths), range(400))}
    owner = [n for n, length in enumerate(lengths) for _ in range(length)]
    spec = plan_of(sources, phase_of("curriculum", {"s": {"keep": "all", "repeat": 3.5}}), seq_length=4)
    shown = [{owner[token] for token in tokens[1:]} for tokens in all_samples(spec)]
    for one, other in pairwise(shown):
        inside = one & other
        assert len(inside) <= 1, "a document that runs on"
    best = np.array([max(documents) for documents in shown])
    assert (np.maximum.accumulate(best) - best).max() <= 400 / 20, "a band of 5 %"
    passes = [CurriculumDataset(Plan.from_spec(spec)).provenance(s).pass_number for s in range(0, len(shown), 5)]
    assert set(passes) == {0, 1, 2, 3}


@pytest.mark.parametrize("repeat_order", ["ranked", "passes"])
@pytest.mark.parametrize("windows", [30, 99, 100, 129, 199, 250])
def test_a_budget_shows_what_is_unseen_before_it_repeats(tmp_path, repeat_order, windows):
    """100 documents of one window each, up to three times: nothing twice while something is unseen, and so on."""
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 101), range(101))}
    entry = {"keep": "all", "repeat": 3, "repeat_order": repeat_order}
    spec = plan_of(sources, phase_of("curriculum", {"s": entry}, tokens=windows), seq_length=1)
    shown = [tokens[1] for tokens in all_samples(spec)]
    counts = Counter(shown)
    often = [counts[token] for token in range(1, 101)]
    assert sum(often) + counts[0] == windows
    assert max(often) - min(often) <= 1
    assert shown[-1] == 100, "and the best one last"


def test_a_budget_past_a_scored_stream_shows_a_drawn_part_once_more(tmp_path):
    """With max_repeat a curriculum shows everything once and a part again, not everything with gaps."""
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 100), range(100))}
    entry = {"keep": "all", "max_repeat": 2, "repeat_order": "passes"}
    samples = all_samples(plan_of(sources, phase_of("curriculum", {"s": entry}, tokens=129), seq_length=1))
    shown = [tokens[1] for tokens in samples]
    assert shown[:99] == list(range(1, 100))
    assert shown[99:] == sorted(shown[99:])
    assert len(set(shown[99:])) == 30


def test_unscored_and_unsorted_sources_come_in_random_order_inside_a_curriculum(tmp_path):
    documents = numbered_documents([1] * 120)
    scored = write_source(tmp_path / "a", documents, range(120))
    unscored = write_source(tmp_path / "b", numbered_documents([1] * 120, 1000))
    entries = {"scored": "all", "unsorted": {"keep": "top 50%", "sorted": False}, "unscored": "all"}
    sources = {"scored": scored, "unsorted": scored, "unscored": unscored}
    order = CurriculumDataset(Plan.from_spec(plan_of(sources, phase_of("curriculum", entries), seq_length=1)))
    shown = {name: [] for name in sources}
    for sample in range(len(order)):
        shown[list(sources)[order.source_index(sample)]].append(int(order[sample]["tokens"][1]))
    assert shown["scored"] == list(range(1, 120))
    assert sorted(shown["unsorted"]) == list(range(61, 120))
    assert sorted(shown["unscored"]) == list(range(1001, 1120))
    for name in ("unsorted", "unscored"):
        ranks = np.argsort(np.argsort(shown[name]))
        assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.45
