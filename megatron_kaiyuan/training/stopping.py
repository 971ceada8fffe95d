"""A run that is asked to stop saves the step that it has reached, on all ranks together, and ends with code 0."""

import argparse
import signal
import sys

from megatron.training import get_signal_handler
from megatron.training.utils import print_rank_0

from megatron_kaiyuan.host.stop_signals import STOP_SIGNALS, StopRequests
from megatron_kaiyuan.training import compat, loop_observers

__all__ = ["stop_when_asked"]


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
