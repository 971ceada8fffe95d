"""The weight that data keep in the final weights, against the recursion of AdamW itself, step by step."""

import numpy as np
import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.learning_rate import rate_at
from megatron_kaiyuan.data.plan_schema import parse_plan_spec
from megatron_kaiyuan.data.retention import (
    averaging_weights,
    effective_tokens,
    kept_weights,
    repetition_notes,
    repetition_warnings,
    retention_warnings,
)
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.reporting.plan_page import write_plan_page
from megatron_kaiyuan.reporting.plan_table import plan_tables
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

HIGH, FALLING = {"start": 3e-2, "end": 3e-2}, {"start": 3e-2, "end": 0.0, "shape": "linear"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """6,400 samples at a constant rate, then 6,400 that ascend while it falls to nothing; steps of 10 samples."""
    source = write_source(tmp_path_factory.mktemp("s") / "s", numbered_documents([4] * 6401), range(6401))
    phases = [
        phase_of("shuffled", {"s": "all"}, "broad", tokens=25_600, lr=HIGH),
        phase_of("curriculum", {"s": "all"}, "ramp", tokens=25_600, lr=FALLING),
    ]
    return Plan.from_spec(plan_of({"s": source}, *phases))


def recursion(plan, decay, checkpoints):
    """Coefficients of every step's update in the average, by AdamW's own recursion on unit vectors."""
    steps = plan.num_samples // 10
    state, average = np.zeros(steps), np.zeros(steps)
    for step in range(steps):
        phase = plan.phase_of(10 * step)
        rate = rate_at(
            phase.lr.shape, phase.lr.start, phase.lr.end, (10 * step - phase.first_sample) / phase.num_samples
        )
        state *= 1 - rate * decay
        state[step] += rate * decay
        average += checkpoints.get(step + 1, 0.0) * state
    return average


@pytest.mark.parametrize("decay", [0.1, 0.9])
@pytest.mark.parametrize("averaging", [None, {"last": 5, "every": 40, "weights": "wma"}, {"last": 3, "every": 200}])
def test_kept_weights_are_those_of_the_recursion(plan, decay, averaging):
    parsed = averaging_of(**averaging) if averaging else None
    steps = plan.num_samples // 10
    shares = averaging_weights(parsed.weights, parsed.last).tolist() if parsed else [1.0]
    places = [steps - parsed.every * back for back in reversed(range(parsed.last))] if parsed else [steps]
    exact = recursion(plan, decay, dict(zip(places, shares, strict=True)))
    kept = kept_weights(plan.phases, 10, decay, parsed).ravel()
    assert np.abs(exact.reshape(128, 10).mean(axis=1) - kept).max() < 0.06 * exact.max()


def test_a_decay_to_nothing_takes_the_weight_of_the_best_data(plan, tmp_path):
    rows = plan.retained(10, 0.1)
    assert [(row["phase"], row["ascending"]) for row in rows] == [("broad", False), ("ramp", True)]
    ramp = rows[1]["bands"]
    assert min(ramp) == ramp[-1] < 0.15 < 0.8 < ramp[0]
    (line,) = retention_warnings(rows)
    assert "phase 'ramp', source 's': a token of its best band keeps" in line
    told = plan.describe() | {"retained": rows}
    assert len(plan_tables(told, 10).renderables) == len(plan_tables(plan.describe(), 10).renderables) + 2
    write_plan_page(told, tmp_path / "plan.html")
    assert "What the final weights keep" in (tmp_path / "plan.html").read_text()


def test_a_plan_without_rates_or_with_too_long_an_average_is_refused(plan, tmp_path):
    source = write_source(tmp_path / "s", numbered_documents([4] * 40), range(40))
    with pytest.raises(PlanError, match="depends on the learning rate, and the plan has none"):
        Plan.from_spec(plan_of({"s": source}, phase_of("shuffled", {"s": "all"}))).retained(2, 0.1)
    long = plan_of({"s": source}, phase_of("shuffled", {"s": "all"}, lr=HIGH), averaging={"last": 3, "every": 20})
    with pytest.raises(PlanError, match="3 checkpoints, 20 steps apart, reach back before the first of 20 steps"):
        Plan.from_spec(long).retained(2, 0.1)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_weights_of_a_decay_give_each_update_the_share_of_a_decayed_rate(shape, count):
    weights = averaging_weights(f"decay:{shape}", count)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    for update in range(1, count):  # the update between checkpoints `update - 1` and `update` is in all later ones
        share = rate_at(shape, 1.0, 0.0, (update - 0.5) / (count - 1))
        assert weights[update:].sum() == pytest.approx(share)


def averaging_of(**fields):
    spec = plan_of({"s": {"shards": "x"}}, phase_of("shuffled", {"s": "all"}), averaging=fields)
    return parse_plan_spec(spec).averaging


def test_a_duration_counts_checkpoints_and_a_decay_is_a_weighting():
    found = averaging_of(every=400, duration=2800, weights={"as_decay": "sqrt"})
    assert (found.last, found.every, found.weights) == (8, 400, "decay:sqrt")
    for fields, message in (
        ({"every": 400, "duration": 1000}, "duration 1000 is no multiple of every 400"),
        ({"every": 400, "duration": 800, "last": 3}, "say the same in two ways"),
        ({"every": 400, "last": 3, "weights": {"as_decay": "quick"}}, "is not a weighting; write mean, wma"),
        ({"every": 400, "last": 3, "weights": {"decay": "sqrt"}}, "write {as_decay: linear}"),
    ):
        with pytest.raises(PlanError, match=message):
            averaging_of(**fields)


def test_repeated_tokens_are_worth_what_the_law_says():
    """By hand: 10 more passes are worth 15.39 (1 - exp(-10 / 15.39)) = 7.35, each the less the later it comes."""
    assert effective_tokens(100, 100) == 100
    assert effective_tokens(100, 40) == 40, "a part of one pass"
    assert effective_tokens(100, 1100) == pytest.approx(100 + 735.3, abs=0.2)
    worths = np.diff([effective_tokens(100, 100 * passes) for passes in range(1, 60)])
    assert np.all(np.diff(worths) < 0)
    assert 90 < worths[0] < 100
    assert effective_tokens(100, 10**9) == pytest.approx(100 * 16.387756)


def test_a_band_that_is_seen_often_is_warned_of():
    sources = {"a": {"shards": "none", "score": "s", "expected": {"documents": 1000, "tokens": 100_000}}}
    for repeat, lines in ((4, 0), (5, 1)):
        phase = {"name": "p", "order": "shuffled", "sources": {"a": {"keep": "top 10%", "repeat": repeat}}}
        told = Plan.from_spec({"seq_length": 100, "sources": sources, "phases": [phase]}, simulate=True).describe()
        assert len(repetition_warnings(told)) == lines
        assert len(repetition_notes(told)) == 1
