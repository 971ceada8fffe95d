"""What the evaluations of a run over a plan read: nothing, some held-out windows, or each of them once.

Megatron's own `--full-validation` ends in an error at the first evaluation, or at the start on ranks that read no data.
Here it is a number of batches like any other, the last of which is filled up with windows that do not count.
"""

import argparse
import math

from megatron_kaiyuan.data import HeldOutDataset, Plan
from megatron_kaiyuan.host.terminal import counted

__all__ = ["EVERY_WINDOW", "settle_evaluations"]

EVERY_WINDOW = "kaiyuan_every_window"
"""Name of the argument that says whether an evaluation reads each held-out window once."""


def settle_evaluations(args: argparse.Namespace, plan: Plan) -> str | None:
    """Decide how many batches an evaluation reads, and say so where the command line did not.

    Args:
        args: Validated arguments, changed.
        plan: The plan of the run.
    """
    setattr(args, EVERY_WINDOW, bool(args.full_validation))
    if not plan.validation:
        args.eval_iters = 0
        return "the plan holds out no documents: no evaluation (--eval-iters 0)"
    if not args.full_validation:
        return None if args.eval_iters else "--eval-iters 0: the held-out documents are left out and not evaluated on"
    args.full_validation = False
    windows = sum(len(HeldOutDataset(plan, name)) for name in plan.validation)
    args.eval_iters = math.ceil(windows / args.eval_global_batch_size)
    batches = counted(args.eval_iters, "batch", "batches")
    return f"--full-validation: each evaluation reads {counted(windows, 'window')} in {batches}"
