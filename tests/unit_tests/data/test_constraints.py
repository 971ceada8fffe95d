"""Domain bounds: which plans they refuse, what the refusal says, and that its numbers mend the plan."""

import re
from fractions import Fraction
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.reporting.plan_table import plan_tables

SETTINGS = settings(deadline=None, max_examples=60)


def source(tokens, domain=None):
    """Documents of ten tokens; a stream of `T` tokens has `T - 1` windows of one token, so shares are near tokens'."""
    return {"shards": "none", "domain": domain, "expected": {"documents": tokens // 10, "tokens": tokens}}


def plan(domains, phases=({"a": 600, "b": 300, "c": 100},), tokens=None):
    """One phase for each mapping of source to tokens; a and b are of domain x, c is a domain of its own."""
    sizes = {name: size for phase in phases for name, size in phase.items()}
    spec = {
        "seq_length": 1,
        "sources": {name: source(size, {"a": "x", "b": "x"}.get(name)) for name, size in sizes.items()},
        "phases": [
            {"name": f"p{n}", "order": "shuffled", "tokens": tokens, "sources": dict.fromkeys(phase)}
            for n, phase in enumerate(phases)
        ],
        "domains": domains,
    }
    return Plan.from_spec(spec, simulate=True)


def test_a_bound_that_holds_changes_nothing_and_is_told():
    bounded, free = plan({"x": {"min": "80%", "max": "95%"}}), plan({})
    assert bounded.order_record() == free.order_record()
    assert bounded.fingerprint == free.fingerprint
    told = bounded.describe()
    assert told["domains"] == {"x": 898 / 997, "c": 99 / 997}
    assert told["domain_bounds"] == [
        {
            "domain": "x",
            "scope": "run",
            "phase": None,
            "tokens": 898,
            "share": 898 / 997,
            "min": 0.8,
            "max": 0.95,
            "met": True,
            "on_violation": "error",
        }
    ]
    assert free.describe()["domain_bounds"] == []


def test_a_bound_is_exact_where_nothing_is_rounded():
    """99 of 997 samples are of domain c: it may be the bound, and one more in 10^9 may not."""
    plan({"c": {"max": "99/997", "min": "99/997"}})
    for bound in ({"max": "98999999999/997000000000"}, {"min": "99000000001/997000000000"}):
        with pytest.raises(PlanError, match=r"domains\.c: 9\.93% of the run, 99 of 997 tokens \(c\)"):
            plan({"c": bound})


def test_a_phase_may_break_what_the_run_keeps():
    phases = ({"a": 600, "c": 600}, {"a": 600, "b": 800})
    plan({"c": {"max": "30%"}}, phases)
    with pytest.raises(PlanError) as refusal:
        plan({"c": {"max": "30%", "scope": "phase"}, "x": {"min": "60%", "scope": "phase"}}, phases)
    text = str(refusal.value)
    assert text.startswith("plan: 2 broken domain bounds\n")
    assert "domains.c: 50.00% of phase 'p0', 599 of 1,198 tokens (c), above max 0.3." in text
    assert "Show at most 256 tokens of it, or at least 1,398 of others" in text
    assert "set scope: run" in text
    assert "domains.x: 50.00% of phase 'p0', 599 of 1,198 tokens (a), below min 0.6." in text
    assert "Show at least 899 tokens of it, or at most 399 of others" in text
    assert "'p1'" not in text


def test_a_domain_that_a_phase_lacks_has_no_share_of_it():
    phases = ({"a": 600, "c": 100}, {"a": 600})
    plan({"c": {"max": "50%", "scope": "phase"}}, phases)
    with pytest.raises(PlanError, match=r"0\.00% of phase 'p1', 0 of 599 tokens \(no source of it there\), below min"):
        plan({"c": {"min": "5%", "scope": "phase"}}, phases)


def test_a_bound_that_only_reports_lets_the_plan_open_and_is_marked():
    opened = plan({"c": {"max": "5%", "on_violation": "report"}, "x": {"min": "5%"}})
    assert [bound["met"] for bound in opened.describe()["domain_bounds"]] == [False, True]
    console = Console(width=160, file=StringIO())
    console.print(plan_tables(opened.describe()))
    rows = [line for line in console.file.getvalue().splitlines() if "the run" in line and "│" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["c", "x"]
    assert [row.split("│")[7].strip() for row in rows] == ["NO (reported only)", "yes"]


@SETTINGS
@given(budget=st.integers(20, 500), share=st.fractions(0, 1, max_denominator=40))
def test_a_budget_may_miss_a_share_by_the_rounding_of_its_mix_alone(budget, share):
    """The natural share of c is 99 / 997 = p; three streams round by at most 1.5 samples."""
    bound = {"c": {"max": str(share)}}
    counts = plan({}, tokens=budget).phases[0].used.tolist()
    if counts[2] - Fraction(3, 2) <= share * budget:
        plan(bound, tokens=budget)
    else:
        with pytest.raises(PlanError, match="above max"):
            plan(bound, tokens=budget)
    if share >= Fraction(99, 997):  # what the mix asks for keeps the bound, so its rounding may not break it
        plan(bound, tokens=budget)


@SETTINGS
@given(
    own=st.integers(50, 400),
    others=st.integers(50, 400),
    percent=st.integers(1, 99),
    side=st.sampled_from(["min", "max"]),
)
def test_the_remedies_in_the_message_mend_the_plan_and_one_token_less_does_not(own, others, percent, side):
    def samples(own, others):  # a stream of T tokens in documents of one token has T - 1 samples
        spec = {
            "seq_length": 1,
            "sources": {
                name: {"shards": "none", "expected": {"documents": size + 1, "tokens": size + 1}}
                for name, size in (("own", own), ("others", others))
            },
            "phases": [{"name": "p", "order": "shuffled", "sources": {"own": "all", "others": "all"}}],
            "domains": {"own": {side: f"{percent}%"}},
        }
        return Plan.from_spec(spec, simulate=True)

    try:
        samples(own, others)
    except PlanError as refusal:
        found = re.search(
            r"Show at (?:most|least) ([\d,]+) tokens? of it, or at (?:most|least) ([\d,]+) of others", str(refusal)
        )
        new_own, new_others = (int(number.replace(",", "")) for number in found.groups())
        worse = 1 if side == "max" else -1
        for fixed, broken in (
            ((new_own, others), (new_own + worse, others)),
            ((own, new_others), (own, new_others - worse)),
        ):
            if min(fixed) > 0:
                samples(*fixed)
            if min(broken) > 0:
                with pytest.raises(PlanError):
                    samples(*broken)
    else:
        kept = Fraction(own, own + others)
        assert kept <= Fraction(percent, 100) if side == "max" else kept >= Fraction(percent, 100)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"x": {}}, r"domains\.x: neither min nor max"),
        ({"x": {"min": "40%", "max": "30%"}}, r"domains\.x: min 0\.4 is above max 0\.3"),
        ({"x": {"max": 30}}, r"domains\.x\.max: '30' is not between 0% and 100%; did you mean 30%\?"),
        ({"x": {"max": True}}, r"domains\.x\.max: true and false are not a share"),
        ({"x": {"max": "much"}}, r"domains\.x\.max: 'much' is not a fraction"),
        ({"x": {"max": "30%", "scope": "epoch"}}, r"domains\.x\.scope"),
        ({"x": {"max": "30%", "on_violation": "warn"}}, r"domains\.x\.on_violation"),
        ({"x": {"maximum": "30%"}}, r"domains\.x\.maximum: unknown key"),
        ({"a": {"max": "30%"}}, r"domains\.a: no source is of this domain; known are x, c"),
    ],
)
def test_a_bound_that_means_nothing_is_refused_with_its_field(domains, message):
    with pytest.raises(PlanError, match=message):
        plan(domains)


@pytest.mark.parametrize(
    ("bound", "remedy"),
    [({"max": 0}, "Leave out its 99 tokens"), ({"min": 1}, "Leave out the 898 tokens of other domains")],
)
def test_bounds_at_the_ends_have_a_remedy_too(bound, remedy):
    with pytest.raises(PlanError, match=remedy):
        plan({"c": bound})
