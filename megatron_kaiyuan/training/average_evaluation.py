"""Average the checkpoints that the plan of a run names, and evaluate the average in the run itself.

After the last step rank 0 averages on the CPU, streaming, while the others wait; the result stays on disk as
`tools/average_checkpoints.py` would have left it, and is loaded in place of the last weights, which are saved by then.

With `always` the average of those saved so far is evaluated, too, when one of them has been saved, from the second on.
Each rank averages its own part then, from the files into its own memory, and evaluates it in place of the weights,
which return bit for bit. Evaluating draws no random numbers, and reads other batches than the loop. A run that stops
right after such a checkpoint evaluates when it is resumed.

Cost of each: the members are read once (each rank its part), and memory on the host for this rank's weights in FP32 and
as they are. The sums are those of `averaging.py`: the same order, in FP32, rounded once.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kaiyuan.checkpoints.averaging import (
    add_weighted,
    choose_planned,
    choose_so_far,
    complete_average,
    weights_of,
)
from megatron_kaiyuan.checkpoints.reading import Checkpoint, find_checkpoints, open_checkpoint
from megatron_kaiyuan.errors import ConfigError, KaiyuanError
from megatron_kaiyuan.evaluation.loading import bare_model, load_weights, read_weights
from megatron_kaiyuan.training.checkpoint_keeping import average_folder
from megatron_kaiyuan.training.loop_observers import Evaluation, Evaluator, Loop

__all__ = ["AverageEvaluation", "averaged_weights", "check_average_arguments"]


def check_average_arguments(args: argparse.Namespace, *, planned: bool, held_out: bool) -> None:
    """Refuse `--kaiyuan-evaluate-average` where there is nothing to average or to evaluate on.

    Args:
        args: Megatron's validated arguments.
        planned: the plan has an averaging section.
        held_out: the plan holds documents out, and the run evaluates on them.

    Raises:
        ConfigError: names what is missing, or cannot be combined.
    """
    if not args.kaiyuan_evaluate_average:
        return
    if not planned or not held_out:
        missing = "an averaging section" if not planned else "a validation section, and --eval-iters above 0"
        raise ConfigError(f"--kaiyuan-evaluate-average needs a plan with {missing}; add it, or leave it out")
    unfit = {"--async-save": args.async_save, "FSDP": args.use_megatron_fsdp or args.use_torch_fsdp2}
    for name, is_on in unfit.items():
        if is_on and args.kaiyuan_evaluate_average == "always":
            raise ConfigError(
                f"--kaiyuan-evaluate-average always reads checkpoints that have just been saved into the model, which "
                f"{name} rules out: take --kaiyuan-evaluate-average end, or leave {name} out"
            )


@dataclass(slots=True)
class AverageEvaluation:
    """The evaluation of averages on one process.

    All processes call the same methods at the same steps.
    """

    save: str
    """What `--save` names."""
    planned: Sequence[int]
    """Iterations that the plan averages, ascending; the last is the end of the run."""
    kind: str
    """See `averaging.weights_of`."""
    batches: Callable[[], Any]
    """Batches for one evaluation; see `PlanDatasetsProvider.evaluation_batches`."""
    tell: Callable[[Sequence[int]], None]
    """Reports what has been evaluated, with the iterations that were averaged."""
    forget: Callable[[], object]
    """Drops what an evaluation has counted that was cut short."""
    say: Callable[[str], None]
    _loop: Loop | None = None

    def at_end(self, evaluation: Evaluation) -> None:
        """After the last evaluation of the run: average, load, evaluate again.

        Where there is no average the log says why, and the run ends as it would have.
        """
        problem = _agree(self._complete())
        if problem:
            self.say(f"> the average that the plan wants was not evaluated: {problem}")
            return
        checkpoint = open_checkpoint(average_folder(self.save))
        for chunk in evaluation.evaluator.model:
            load_weights(chunk, checkpoint)
        name = f"the average of the checkpoints that the plan names, in {checkpoint.folder},"
        self._evaluate(evaluation.evaluator, evaluation.iteration, name, self.planned)

    def start(self, loop: Loop, iteration: int, *, told: bool) -> None:
        """Start the loop at `iteration`.

        `told`, on the last rank, says whether the average of that step has been evaluated.
        """
        self._loop = loop
        if iteration in self.planned and not _agree("told" if told else "", src=-1):
            self.when_saved(iteration)

    def when_saved(self, iteration: int) -> None:
        """One of the planned checkpoints has been saved, not the last: evaluate the average of those so far."""
        members = [number for number in self.planned if number <= iteration]
        if len(members) < 2 or iteration == self.planned[-1]:
            return
        assert self._loop is not None, "the loop has started"
        problem = _agree(self._check_members(iteration))
        if problem:
            self.say(f"> the average so far was not evaluated at step {iteration}: {problem}")
            return
        checkpoints, evaluator = find_checkpoints(Path(self.save), members), self._loop.evaluator
        with self._loop.at_rest(), averaged_weights(evaluator.model, checkpoints, self.kind):
            name = f"the average of the checkpoints of iterations {', '.join(map(str, members))}"
            self._evaluate(evaluator, iteration, name, members)

    def _evaluate(self, evaluator: Evaluator, iteration: int, name: str, members: Sequence[int]) -> None:
        if evaluator(self.batches(), iteration, name):
            self.tell(members)
        else:
            self.forget()

    def _complete(self) -> str:
        """Make the average on rank 0, unless it is there, and return why it could not be made, or nothing."""
        if _rank() != 0:
            return ""
        try:
            checkpoints, weights = choose_planned(Path(self.save))
            complete_average(checkpoints, weights, average_folder(self.save))
        except (KaiyuanError, OSError) as error:
            return str(error)
        return ""

    def _check_members(self, iteration: int) -> str:
        """On rank 0: why those saved so far cannot be averaged, or nothing."""
        if _rank() != 0:
            return ""
        try:
            choose_so_far(Path(self.save), self.planned, iteration)
        except (KaiyuanError, OSError) as error:
            return str(error)
        return ""


@contextmanager
def averaged_weights(model: Sequence[Any], checkpoints: Sequence[Checkpoint], kind: str) -> Iterator[None]:
    """Give the model, or one rank's part of it, the average of checkpoints within a block.

    Its own weights return at the end.

    Args:
        model: Chunks of this rank's model, wrapped or not.
        checkpoints: Oldest first.
        kind: See `averaging.weights_of`.
    """
    own = [{name: _kept(value) for name, value in bare_model(chunk).state_dict().items()} for chunk in model]
    try:
        for chunk in model:
            bare_model(chunk).load_state_dict(_average(chunk, checkpoints, kind))
        yield
    finally:
        for chunk, state in zip(model, own, strict=True):
            bare_model(chunk).load_state_dict(state)


def _average(chunk: Any, checkpoints: Sequence[Checkpoint], kind: str) -> Mapping[str, Any]:
    sums: dict[str, Tensor] = {}
    last: dict[str, Any] = {}
    for checkpoint, weight in zip(checkpoints, weights_of(kind, len(checkpoints)).tolist(), strict=True):
        last = read_weights(chunk, checkpoint)
        for name, value in last.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                if name not in sums:
                    sums[name] = torch.zeros(value.shape)
                add_weighted(sums[name], value.detach(), weight)
    return last | {name: total.to(last[name].dtype) for name, total in sums.items()}


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _agree(said: str, src: int = 0) -> str:
    """Return on all ranks what rank `src` says (-1 is the last).

    Nobody goes on before it has.
    """
    told: list[Any] = [said]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(told, src=src % torch.distributed.get_world_size())
    return str(told[0])
