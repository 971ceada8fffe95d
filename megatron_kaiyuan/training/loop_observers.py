"""Observers of Megatron's training loop: of its start, of each step, of each evaluation.

The loop has no hooks for them. Each function here puts itself around one function of `megatron.training.training`, of
which it changes nothing.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.training import get_args, get_timers, training

__all__ = ["Evaluation", "Evaluator", "Loop", "observe_evaluations", "observe_loop", "observe_steps"]


def observe_steps(observer: Callable[..., None]) -> None:
    """Call `observer` after Megatron's own log line of each step, with the same arguments, on all ranks.

    The loop has no hook after a step that learns of its loss, its gradient norm and whether it was skipped. A later
    call replaces the observer.
    """
    original = getattr(training.training_log, "__wrapped__", training.training_log)

    @functools.wraps(original)
    def logged(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        observer(*args, **kwargs)
        return result

    training.training_log = logged


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates the model of the loop on other batches than the loop's own."""

    model: list[Any]
    """Chunks of this rank's model, wrapped as in training."""
    _forward_step: Any
    _config: Any
    _groups: dict[str, Any]
    """Megatron's process groups and communicator."""

    def __call__(self, batches: Any, iteration: int, name: str) -> bool:
        """Evaluate on all ranks together.

        What the loop counts and reads from goes on as if this had not been.

        Args:
            batches: Iterator over this rank's micro-batches of one evaluation; None on a rank that reads none; a list
                of these, one for each chunk, with a virtual pipeline.
            iteration: Present step.
            name: Of what is evaluated, for the log.

        Returns:
            Whether it came to its end; `--exit-duration-in-mins` cuts an evaluation short.
        """
        args = get_args()
        evaluate = getattr(training.evaluate_and_print_results, "__wrapped__", training.evaluate_and_print_results)
        consumed = args.consumed_valid_samples
        # Not to TensorBoard and wandb: it would be a second value of the same name.
        evaluate(
            name, self._forward_step, batches, self.model, iteration, None, self._config, False, False, **self._groups
        )
        args.consumed_valid_samples = consumed
        finished = all(chunk.training for chunk in self.model)
        for chunk in self.model:
            chunk.train()  # Megatron forgets this where it cuts an evaluation short
        return finished


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation that the loop has made."""

    iteration: int
    is_last: bool
    """After the last step, when its checkpoint is saved; nothing is trained afterwards."""
    evaluator: Evaluator


def observe_evaluations(observer: Callable[[Evaluation], None]) -> None:
    """Call `observer` after each evaluation of the loop, on all ranks.

    The loop reports the mean over all validation samples and has no hook after it. A later call replaces the observer.
    """
    original = getattr(training.evaluate_and_print_results, "__wrapped__", training.evaluate_and_print_results)

    @functools.wraps(original)
    def evaluated(
        prefix: str,
        forward_step: Any,
        data: Any,
        model: Any,
        iteration: int,
        non_loss: Any,
        config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = original(prefix, forward_step, data, model, iteration, non_loss, config, *args, **kwargs)
        evaluator = Evaluator(model, forward_step, config, _groups_of(kwargs))
        observer(Evaluation(iteration, "on validation set" in prefix, evaluator))
        return result

    training.evaluate_and_print_results = evaluated


def _groups_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments.get(name) for name in ("pg_collection", "p2p_communicator")}


@dataclass(frozen=True, slots=True)
class Loop:
    """The training loop that is about to start."""

    evaluator: Evaluator
    _optimizer: Any

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Between two steps: the weights are whole on each rank, no gather changes them, and the clock stops.

        As Megatron does around its own evaluation in the midst of the loop.
        """
        args, clock, model = get_args(), get_timers()("interval-time", log_level=0), self.evaluator.model
        overlapped, running = training.should_disable_forward_pre_hook(args), clock._started
        if running:
            clock.stop()
        if overlapped:
            training.disable_forward_pre_hook(model, optimizer=self._optimizer)
        try:
            yield
        finally:
            if overlapped:
                training.enable_forward_pre_hook(model)
            if running:
                clock.start(barrier=True)


def observe_loop(observer: Callable[[Loop], None]) -> None:
    """Call `observer` on all ranks when the loop starts, with the checkpoint loaded and the first step ahead.

    Megatron has no hook there. Several observers are called in the order of their registration.
    """
    original = training.train

    @functools.wraps(original)
    def started(
        forward_step: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        train_data: Any,
        valid_data: Any,
        non_loss: Any,
        config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        observer(Loop(Evaluator(model, forward_step, config, _groups_of(kwargs)), optimizer))
        return original(
            forward_step, model, optimizer, scheduler, train_data, valid_data, non_loss, config, *args, **kwargs
        )

    training.train = started
