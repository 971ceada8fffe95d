"""The plan's learning rate follows the samples, whatever the optimizer did with them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_kaiyuan.data.plan_schema import LearningRateSpec
from megatron_kaiyuan.training.scheduler import PlannedScheduler, learning_rate_at, plan_has_learning_rate

WARM = LearningRateSpec(start=1.0, end=3.0, shape="warmup")
FLAT = LearningRateSpec(start=3.0, end=3.0)
SQRT = LearningRateSpec(start=3.0, end=1.0, shape="sqrt")


def fake_plan(*rates: LearningRateSpec | None, length: int = 8) -> Any:
    """Phases of `length` samples each."""
    phases = [
        SimpleNamespace(name=f"phase{number}", first_sample=number * length, num_samples=length, lr=rate)
        for number, rate in enumerate(rates)
    ]
    return SimpleNamespace(
        phases=phases, num_samples=length * len(phases), phase_of=lambda sample: phases[sample // length]
    )


def fake_optimizer(*groups: dict[str, Any]) -> Any:
    """Megatron's wrapper as far as the scheduler knows it, around a real torch optimizer."""
    parameters = [{"params": [torch.nn.Parameter(torch.ones(1))], **group} for group in groups or ({},)]
    inner = torch.optim.SGD(parameters, lr=123.0)
    return SimpleNamespace(optimizer=inner, param_groups=inner.param_groups)


def build(plan: Any, optimizer: Any, progress: Any) -> PlannedScheduler:
    return PlannedScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=3.0,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=24,
        lr_decay_style="linear",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=24,
        wd_incr_style="constant",
        plan=plan,
        consumed_samples=lambda: progress.consumed,
    )


@pytest.fixture(autouse=True)
def _first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron asks the environment for its rank before it logs."""
    monkeypatch.setenv("RANK", "0")


@pytest.mark.parametrize(
    ("sample", "expected"),
    [(0, 1.0), (4, 2.0), (7, 2.75), (8, 3.0), (15, 3.0), (16, 3.0), (18, 2.0), (24, 1.0), (99, 1.0)],
)
def test_each_phase_has_its_own_shape_from_its_first_sample(sample: int, expected: float) -> None:
    assert learning_rate_at(fake_plan(WARM, FLAT, SQRT), sample) == pytest.approx(expected, rel=1e-15)


def test_a_step_after_one_that_overflowed_has_the_rate_of_its_own_samples() -> None:
    progress, optimizer = SimpleNamespace(consumed=0), fake_optimizer()
    scheduler = build(fake_plan(WARM), optimizer, progress)
    used = []
    for step in range(
        4
    ):  # two samples a step; the steps 1 and 2 overflow: Megatron calls neither optimizer nor scheduler
        if step not in (1, 2):
            optimizer.optimizer.step()
            used.append(optimizer.param_groups[0]["lr"])
            scheduler.step(2)
        progress.consumed += 2
    assert used == [1.0, 1.0 + 2.0 * 6 / 8]


def test_the_logged_rate_is_that_of_the_step_taken() -> None:
    progress, optimizer = SimpleNamespace(consumed=4), fake_optimizer()
    scheduler = build(fake_plan(WARM), optimizer, progress)
    optimizer.optimizer.step()
    scheduler.step(2)
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_a_group_with_a_peak_of_its_own_keeps_its_proportion() -> None:
    optimizer = fake_optimizer({}, {"max_lr": 6.0}, {"max_lr": 3.0})
    build(fake_plan(WARM), optimizer, SimpleNamespace(consumed=4))
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 4.0, 2.0]


def test_the_state_of_a_checkpoint_does_not_move_the_rate() -> None:
    progress = SimpleNamespace(consumed=12)
    saved = build(fake_plan(FLAT, SQRT), fake_optimizer(), progress).state_dict() | {"num_steps": 4}
    optimizer = fake_optimizer()
    scheduler = build(fake_plan(FLAT, SQRT), optimizer, progress)
    scheduler.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3.0 - 2.0 * 0.5**0.5)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_a_longer_plan_with_another_peak_continues_from_a_checkpoint_of_the_shorter() -> None:
    progress = SimpleNamespace(consumed=8)
    state = build(fake_plan(FLAT, SQRT), fake_optimizer(), progress).state_dict() | {
        "lr_decay_steps": 16,
        "max_lr": 9.0,
    }
    optimizer = fake_optimizer()
    build(fake_plan(FLAT, WARM, SQRT), optimizer, progress).load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_plan_gives_the_rate_or_leaves_it_to_the_flags() -> None:
    assert plan_has_learning_rate(fake_plan(WARM, FLAT))
    assert not plan_has_learning_rate(fake_plan(None, None))
