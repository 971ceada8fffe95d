"""A shuffled phase whose length changes while it runs: what is accepted leaves every consumed sample as it was."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ResumeError
from tests.unit_tests.data.tiny import all_samples, numbered_documents, phase_of, plan_of, write_source

SOURCES = {"a": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], "b": [2, 7, 1, 8, 2, 8], "c": [1, 1, 2]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three sources of 44, 28 and 4 tokens, all of them different; the last is shorter than some windows."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        name: write_source(folder / name, numbered_documents(lengths, 1000 * number))
        for number, (name, lengths) in enumerate(SOURCES.items())
    }


@st.composite
def phases(draw):
    """Sources, repetitions, perhaps weights, window length, and two budgets of samples, in either order."""
    names = draw(st.lists(st.sampled_from(sorted(SOURCES)), min_size=1, max_size=3, unique=True))
    weighted = draw(st.booleans())
    parts = {
        name: {"repeat": draw(st.sampled_from([0.5, 1, 1.5, 2, 2.25, 3])), "max_repeat": 50}
        | ({"weight": draw(st.integers(1, 4))} if weighted else {})
        for name in names
    }
    return draw(st.integers(1, 7)), parts, draw(st.integers(1, 60)), draw(st.integers(1, 60))


def opened(written, seq_length, parts, samples):
    phase = phase_of("shuffled", parts, tokens=samples * seq_length)
    return plan_of({name: written[name] for name in parts}, phase, seq_length=seq_length)


@settings(deadline=None, max_examples=250)
@given(case=phases(), data=st.data())
def test_an_accepted_length_leaves_every_consumed_sample_as_it_was(written, case, data):
    seq_length, parts, before, after = case
    try:
        old, new = (Plan.from_spec(opened(written, seq_length, parts, samples)) for samples in (before, after))
    except ValueError:  # a source without a window, or a budget too small to show it
        return
    record = json.loads(json.dumps(old.order_record()))
    consumed = data.draw(st.integers(1, min(before, after)))
    shown = [all_samples(opened(written, seq_length, parts, samples))[:consumed] for samples in (before, after)]
    try:
        new.check_resume(record, consumed)
    except ResumeError:
        assert any(stream["extra_documents"] for plan in (old, new) for stream in streams(plan)), "never without a part"
        return
    assert shown[0] == shown[1]


def streams(plan):
    return plan.order_record()["phases"][0]["sources"].values()


@settings(deadline=None, max_examples=150)
@given(case=phases(), data=st.data())
def test_of_whole_passes_any_length_is_accepted_that_holds_what_was_consumed(written, case, data):
    seq_length, parts, before, after = case
    parts = {name: part | {"repeat": int(np.ceil(part["repeat"]))} for name, part in parts.items()}
    try:
        old, new = (Plan.from_spec(opened(written, seq_length, parts, samples)) for samples in (before, after))
    except ValueError:
        return
    consumed = data.draw(st.integers(1, before))
    if consumed <= after:
        new.check_resume(old.order_record(), consumed)
    else:
        with pytest.raises(ResumeError, match="samples was"):
            new.check_resume(old.order_record(), consumed)


def one(written, samples, repeat):
    parts = {"a": {"repeat": repeat, "max_repeat": 9}}
    return Plan.from_spec(opened(written, 4, parts, samples))


def test_a_stretched_phase_can_be_shortened_to_within_one_pass(written):
    """44 tokens, 10 windows a pass: 45 samples are five passes, and ten of them the first one."""
    long, short = one(written, 45, 1), one(written, 10, 1)
    assert [next(iter(streams(plan)))["passes"] for plan in (long, short)] == [5, 1]
    short.check_resume(long.order_record(), 7)
    long.check_resume(short.order_record(), 7)
    with pytest.raises(ResumeError, match=r"samples was 45 and is now 10"):
        short.check_resume(long.order_record(), 11)


@pytest.mark.parametrize(("consumed", "accepted"), [(10, True), (11, False)])
def test_a_partial_pass_may_become_a_whole_one_until_it_is_reached(written, consumed, accepted):
    """At x1.5 the second pass has half of the documents; grown past it, all of them in another order."""
    short, long = one(written, 16, 1.5), one(written, 30, 1.5)
    for old, new in ((short, long), (long, short)):
        if accepted:
            new.check_resume(old.order_record(), consumed)
        else:
            with pytest.raises(ResumeError, match=r"sources\.a\.extra_documents was \d+ and is now \d+"):
                new.check_resume(old.order_record(), consumed)


def test_a_record_of_another_making_that_tells_no_passes_is_compared_by_what_it_tells(written):
    plan = one(written, 16, 1.5)
    record = plan.order_record()
    for field in ("passes", "extra_documents", "tokens"):
        del record["phases"][0]["sources"]["a"][field]
    plan.check_resume(record, 11)
    record["phases"][0]["sources"]["a"]["documents"] = 1
    with pytest.raises(ResumeError, match="documents was 1"):
        plan.check_resume(record, 11)
