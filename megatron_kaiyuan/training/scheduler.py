"""The plan's learning rate in Megatron's parameter scheduler, as a function of the samples consumed.

Megatron counts a scheduler step only when the optimizer stepped. Under dynamic loss scaling its rate therefore lags
behind the data by the steps that overflowed, and what it does at a phase boundary depends on them. Here the rate
follows the data, so a phase has its rate from its first sample to its last, and a resumed run the rate of an unbroken
one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.learning_rate import rate_at

__all__ = ["PlannedScheduler", "learning_rate_at", "plan_has_learning_rate"]


def plan_has_learning_rate(plan: Plan) -> bool:
    """Return whether the plan gives the learning rate.

    A plan gives it in all phases or in none.
    """
    return plan.phases[0].lr is not None


def learning_rate_at(plan: Plan, sample: int) -> float:
    """Return the rate of the step whose first sample is `sample`.

    After the plan's end it is the rate at its end.
    """
    phase = plan.phase_of(sample) if sample < plan.num_samples else plan.phases[-1]
    assert phase.lr is not None
    progress = min(1.0, (sample - phase.first_sample) / phase.num_samples)
    return rate_at(phase.lr.shape, phase.lr.start, phase.lr.end, progress)


class PlannedScheduler(OptimizerParamScheduler):
    """Megatron's scheduler (weight decay, state in the checkpoint) with the rate taken from a plan."""

    def __init__(self, *args: Any, plan: Plan, consumed_samples: Callable[[], int], **kwargs: Any) -> None:
        """Take over the learning rate of the optimizer.

        Args:
            *args: As in the base class.
            plan: Every phase has a learning rate.
            consumed_samples: Samples of all steps before the current one, overflowed ones included.
            **kwargs: As in the base class.
        """
        self._plan = plan
        self._consumed_samples = consumed_samples
        super().__init__(*args, **kwargs)
        for inner in _torch_optimizers(self.optimizer):
            inner.register_step_pre_hook(partial(_refresh, self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of steps. All else in the state describes a schedule that the plan replaces.

        Megatron would insist that it did not change, and so that no later phase did.
        """
        self.step(state_dict["num_steps"])

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The plan's rate, scaled for groups with a peak of their own (`--decoupled-lr`, mu-parametrisation)."""
        relative: float = param_group.get("max_lr", self.max_lr) / self.max_lr
        return learning_rate_at(self._plan, self._consumed_samples()) * relative


def _torch_optimizers(optimizer: Any) -> list[Any]:
    """Return the torch optimizers inside Megatron's wrappers.

    A rank without parameters of its own has none.
    """
    wrapped = getattr(optimizer, "chained_optimizers", [optimizer])
    return [inner.optimizer for inner in wrapped if inner.optimizer is not None]


def _refresh(scheduler: PlannedScheduler, _optimizer: object, _args: object, _kwargs: object) -> None:
    """Set the rate of the step about to be taken.

    The loop itself sets it only after a step that succeeded.
    """
    scheduler.step(0)
