"""Phases with windows of several samples: their order against the oracle, what is conserved, resumes on either side."""

import math
import pickle
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import PlanError, ResumeError
from megatron_kaiyuan.reporting.plan_page import write_plan_page
from megatron_kaiyuan.reporting.plan_table import length_notes
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import (
    all_samples,
    assert_resumes_anywhere,
    numbered_documents,
    phase_of,
    plan_of,
    write_source,
)

SETTINGS = settings(deadline=None, max_examples=40)


def cut(window: oracle.Tokens, length: int) -> list[oracle.Tokens]:
    """The samples of a window, each with the token after it."""
    return [window[first : first + length + 1] for first in range(0, len(window) - 1, length)]


def windows_that_fit(natural: int, each: int, first: int, following: int) -> int:
    """Most windows of `each` samples, from sample `first` on, after which one of `following` samples may begin."""
    return max(count for count in range(natural + 1) if (first + count * each) % following == 0)


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 9), min_size=12, max_size=40),
    length=st.integers(1, 3),
    times=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    seed=st.integers(0, 5),
)
def test_phases_are_what_they_are_at_their_own_length_cut_into_samples(lengths, length, times, seed):
    scores = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    part = oracle.Part(numbered_documents(lengths), scores)
    expected: list[oracle.Tokens] = []
    for number, each in enumerate(times):
        following = times[number + 1] if number + 1 < len(times) else 1
        natural = len(oracle.stream(part, each * length))
        count = windows_that_fit(natural, each, len(expected), following) if natural else 0
        assume(count)
        for _, window in oracle.curriculum([part], each * length, count * each * length):
            expected += cut(window, length)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"s": write_source(Path(folder) / "s", part.documents, scores, [len(lengths) // 2])}
        phases = [
            phase_of("curriculum", {"s": "all"}, f"p{number}", seq_length=each * length)
            for number, each in enumerate(times)
        ]
        spec = plan_of(sources, *phases, seq_length=length)
        assert all_samples(spec) == expected
        firsts = [phase.first_sample for phase in Plan.from_spec(spec).phases]
    assert all(first % each == 0 for first, each in zip(firsts, times, strict=True))


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 9), min_size=12, max_size=40),
    length=st.integers(1, 3),
    each=st.integers(2, 4),
    repeat=st.integers(1, 2),
)
def test_tokens_are_conserved_over_the_border(lengths, length, each, repeat):
    documents = numbered_documents(lengths)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"s": write_source(Path(folder) / "s", documents)}
        spec = plan_of(
            sources,
            phase_of("shuffled", {"s": {"repeat": repeat}}, "short"),
            phase_of("shuffled", {"s": {"repeat": repeat}}, "long", seq_length=each * length),
            seq_length=length,
        )
        plan, samples = Plan.from_spec(spec), all_samples(spec)
    border, tokens = plan.phases[1].first_sample, sum(lengths) * repeat
    for shown, window, lost in ((samples[:border], length, each - 1), (samples[border:], each * length, 0)):
        counts = Counter(token for sample in shown for token in sample[1:])
        assert max(counts.values()) <= repeat
        assert 0 <= (tokens - 1) // window * window - counts.total() <= lost * length
    following = [samples[border + first : border + first + each] for first in range(0, len(samples) - border, each)]
    assert all(one[-1] == two[0] for window in following for one, two in pairwise(window))


def test_a_run_resumes_at_any_sample_on_both_sides_of_a_border(tmp_path):
    sources = {
        "a": write_source(tmp_path / "a", numbered_documents([5, 9, 3, 8] * 9), range(36)),
        "b": write_source(tmp_path / "b", numbered_documents([7] * 20, 1000)),
    }
    assert_resumes_anywhere(
        plan_of(
            sources,
            phase_of("shuffled", {"a": "all", "b": "all"}, "short"),
            phase_of("curriculum", {"a": "top 60%", "b": "all"}, "long", seq_length=12),
            phase_of("shuffled", {"a": "all"}, "again"),
        )
    )


@pytest.mark.parametrize("packing", ["flowing", "whole"])
def test_parts_of_a_window_tell_their_own_documents_bands_and_padding(tmp_path, packing):
    documents = numbered_documents([5, 9, 3, 8] * 10)
    sources = {"s": write_source(tmp_path / "s", documents, range(40))}
    part = {"s": {"packing": packing}}
    spec = plan_of(sources, phase_of("curriculum", part, seq_length=12), seq_length=4)
    order = CurriculumDataset(Plan.from_spec(spec), parts=True)
    owner = {token: number for number, document in enumerate(documents) for token in document}
    for sample in range(len(order)):
        tokens, padding = order[sample]["tokens"], order.padding(sample)
        place, each = order.place_in_window(sample)
        assert (place, each) == (sample % 3, 3)
        assert order.window(sample)[4 * place : 4 * place + 5].tolist() == tokens.tolist()
        text = tokens[: 5 - padding].tolist()
        segments = order.provenance(sample).segments
        shown = [documents[piece.document][piece.start : piece.stop] for piece in segments]
        assert [token for piece in shown for token in piece][: len(text)] == text
        expected = Counter(10 * owner[token] // 40 for token in text[:-1])
        if padding < 4:
            assert order.band_tokens(sample).tolist() == [expected[band] for band in range(10)]
    if packing == "whole":
        assert sum(order.padding(sample) for sample in range(len(order))) > 0


def test_the_dry_run_tells_lengths_and_counts_tokens_by_them(tmp_path):
    sources = {
        "a": write_source(tmp_path / "a", numbered_documents([10] * 32), range(32)),
        "b": write_source(tmp_path / "b", numbered_documents([10] * 30, 1000)),
    }
    phases = [
        phase_of("shuffled", {"a": "all"}, "short", tokens=203),
        phase_of("curriculum", {"a": {"weight": 3}, "b": {"weight": 1}}, "long", seq_length=20, tokens=400),
    ]
    plan = Plan.from_spec(plan_of(sources, *phases))
    described = plan.describe()
    short, long = described["phases"]
    assert (short["seq_length"], short["samples"], short["tokens_unused_of_budget"]) == (4, 50, 3)
    assert (long["seq_length"], long["samples_per_window"], long["first_sample"]) == (20, 5, 50)
    assert (long["samples"], long["tokens"]) == (100, 400)
    assert [long["sources"][name]["tokens"] for name in "ab"] == [300, 100]
    assert long["domains"] == {"a": 0.75, "b": 0.25}
    assert described["domains"] == {"a": pytest.approx(125 / 150), "b": pytest.approx(25 / 150)}
    assert described["tokens"] == 600
    (note,) = length_notes(described)
    assert "'long': windows of 20 tokens, 5 samples each" in note
    write_plan_page(description=described, path=tmp_path / "plan.html")
    assert "long: curriculum, 400 tokens, windows of 20" in (tmp_path / "plan.html").read_text()


def test_readers_that_join_no_samples_are_refused(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([4] * 30))}
    plan = Plan.from_spec(plan_of(sources, phase_of("shuffled", {"s": "all"}, seq_length=8)))
    with pytest.raises(PlanError, match="windows of up to 8 tokens, which are several samples of 4"):
        CurriculumDataset(plan)
    again = pickle.loads(pickle.dumps(CurriculumDataset(plan, parts=True)))
    assert again.window(1).tolist() == CurriculumDataset(plan, parts=True).window(0).tolist()


def test_a_phase_is_shortened_until_longer_windows_may_begin(tmp_path):
    """120 tokens are 29 windows of 4 and 9 of 12: 27 samples come first, and 2 windows are not shown."""
    sources = {"s": write_source(tmp_path / "s", numbered_documents([4] * 30), range(30))}
    long = phase_of("shuffled", {"s": "all"}, "long", seq_length=12)
    short = phase_of("curriculum", {"s": "all"}, "short")
    plan = Plan.from_spec(plan_of(sources, short, long))
    assert [phase.num_samples for phase in plan.phases] == [27, 27]
    assert all_samples(plan_of(sources, short, long))[26] == all_samples(plan_of(sources, short))[28]  # its best
    assert plan.describe()["phases"][0]["sources"]["s"]["windows_left_out"] == 2
    with pytest.raises(PlanError, match="give it more tokens"):
        Plan.from_spec(plan_of(sources, short | {"tokens": 8}, long))


def test_lengths_that_do_not_fit_are_refused(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([4] * 30), range(30))}
    first = phase_of("curriculum", {"s": "all"}, "first")
    cases = [
        (phase_of("shuffled", {"s": "all"}, seq_length=10), "no multiple of the plan's seq_length 4.*8 and 12 are"),
        (phase_of("shuffled", {"s": "all"}, seq_length=0), "seq_length: .*greater than 0"),
        (phase_of("shuffled", {"s": {"from": "unseen"}}, seq_length=8), "windows of 4 tokens.*give both phases"),
        (
            phase_of("curriculum", {"s": "all"}, seq_length=8, amended=[{"at": 30, "tokens": 40}]),
            "amended is for phases with the plan's seq_length",
        ),
    ]
    for phase, message in cases:
        with pytest.raises(PlanError, match=message):
            Plan.from_spec(plan_of(sources, first, phase))
    amended = first | {"amended": [{"at": 8, "tokens": 56}]}
    with pytest.raises(PlanError, match="cannot begin; give it tokens: 48"):
        Plan.from_spec(plan_of(sources, amended, phase_of("shuffled", {"s": "all"}, seq_length=12)))
    fits = first | {"amended": [{"at": 8, "tokens": 48}]}
    assert Plan.from_spec(plan_of(sources, fits, phase_of("shuffled", {"s": "all"}, seq_length=12))).num_samples == 39


def test_a_length_may_change_until_its_phase_begins(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([4] * 31), range(31))}
    short = phase_of("shuffled", {"s": "all"}, "short", tokens=96)

    def plan(length: int, tokens: int) -> Plan:
        long = phase_of("shuffled", {"s": "all"}, "long", seq_length=length, tokens=tokens)
        return Plan.from_spec(plan_of(sources, short, long))

    begun = plan(12, 96)
    border = begun.phases[1].first_sample
    plan(8, 96).check_resume(begun.order_record(), border)
    with pytest.raises(ResumeError, match=r"phases.1 \(long\).seq_length was 12 and is now 8"):
        plan(8, 96).check_resume(begun.order_record(), border + 1)
    for consumed in (border + 3, border + math.lcm(3, 8)):
        plan(12, 120).check_resume(begun.order_record(), consumed)  # a shuffled phase may become longer
    assert plan(12, 120).fingerprint != begun.fingerprint
