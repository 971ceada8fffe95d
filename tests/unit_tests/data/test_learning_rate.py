"""Rates that continue from phase to phase, and the warning about a decay that meets a curriculum's best data."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.learning_rate import batch_warnings, mean_rate, rate_at, rate_warnings
from megatron_kaiyuan.data.plan_schema import parse_plan_spec
from megatron_kaiyuan.errors import PlanError
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source


def spec_of(*rates: dict[str, Any] | None) -> dict[str, Any]:
    phases = [
        {"name": f"p{number}", "order": "shuffled", "sources": {"web": "all"}} | ({} if rate is None else {"lr": rate})
        for number, rate in enumerate(rates)
    ]
    return {"seq_length": 4, "sources": {"web": {"shards": "web"}}, "phases": phases}


def test_a_rate_that_jumps_is_refused_with_both_values_and_both_remedies() -> None:
    with pytest.raises(PlanError, match=r"p1\).lr.start: 0.001, but p0 ends at 0.003; make them equal, or.*jump: true"):
        parse_plan_spec(spec_of({"start": 3e-3, "end": 3e-3}, {"start": 1e-3, "end": 1e-3}))


@pytest.mark.parametrize(
    "rates",
    [
        [{"start": 3e-3, "end": 3e-3}, {"start": 1e-3, "end": 1e-3, "jump": True}],
        [{"start": 0, "end": "3e-3", "shape": "warmup"}, {"start": 0.003, "end": 1e-3, "shape": "sqrt"}],
        [None, None],
        [{"start": 1e-3, "end": 1e-3, "jump": True}],
    ],
)
def test_a_rate_that_continues_or_a_jump_that_is_meant_is_accepted(rates: list[dict[str, Any] | None]) -> None:
    parse_plan_spec(spec_of(*rates))


@pytest.mark.parametrize(("has", "missing"), [("01", 0), ("10", 1), ("101", 1)])
def test_a_plan_gives_the_rate_of_all_phases_or_of_none(has: str, missing: int) -> None:
    rate = {"start": 1e-3, "end": 1e-3}
    message = rf"phases.{missing} \(p{missing}\).lr: missing, but p{has.index('1')} has one; give every phase its lr"
    with pytest.raises(PlanError, match=message):
        parse_plan_spec(spec_of(*(rate if given == "1" else None for given in has)))


@given(
    st.sampled_from(["constant", "linear", "warmup", "cosine", "sqrt"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 0.9),
    st.floats(0.01, 0.1),
)
def test_a_mean_rate_lies_between_the_rates_at_its_ends(
    shape: str, start: float, end: float, first: float, width: float
) -> None:
    end = start if shape == "constant" else end
    ends = sorted(rate_at(shape, start, end, place) for place in (first, first + width))
    mean = mean_rate({"shape": shape, "start": start, "end": end}, first, first + width)
    assert ends[0] - 1e-12 <= mean <= ends[1] + 1e-12


def test_the_mean_of_a_line_is_its_middle() -> None:
    assert mean_rate({"shape": "linear", "start": 1.0, "end": 0.0}, 0.8, 1.0) == pytest.approx(0.1)


def described(*phases: tuple[str, dict[str, Any] | None]) -> dict[str, Any]:
    return {
        "phases": [
            {"name": f"p{number}", "lr": lr, "sources": {"web": {"order": order}}}
            for number, (order, lr) in enumerate(phases)
        ]
    }


def line(start: float, end: float) -> dict[str, Any]:
    return {"start": start, "end": end, "shape": "linear"}


ASCENDING, RANDOM = "ascending quality", "random"


@pytest.mark.parametrize(
    ("phases", "warned"),
    [
        ([(ASCENDING, line(1.0, 0.0))], ["p0"]),  # the last fifth: 0.1 of the highest rate
        ([(ASCENDING, line(1.0, 1.0))], []),
        ([(ASCENDING, line(1.0, 1 / 3))], []),  # the moderate decay of the paper
        ([(RANDOM, line(1.0, 0.0))], []),  # nothing to lose
        ([(RANDOM, line(1.0, 1.0)), (ASCENDING, line(0.3, 0.3))], ["p1"]),  # low throughout counts as well
        ([(RANDOM, line(1.0, 1.0)), (ASCENDING, line(0.5, 0.4))], []),
        ([(ASCENDING, None)], []),
        ([(ASCENDING, line(0.0, 0.0))], []),
    ],
)
def test_a_warning_names_the_curricula_whose_best_data_meet_a_small_rate(
    phases: list[tuple[str, dict[str, Any] | None]], warned: list[str]
) -> None:
    warnings = rate_warnings(described(*phases))
    assert [line.split("'")[1] for line in warnings] == warned


def test_a_warning_tells_the_rate_its_share_and_what_to_do() -> None:
    (told,) = rate_warnings(described((ASCENDING, line(1.0, 0.0))))
    assert "mean learning rate of 0.1, 10% of the run's highest (1)" in told
    assert "end at a third of the highest rate or above" in told


def test_the_dry_run_says_which_data_fill_no_last_batch(tmp_path: Path) -> None:
    """40 samples of 4 tokens and 30 that ascend; batches of 16: the last 6 samples, the best ones, are lost."""
    source = {"s": write_source(tmp_path / "s", numbered_documents([4] * 41), range(41))}
    phases = [phase_of("shuffled", {"s": "all"}, "a"), phase_of("curriculum", {"s": "all"}, "b", tokens=120)]
    told = Plan.from_spec(plan_of(source, *phases)).describe()
    assert batch_warnings(told, 10) == []
    (line,) = batch_warnings(told, 16)
    assert line.startswith(
        "the last 6 samples of phase 'b', the best data of its curriculum, fill no global batch of 16"
    )
    for tokens in (96, 160):
        assert f"{tokens}" in line
        whole = plan_of(source, phases[0], phases[1] | {"tokens": tokens})
        assert Plan.from_spec(whole).num_samples % 16 == 0
