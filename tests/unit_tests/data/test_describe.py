"""The dry run tells what the samples then show."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.data.learning_rate import rate_at
from megatron_kaiyuan.errors import PlanError
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

SETTINGS = settings(deadline=None, max_examples=40)


def shown_tokens(order):
    """Predicted tokens by phase, counted one by one."""
    counts = {phase.name: Counter() for phase in order.plan.phases}
    for sample in range(len(order)):
        counts[order.plan.phase_of(sample).name].update(order[sample]["tokens"][1:].tolist())
    return counts


@SETTINGS
@given(
    lengths=st.lists(st.integers(0, 9), min_size=12, max_size=40).filter(lambda some: sum(some) > 60),
    keeps=st.lists(st.sampled_from(["all", "top 40%", "band [20%, 70%)"]), min_size=2, max_size=2),
    repeats=st.lists(st.sampled_from([1, 1.5, 3]), min_size=2, max_size=2),
    bands=st.sampled_from([1, 3, 5, 10]),
    seed=st.integers(0, 9),
)
def test_totals_are_conserved_and_bands_match_a_count_to_a_window(lengths, keeps, repeats, bands, seed):
    scores = np.random.default_rng(seed).permutation(len(lengths))
    documents = numbered_documents(lengths)
    seq_length = 3
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            "s": write_source(Path(folder) / "s", documents, scores),
            "t": write_source(Path(folder) / "t", numbered_documents([5] * 9, 1000)),
        }
        phases = [
            phase_of("curriculum", {"s": {"keep": keep, "repeat": repeat}, "t": "all"}, f"p{n}")
            for n, (keep, repeat) in enumerate(zip(keeps, repeats, strict=True))
        ]
        try:
            order = CurriculumDataset(Plan.from_spec(plan_of(sources, *phases, seq_length=seq_length)))
        except PlanError:
            assume(False)
        told = order.plan.describe(bands)
        counts = shown_tokens(order)
    json.dumps(told)
    assert told["samples"] == len(order) == sum(phase["samples"] for phase in told["phases"])
    assert told["tokens"] == seq_length * len(order)
    for phase in told["phases"]:
        rows = phase["sources"].values()
        assert phase["tokens"] == sum(row["tokens"] for row in rows) == counts[phase["name"]].total()
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(phase["domains"].values()) == pytest.approx(1)
        for name, row in phase["sources"].items():
            mine = sum(count for token, count in counts[phase["name"]].items() if (token >= 1000) == (name == "t"))
            assert row["tokens"] == mine
            assert row["epochs"] == pytest.approx(mine / row["unique_tokens"])
    source = told["sources"]["s"]
    for number, band in enumerate(source["bands"]):
        ranks = [rank for rank in range(len(lengths)) if rank * bands // len(lengths) == number]  # as the monitor
        members = {t for n, document in enumerate(documents) if scores[n] in ranks for t in document}
        assert band["tokens"] == len(members)
        for phase in told["phases"]:
            seen = sum(counts[phase["name"]][token] for token in members)
            assert abs(band["seen"][phase["name"]] - seen) <= 2 * seq_length + 1
    assert source["tokens_seen"] == sum(count for some in counts.values() for t, count in some.items() if t < 1000)


def test_a_hand_made_plan_is_told_exactly(tmp_path):
    """100 documents of 10 tokens: the top 30 % thrice and all once; 1 token of each stream is never predicted."""
    sources = {"s": {**write_source(tmp_path / "s", numbered_documents([10] * 100), range(100)), "domain": "english"}}
    spec = plan_of(
        sources,
        phase_of("shuffled", {"s": "all"}, "a", lr={"start": 0, "end": 1e-3, "shape": "warmup"}),
        phase_of("curriculum", {"s": {"keep": "top 30%", "repeat": 2}}, "b", lr={"start": 1e-3, "end": 1e-3}),
        seq_length=1,
    )
    told = Plan.from_spec(spec).describe()
    assert [phase["tokens"] for phase in told["phases"]] == [999, 599]
    assert told["phases"][1]["first_sample"] == 999
    assert told["phases"][1]["lr"] == {"start": 1e-3, "end": 1e-3, "shape": "constant"}
    assert told["phases"][1]["domains"] == {"english": 1.0}
    row = told["phases"][1]["sources"]["s"]
    assert (row["keep"], row["documents"], row["unique_tokens"], row["order"]) == (
        "top 30%",
        30,
        300,
        "ascending quality",
    )
    assert [round(band["epochs"], 2) for band in told["sources"]["s"]["bands"]] == [1.0] * 7 + [3.0] * 3


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "sqrt", "warmup"])
def test_learning_rate_shapes_run_from_start_to_end_without_leaving_the_range(shape):
    end = 2.0 if shape == "constant" else 0.5
    values = [rate_at(shape, 2.0, end, step / 100) for step in range(101)]
    assert values[0] == 2.0
    assert values[-1] == pytest.approx(end)
    assert values == sorted(values, reverse=True)


def test_the_sqrt_shape_is_the_published_decay():
    assert rate_at("sqrt", 1.0, 0.2, 0.25) == pytest.approx(1.0 * (1 - 0.5) + 0.2 * 0.5)
    assert rate_at("cosine", 1.0, 0.0, 0.5) == pytest.approx(0.5)
    assert rate_at("linear", 1.0, 3.0, 0.5) == pytest.approx(2.0)
