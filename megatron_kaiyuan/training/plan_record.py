"""The order of a run, stored with its checkpoints and compared before it is resumed.

Megatron saves its argument namespace in every checkpoint's common state. The order goes along as one more argument, so
that any checkpoint format carries it and no file has to travel beside the checkpoint.
"""

import argparse

from megatron.training.utils import print_rank_0

from megatron_kaiyuan.checkpoints.identity import PLAN_RECORD
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.plan_schema import NEWEST_VERSION
from megatron_kaiyuan.errors import ResumeError
from megatron_kaiyuan.host.terminal import agreed, counted

__all__ = ["check_resume", "plan_as_begun", "store_record"]


def store_record(args: argparse.Namespace, plan: Plan | None) -> None:
    """Let every checkpoint of this run carry the order of its samples."""
    setattr(args, PLAN_RECORD, None if plan is None else plan.order_record())


def plan_as_begun(plan: Plan | None, saved: argparse.Namespace | None) -> Plan | None:
    """Return the plan in the version of the plan language that the run to continue began with."""
    record = getattr(saved, PLAN_RECORD, None)
    return plan if plan is None or record is None else plan.as_begun(record)


def _say_version(plan: Plan) -> None:
    """Report what a new run would order otherwise, where this one goes on under an earlier version."""
    if plan.spec.order_version < NEWEST_VERSION:
        print_rank_0(
            f"> the run began under version {plan.spec.order_version} of the plan language and goes on with its order; "
            f"write version: {plan.spec.order_version} into the plan to say so"
        )
    for line in plan.otherwise_in_newest():
        print_rank_0(f">   a new run would differ: {line}")


def check_resume(args: argparse.Namespace, plan: Plan | None, saved: argparse.Namespace | None) -> None:
    """Refuse to continue a run whose consumed samples the present plan would have chosen differently.

    Args:
        args: Validated arguments of this run.
        plan: Its plan, if it has one.
        saved: Arguments of the run to continue, if there is one.

    Raises:
        ResumeError: the plan changed in its consumed part, only one of the two runs has a plan, or the vocabulary is
            padded to another size.
    """
    consumed = getattr(saved, "consumed_train_samples", 0)
    if saved is None or consumed == 0:
        return
    _check_padding(args, saved)
    record = getattr(saved, PLAN_RECORD, None)
    if plan is not None and record is not None:
        plan.check_resume(record, consumed)
        _say_version(plan)
    elif plan is not None:
        raise ResumeError(
            f"--load {args.load}: {counted(consumed, 'sample')} {agreed(consumed, 'was', 'were')} trained on without "
            "a plan, so the place where "
            "--plan "
            f"{args.plan} should start is unknown; add --finetune to start the plan at its first sample from these "
            "weights"
        )
    elif record is not None:
        raise ResumeError(
            f"--load {args.load}: {counted(consumed, 'sample')} {agreed(consumed, 'was', 'were')} trained on with a "
            "plan, and this run has none; "
            "give its "
            "--plan to resume it, or --finetune to start from its weights"
        )


def _check_padding(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """The padding of the vocabulary takes part in the softmax, so the model would be another one.

    Megatron pads to a multiple of `--make-vocab-size-divisible-by` times the tensor-parallel size, and loads a
    checkpoint of another padding without a word.
    """
    before, now = saved.padded_vocab_size, args.padded_vocab_size
    if before != now:
        raise ResumeError(
            f"--load {args.load}: its vocabulary is padded to {counted(before, 'id')}, that of this run to {now} "
            f"(--tensor-model-parallel-size {args.tensor_model_parallel_size}), which would change every probability; "
            f"add --padded-vocab-size {before}"
        )
