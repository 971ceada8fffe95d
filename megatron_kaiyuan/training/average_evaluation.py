"""At the end of a run: average the checkpoints that its plan names, and evaluate the average in the run itself.

Rank 0 averages on the CPU, streaming, while the others wait; the result stays on disk as `tools/average_checkpoints.py`
would have left it, and is loaded in place of the last weights, which are saved by then.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kaiyuan.errors import ConfigError, KaiyuanError
from megatron_kaiyuan.training.averaging import choose_planned, complete_average
from megatron_kaiyuan.training.checkpoint_io import open_checkpoint
from megatron_kaiyuan.training.checkpoint_keeping import average_folder
from megatron_kaiyuan.training.compat import Evaluation
from megatron_kaiyuan.training.loading import load_weights

__all__ = ["AverageEvaluation", "check_average_arguments"]


def check_average_arguments(args: argparse.Namespace, *, planned: bool, held_out: bool) -> None:
    """Refuse `--kaiyuan-evaluate-average` where there is nothing to average or to evaluate on.

    Args:
        args: Megatron's validated arguments.
        planned: the plan has an averaging section.
        held_out: the plan holds documents out.

    Raises:
        ConfigError: names what is missing.
    """
    if not args.kaiyuan_evaluate_average:
        return
    if not planned or not held_out:
        missing = "an averaging section" if not planned else "a validation section"
        raise ConfigError(f"--kaiyuan-evaluate-average needs a plan with {missing}; add it, or leave it out")
    if args.full_validation or args.multiple_validation_sets:
        raise ConfigError(
            "--kaiyuan-evaluate-average evaluates as the run does, by --eval-iters; without --full-validation and "
            "--multiple-validation-sets, or with tools/evaluate.py afterwards"
        )


@dataclass(frozen=True, slots=True)
class AverageEvaluation:
    """One for each process; all call it after the last evaluation."""

    save: str
    """What `--save` names."""
    say: Callable[[str], None]

    def __call__(self, evaluation: Evaluation) -> bool:
        """Average, load, evaluate again.

        Returns:
            Whether there is an average; where there is none, the log says why, and the run ends as it would have.
        """
        problem = _agree(self._average())
        if problem:
            self.say(f"> the average that the plan wants was not evaluated: {problem}")
            return False
        checkpoint = open_checkpoint(average_folder(self.save))
        for chunk in evaluation.model:
            load_weights(chunk, checkpoint)
        evaluation.repeat(f"the average of the checkpoints that the plan names, in {checkpoint.folder},")
        return True

    def _average(self) -> str:
        """On rank 0: make the average, unless it is there; why it could not be made, or nothing."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return ""
        try:
            checkpoints, weights = choose_planned(Path(self.save))
            complete_average(checkpoints, weights, average_folder(self.save))
        except (KaiyuanError, OSError) as error:
            return str(error)
        return ""


def _agree(problem: str) -> str:
    """What rank 0 says, on all ranks; nobody goes on before it has."""
    told: list[Any] = [problem]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(told, src=0)
    return str(told[0])
