"""How a run stops before its end: when it is asked to, and when a loss or a gradient is not finite."""

import argparse
import signal
import sys
from typing import Any

import torch
from megatron.core.rerun_state_machine import EXIT_CODE_FAILED_ON_RESULT_VALIDATION, get_rerun_state_machine
from megatron.training import get_signal_handler
from megatron.training.utils import print_rank_0

from megatron_kaiyuan.errors import TrainingStopped
from megatron_kaiyuan.host.endings import record_reason
from megatron_kaiyuan.host.stop_signals import STOP_SIGNALS, StopRequests
from megatron_kaiyuan.training import compat, loop_observers

__all__ = ["explain_invalid_results", "stop_when_asked"]


def stop_when_asked(args: argparse.Namespace) -> None:
    """Let SIGTERM, SIGUSR1, SIGHUP, the first Ctrl-C and `--exit-signal` end the loop that follows.

    Without `--save` there is nothing to wait for: a signal then ends the process as it ends any other.

    Args:
        args: Megatron's validated arguments.
    """
    if not args.exit_signal_handler:
        return
    requests = StopRequests()
    compat.report_stop_signals(requests)
    requests.listen({*STOP_SIGNALS, args.exit_signal})

    def before_first_step(_loop: loop_observers.Loop) -> None:
        if any(get_signal_handler().signals_received()):
            name = signal.Signals(requests.agreed).name
            print_rank_0(f"> {name} came before the first step of this start: there is nothing new to save")
            sys.exit(0)

    loop_observers.observe_loop(before_first_step)


def explain_invalid_results(args: argparse.Namespace) -> None:
    """Let a run that ends because a loss or a gradient is not finite say which, in which step, and what to do.

    Args:
        args: Megatron's validated arguments.
    """

    def why_at_once(message: str) -> TrainingStopped:
        rank = 0 if not torch.distributed.is_initialized() else torch.distributed.get_rank()
        return TrainingStopped(
            f"{_named(message)} of rank {rank}, {_when(args)}; {_remedy(args)}",
            of_one_rank=True,
        )

    def at_exit(code: int) -> None:
        where = _failed_on(get_rerun_state_machine().failed_validation_call)
        if code == EXIT_CODE_FAILED_ON_RESULT_VALIDATION:
            said = f"{where}, {_when(args)}, but not when the step was repeated: that machine may compute wrongly"
            said += "; start again from the last checkpoint, on another one if it comes again"
        elif args.save:
            said = f"{where}, {_when(args)}, and again when the step was repeated: the weights before it are saved"
            said += f"; start again on another GPU to see whether this one computes wrongly, or {_remedy(args)}"
        else:
            said = f"{where}, {_when(args)}, and again when the step was repeated: nothing is saved, for there is no "
            said += f"--save; {_remedy(args)}, and with --save to keep what comes before"
        if code == EXIT_CODE_FAILED_ON_RESULT_VALIDATION or not args.save:
            raise TrainingStopped(said)
        if args.rank == 0:
            print(f"TrainingStopped: {said}", file=sys.stderr, flush=True)
        record_reason(f"TrainingStopped: {said}")

    compat.stop_at_invalid_results(why_at_once, at_exit)


def _named(message: str) -> str:
    """Return the name of what was not finite in Megatron's or our loss's message.

    Such as `found NaN in local grad norm for bucket #0 in ...`.
    """
    return f"{'NaN' if 'NaN' in message else 'Inf'} in the {'gradients' if 'grad' in message else 'loss'}"


def _when(args: argparse.Namespace) -> str:
    in_evaluation = torch.distributed.is_initialized() and not torch.is_grad_enabled()
    return f"in {'the evaluation after ' if in_evaluation else ''}step {args.curr_iteration + 1}"


def _remedy(args: argparse.Namespace) -> str:
    if args.fp16 and args.loss_scale:
        return f"start again without --loss-scale {args.loss_scale:g}, so that it adapts, or with a lower one"
    skip = f"--iterations-to-skip {args.curr_iteration + 1}"
    return f"start again from an earlier checkpoint with a lower --lr, or leave the step out: {skip}"


def _failed_on(call: Any) -> str:
    """Return what was not finite, and on which ranks.

    Called on all of them, of which most know of nothing.
    """
    own = None if call is None else _named(call.caller.message)
    found = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    ranks = [rank for rank, name in enumerate(found) if name is not None]
    if not ranks:
        return "a result that is not finite"
    return f"{found[ranks[0]]} of rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
