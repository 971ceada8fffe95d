"""Counting by source and band, the metrics file, and when a run is stopped."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.errors import TrainingStopped
from megatron_kaiyuan.monitoring.metrics_file import append_metrics, read_metrics
from megatron_kaiyuan.monitoring.source_counters import NUM_BANDS, SourceCounters
from tests.helpers import run_distributed

SOURCES = ("a", "b", "c")


def batch(seed: int, rows: int = 4, length: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, len(SOURCES), (rows,), generator=generator),
        "bands": torch.randint(0, 9, (rows, NUM_BANDS), generator=generator),
        "losses": torch.randn(rows, length, generator=generator),
        "mask": torch.randint(0, 2, (rows, length), generator=generator).float(),
    }


def brute_force(batches: list[dict[str, torch.Tensor]]) -> dict[str, tuple[float, int, list[int]]]:
    found: dict[str, tuple[float, int, list[int]]] = {name: (0.0, 0, [0] * NUM_BANDS) for name in SOURCES}
    for one in batches:
        for row, number in enumerate(one["ids"].tolist()):
            loss, tokens, bands = found[SOURCES[number]]
            for value, counts in zip(one["losses"][row].tolist(), one["mask"][row].tolist(), strict=True):
                loss, tokens = loss + (value if counts else 0.0), tokens + int(counts)
            more = one["bands"][row].tolist()
            found[SOURCES[number]] = loss, tokens, [a + b for a, b in zip(bands, more, strict=True)]
    return found


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 10_000), max_size=4))
def test_sums_by_source_are_those_of_a_loop_over_the_tokens(seeds: list[int]) -> None:
    counters = SourceCounters(SOURCES)
    batches = [batch(seed) for seed in seeds]
    for one in batches:
        counters.add(one["ids"], one["bands"], one["losses"], one["mask"])
    if not batches:
        return
    for name, (loss, tokens, bands) in brute_force(batches).items():
        sums = counters._sums
        assert sums is not None
        row = sums[SOURCES.index(name)].tolist()
        assert row[0] == pytest.approx(loss, rel=1e-6, abs=1e-9)
        assert [round(value) for value in row[1:]] == [tokens, *bands]


def test_a_masked_nan_is_not_counted() -> None:
    counters = SourceCounters(SOURCES)
    losses = torch.tensor([[math.nan, 2.0]])
    counters.add(torch.tensor([1]), torch.zeros(1, NUM_BANDS, dtype=torch.int64), losses, torch.tensor([[0.0, 1.0]]))
    sums = counters._sums
    assert sums is not None
    assert sums[1, :2].tolist() == [2.0, 1.0]


def count_on_rank(rank: int) -> list[dict[str, Any]]:
    """Entry of `run_distributed`: the last rank loads nothing, as a middle pipeline stage does."""
    counters = SourceCounters(SOURCES)
    taken = []
    for turn in range(2):
        if rank == 0:
            one = batch(turn)
            counters.add(one["ids"], one["bands"], one["losses"], one["mask"])
        sums = counters.take()
        taken.append({name: (source.loss_sum, source.tokens, source.bands) for name, source in sums.items()})
    return taken


@pytest.mark.distributed
def test_all_ranks_get_the_sums_of_all_ranks_and_start_again_at_zero() -> None:
    first, second = run_distributed(count_on_rank, 2)
    assert first == second
    for turn in range(2):
        for name, (loss, tokens, bands) in brute_force([batch(turn)]).items():
            assert first[turn][name][0] == pytest.approx(loss, rel=1e-6, abs=1e-9)
            assert first[turn][name][1:] == (tokens, tuple(bands))


def test_metrics_of_repeated_steps_are_those_written_last(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for iteration, loss in ((10, 3.0), (20, 2.0), (30, 1.0), (20, 5.0)):
        append_metrics(path, {"iteration": iteration, "loss": loss})
    assert read_metrics(path) == [{"iteration": 10, "loss": 3.0}, {"iteration": 20, "loss": 5.0}]
    assert read_metrics(path, last_iteration=10) == [{"iteration": 10, "loss": 3.0}]
    assert read_metrics(tmp_path / "absent") == []


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_line_torn_at_any_place_spoils_neither_its_neighbours_nor_what_follows(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"iteration": 1})
    torn = json.dumps({"iteration": 2})[:cut]
    with path.open("a") as file:
        file.write(torn)
    append_metrics(path, {"iteration": 3})
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 3}]


def step(iteration: int, *, skipped: bool = True, loss_scale: float = 8.0, loss: float | None = None) -> Any:
    from megatron_kaiyuan.monitoring.monitor import StepReport  # not above: it imports Megatron

    return StepReport(
        iteration=iteration,
        consumed_samples=iteration,
        trained_samples=iteration,
        skipped=skipped,
        loss_scale=loss_scale,
        learning_rate=1.0,
        grad_norm=None,
        loss=loss,
    )


def overflowing_model(weights: dict[str, float]) -> tuple[Any, Any]:
    """A tiny FP16 model whose second layer overflows for such weights of its MLP, and what computes it once."""
    from tests.unit_tests.model import tiny
    from tests.unit_tests.model.reference import Features, Shape, random_batch

    tiny.initialize_parallel(1, 1)
    case = tiny.Case(name="overflow", shape=Shape(layers=3), features=Features(qk_norm=True, softcap=30.0), half=True)
    model = tiny.build_stage(case)
    with torch.no_grad():
        for name, value in weights.items():
            getattr(model.decoder.layers[1].mlp, name).weight.fill_(value)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    tokens, _ = random_batch(case.shape)
    return model, lambda: model(tokens, torch.arange(case.shape.sequence).expand_as(tokens), None)


def watch_overflows(_rank: int) -> dict[str, Any]:
    """Entry of `run_distributed`: what is said of overflows in different places."""
    return {
        "linear_fc2": watch({"linear_fc1": 1.0, "linear_fc2": 60000.0}),
        "linear_fc1": watch({"linear_fc1": 60000.0}),
        "reasons": explain_skips(),
    }


def watch(weights: dict[str, float]) -> dict[str, Any]:
    """A run that skips every step."""
    from megatron_kaiyuan.monitoring.monitor import MonitorOptions, RunMonitor

    model, compute = overflowing_model(weights)
    model.decoder.layers[1].mlp.linear_fc1.weight.main_grad.fill_(math.inf)
    said: list[str] = []
    scalars: dict[str, float] = {}
    options = MonitorOptions(log_interval=100, max_skipped_steps=3, activation_interval=0, seq_length=8)
    monitor = RunMonitor(
        options, SourceCounters(()), lambda name, value, _step: scalars.update({name: value}), said.append
    )
    monitor.observe(model)
    error = ""
    for iteration in range(1, 10):
        compute()
        try:
            monitor.after_step(step(iteration, loss_scale=2.0**-iteration))
        except TrainingStopped as stopped:
            error = f"{iteration}: {stopped}"
            break
    return {"error": error, "said": said, "headroom": scalars["activations/FP16 headroom"]}


def explain_skips() -> list[str]:
    """What is said of a skipped step: gradients all infinite, by loss; then one finite, with the loss unknown."""
    from megatron_kaiyuan.monitoring.monitor import MonitorOptions, RunMonitor

    said: list[str] = []
    monitor = RunMonitor(MonitorOptions(log_interval=100, seq_length=8), SourceCounters(()), None, said.append)
    model, _ = overflowing_model({})
    monitor.observe(model)
    for parameter in model.parameters():
        parameter.main_grad.fill_(math.inf)
    for iteration, loss in enumerate((math.nan, None, 4.5), start=1):
        monitor.after_step(step(iteration, loss=loss))
    model.output_layer.weight.main_grad.zero_()
    monitor.after_step(step(4))
    return said


@pytest.fixture(scope="module")
def overflows() -> dict[str, Any]:
    [seen] = run_distributed(watch_overflows, 1)
    return dict(seen)


@pytest.mark.distributed
def test_a_run_that_only_skips_is_stopped_and_the_layer_that_overflowed_is_named(overflows: dict[str, Any]) -> None:
    seen = overflows["linear_fc2"]
    assert seen["error"].startswith("3: 3 steps in a row were skipped, the loss scale is down to 0.125 at step 3")
    assert "not finite is that of decoder.layers.1.mlp.linear_fc2" in seen["error"]
    assert seen["headroom"] == 0.0
    assert any("the deepest is that of decoder.layers.1.mlp.linear_fc1.weight" in line for line in seen["said"])


@pytest.mark.distributed
def test_a_matrix_product_comes_before_the_activation_that_reads_it(overflows: dict[str, Any]) -> None:
    assert "not finite is that of decoder.layers.1.mlp.linear_fc1." in overflows["linear_fc1"]["error"]


@pytest.mark.distributed
def test_gradients_are_blamed_only_where_the_forward_pass_was_finite(overflows: dict[str, Any]) -> None:
    of_nan, of_unknown, of_finite, of_some = overflows["reasons"]
    assert "step 1 was skipped: the forward pass overflowed" in of_nan
    assert "step 2 was skipped: the forward pass overflowed" in of_unknown
    assert "the deepest is that of output_layer.weight" in of_finite
    assert "the deepest is that of decoder.final_layernorm.weight" in of_some


def stopped_at(skipped: str, *, limit: int, scale: float = 1.0, minimum: float = 1.0) -> str:
    """Step and message of the stop of a run; `x` is a skipped step."""
    from megatron_kaiyuan.monitoring.monitor import MonitorOptions, RunMonitor

    options = MonitorOptions(
        log_interval=1000, activation_interval=0, max_skipped_steps=limit, min_loss_scale=minimum, seq_length=8
    )
    monitor = RunMonitor(options, SourceCounters(()), None, lambda _line: None)
    for iteration, mark in enumerate(skipped, start=1):
        try:
            monitor.after_step(step(iteration, skipped=mark == "x", loss_scale=scale))
        except TrainingStopped as stopped:
            return f"{iteration}: {stopped}"
    return ""


def test_a_run_that_skips_every_other_step_at_the_smallest_loss_scale_is_stopped() -> None:
    message = stopped_at("x." * 20, limit=4)
    assert message.startswith("7: 4 of the last 8 steps were skipped with the loss scale at its minimum, 1 at step 7")
    assert "--kaiyuan-max-skipped-steps 0" in message
    assert stopped_at("x." * 20, limit=4, scale=16.0, minimum=16.0)


@pytest.mark.parametrize(
    ("skipped", "scale"),
    [
        ("x." * 20, 2.0),  # the scale can still fall
        ("x.." * 20, 1.0),  # no eight steps hold four skipped ones
        ("xxx......" * 5, 1.0),
    ],
)
def test_a_run_that_advances_goes_on(skipped: str, scale: float) -> None:
    assert stopped_at(skipped, limit=4, scale=scale) == ""


def test_no_limit_means_that_no_run_is_stopped() -> None:
    assert stopped_at("x" * 300, limit=0) == ""
