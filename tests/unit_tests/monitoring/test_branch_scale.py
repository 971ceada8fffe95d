"""When the branch scale of a run rises, how far, and what a resumed run begins with."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_kaiyuan.errors import ConfigError, TrainingStopped
from megatron_kaiyuan.model.numerics import FP16_MAX, ActivationPeak
from tests.helpers import run_distributed

LAYER = "decoder.layers.0"
SCALED = (f"{LAYER}.self_attention.linear_proj", f"{LAYER}.mlp.activation", f"{LAYER}.mlp.linear_fc2")
OTHERS = (f"{LAYER}.self_attention.linear_qkv", f"{LAYER}.mlp.linear_fc1", LAYER)
IN_ORDER = (OTHERS[0], SCALED[0], OTHERS[1], SCALED[1], SCALED[2], OTHERS[2])


def peaks(**headroom: float) -> list[ActivationPeak]:
    """Of one layer; the headroom of a name's last part, 1000 where none is given."""
    return [ActivationPeak(name, FP16_MAX / headroom.get(name.split(".")[-1], 1000.0)) for name in IN_ORDER]


def scale(bits: int, raise_below: float = 8.0) -> tuple[Any, list[int]]:
    from megatron_kaiyuan.monitoring.branch_scale import BranchScale  # not above: it imports Megatron

    told: list[int] = []
    return BranchScale(bits, raise_below, told.append), told


@given(st.integers(0, 8), st.floats(1.0, 64.0), st.floats(1e-3, 1e6))
def test_twice_the_asked_headroom_is_left_or_the_end_is_reached(bits: int, below: float, headroom: float) -> None:
    assume(abs(headroom / below - 1) > 1e-9)
    branches, told = scale(bits, below)
    said = branches.after_reading(peaks(linear_fc2=headroom), [])
    tightest = min(headroom, 1000.0)
    if tightest >= below:
        assert (branches.bits, told, said) == (bits, [], None)
        return
    assert said is not None
    assert told == ([branches.bits] if bits < 8 else [])
    assert bits <= branches.bits <= 8
    left = tightest * 2.0 ** (branches.bits - bits)
    assert branches.bits == 8 or 2 * below <= left * (1 + 1e-9)
    assert branches.bits == bits or left < 4 * below * (1 + 1e-9), "no higher than it must be"


@pytest.mark.parametrize("name", SCALED)
def test_what_the_scale_makes_smaller_counts(name: str) -> None:
    branches, told = scale(2)
    said = branches.after_reading(peaks(**{name.split(".")[-1]: 4.0}), [])
    assert told == [4]
    assert said == f"headroom 4 in {name}, below 8: --kaiyuan-branch-scale-bits goes from 2 to 4"


@pytest.mark.parametrize("name", ["linear_qkv", "linear_fc1", "0"])
def test_what_it_cannot_help_does_not(name: str) -> None:
    branches, told = scale(2)
    assert branches.after_reading(peaks(**{name: 1.5}), []) is None
    assert told == []


def test_an_overflow_raises_it_where_it_began_in_a_branch() -> None:
    branches, told = scale(0)
    everything = peaks(linear_fc2=0.5)
    begun_in_branch = [ActivationPeak(p.name, math.inf if p.name in IN_ORDER[4:] else p.peak) for p in everything]
    said = branches.after_reading(begun_in_branch, [])
    assert said == f"overflow in {SCALED[2]}, below 8: --kaiyuan-branch-scale-bits goes from 0 to 4"
    begun_elsewhere = [ActivationPeak(p.name, math.nan if p.name in IN_ORDER[2:] else p.peak) for p in everything]
    assert branches.after_reading(begun_elsewhere, []) is None
    assert told == [4]


@pytest.mark.parametrize("overflowed", ["output_layer", "decoder.layers.1.mlp.linear_fc1"])
def test_what_was_finite_before_an_overflow_elsewhere_still_counts(overflowed: str) -> None:
    """An overflowed logit does no harm under the soft-cap: such a run trains on, and its products grow."""
    branches, told = scale(4)
    said = branches.after_reading([*peaks(linear_fc2=2.0), ActivationPeak(overflowed, math.inf)], [])
    assert told == [7]
    assert said is not None
    assert said.startswith(f"headroom 2 in {SCALED[2]}")


def test_the_end_is_told_once() -> None:
    branches, told = scale(8)
    said = branches.after_reading(peaks(linear_fc2=2.0), [])
    assert said is not None
    assert "is 8 already, its end" in said
    assert branches.after_reading(peaks(linear_fc2=1.5), []) is None
    assert told == []


def arguments(bits: int, below: float = 8.0, *, fp16: bool = True, interval: int = 100) -> argparse.Namespace:
    return argparse.Namespace(
        kaiyuan_branch_scale_bits=bits,
        kaiyuan_raise_branch_scale_below=below,
        kaiyuan_activation_interval=interval,
        fp16=fp16,
    )


@pytest.mark.parametrize(
    ("now", "saved", "expected"),
    [
        (arguments(4), None, 4),
        (arguments(4), arguments(6), 6),
        (arguments(8), arguments(6), 8),
        (arguments(4), argparse.Namespace(), 4),  # from before it existed
        (arguments(4, below=0.0), arguments(6), 4),
        (arguments(4, fp16=False, interval=0), arguments(6), 4),
    ],
)
def test_a_resumed_run_begins_where_it_had_come(
    now: argparse.Namespace, saved: argparse.Namespace | None, expected: int
) -> None:
    from megatron_kaiyuan.monitoring.branch_scale import branch_scale_of, continue_branch_scale

    before = now.kaiyuan_branch_scale_bits
    said = continue_branch_scale(now, saved)
    assert now.kaiyuan_branch_scale_bits == expected
    assert (said is not None) == (before != expected)
    branches = branch_scale_of(now)
    if not now.fp16 or not now.kaiyuan_raise_branch_scale_below:
        assert branches is None
        return
    assert branches is not None
    branches.after_reading(peaks(linear_proj=3.0), [])
    assert now.kaiyuan_branch_scale_bits == min(8, expected + 3), "the next checkpoint says so"


def test_without_a_meter_it_is_refused() -> None:
    from megatron_kaiyuan.monitoring.branch_scale import continue_branch_scale

    with pytest.raises(ConfigError, match="--kaiyuan-activation-interval 0 leaves those after skipped steps"):
        continue_branch_scale(arguments(4, interval=0), None)
    continue_branch_scale(arguments(4, below=0.0, interval=0), None)


def monitored(**options: Any) -> tuple[Any, Any, list[str]]:
    """A monitor of a run that has no model, whose scale begins at 0, and what it says."""
    from megatron_kaiyuan.monitoring.branch_scale import BranchScale
    from megatron_kaiyuan.monitoring.monitor import MonitorOptions, RunMonitor
    from megatron_kaiyuan.monitoring.source_counters import SourceCounters

    said: list[str] = []
    branches = BranchScale(options.pop("bits", 0), 8.0, lambda _bits: None)
    settings = MonitorOptions(log_interval=10, seq_length=8, branch_scale_bits=branches.bits, **options)
    return RunMonitor(settings, SourceCounters(()), lambda *_scalar: None, said.append, branches), branches, said


def test_what_was_skipped_before_a_rise_does_not_stop_the_run_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit_tests.monitoring.test_monitor import step

    monitor, branches, said = monitored(max_skipped_steps=3)
    everything = [ActivationPeak(SCALED[2], math.inf)]
    monkeypatch.setattr("megatron_kaiyuan.monitoring.monitor._gathered", lambda _peaks: [everything])
    monkeypatch.setattr(monitor, "_explain_skip", lambda _step: None)
    for iteration in (1, 2, 3):  # the reading of step 2 raises K to 4, that of step 3 to 8
        monitor.after_step(step(iteration, loss_scale=1.0))
    assert branches.bits == 8
    assert sum("goes from" in line for line in said) == 2
    monitor.after_step(step(4, loss_scale=1.0))
    with pytest.raises(TrainingStopped, match="with --kaiyuan-branch-scale-bits 8, which"):
        monitor.after_step(step(5, loss_scale=1.0))


def test_a_run_that_began_with_all_bits_is_not_advised_to_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit_tests.monitoring.test_monitor import step

    monitor, _, _ = monitored(max_skipped_steps=1, bits=8)
    monkeypatch.setattr(monitor, "_explain_skip", lambda _step: None)
    with pytest.raises(TrainingStopped, match="Resume from an earlier checkpoint with a lower learning rate"):
        monitor.after_step(step(1))


def test_a_line_has_the_tightest_reading_since_the_one_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.unit_tests.monitoring.test_monitor import step

    metrics = tmp_path / "metrics.jsonl"
    monitor, branches, _ = monitored(activation_interval=3, metrics=metrics)
    monkeypatch.setattr(monitor.counters, "take", dict)
    headrooms = iter((100.0, 2.0, 32.0))
    monkeypatch.setattr(
        "megatron_kaiyuan.monitoring.monitor._gathered", lambda _peaks: [peaks(linear_fc2=next(headrooms))]
    )
    for iteration in range(1, 11):
        monitor.after_step(step(iteration, skipped=False))
    [line] = [json.loads(text) for text in metrics.read_text().splitlines()]
    assert line["activations"][SCALED[2]] == FP16_MAX / 2
    assert (line["activations_step"], line["activations_branch_scale_bits"]) == (6, 0)
    assert line["branch_scale_bits"] == branches.bits == 3


def test_a_step_that_is_due_after_a_resume_is_metered() -> None:
    for iteration, due in ((3, True), (4, False), (0, False)):
        monitor, _, _ = monitored(activation_interval=4)
        monitor.resume(iteration, 8 * iteration)
        assert monitor._metering is due


def rise(_rank: int) -> dict[str, Any]:
    """Entry of `run_distributed`: a model whose second layer overflows at K = 0, through the monitor."""
    import torch

    from megatron_kaiyuan.monitoring.branch_scale import BranchScale
    from megatron_kaiyuan.monitoring.monitor import MonitorOptions, RunMonitor
    from megatron_kaiyuan.monitoring.source_counters import SourceCounters
    from tests.unit_tests.model import tiny
    from tests.unit_tests.model.reference import Features, Shape, random_batch
    from tests.unit_tests.monitoring.test_monitor import step

    tiny.initialize_parallel(1, 1)
    features = Features(qk_norm=True, sandwich=True, softcap=30.0)
    case = tiny.Case(name="", shape=Shape(layers=3), features=features, half=True, raised_to=0)
    model = tiny.build_stage(case)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc1.weight.fill_(0.5)
        model.decoder.layers[1].mlp.linear_fc2.weight.fill_(30000.0)
    for parameter in model.parameters():
        parameter.main_grad = torch.full_like(parameter, math.inf, dtype=torch.float32)
    tokens, _ = random_batch(case.shape)
    said: list[str] = []
    options = MonitorOptions(log_interval=100, seq_length=8)
    monitor = RunMonitor(options, SourceCounters(()), None, said.append, BranchScale(0, 8.0, lambda _bits: None))
    monitor.observe(model)
    finite = []
    for iteration in range(1, 6):
        with torch.no_grad():
            model.eval()  # an evaluation between two steps is not the reading of the next one
            model(tokens, torch.arange(case.shape.sequence).expand_as(tokens), None)
            evaluated = [peak for meter in monitor._meters for peak in meter.read()]
            model.train()
            logits = model(tokens, torch.arange(case.shape.sequence).expand_as(tokens), None)
        finite.append(bool(logits.isfinite().all()))
        metered = monitor._metering
        assert not (metered and evaluated)
        monitor.after_step(step(iteration, skipped=not finite[-1]))
    return {"finite": finite, "said": [line for line in said if "goes from" in line]}


@pytest.mark.distributed
def test_an_overflow_is_over_after_the_step_that_is_metered() -> None:
    [seen] = run_distributed(rise, 1)
    assert not seen["finite"][0]
    assert seen["finite"][-1], seen
    assert "overflow in decoder.layers.1.mlp.linear_fc2" in seen["said"][0]
