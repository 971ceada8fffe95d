"""torchrun that waits for its ranks to save: `python -m megatron_kaiyuan.host.torchrun <torchrun's flags> -m MODULE`.

torchrun answers SIGTERM and Ctrl-C by killing its ranks 30 seconds later, in the midst of a checkpoint if that takes
longer, and it prints its own traceback and ends with 1 although the ranks have saved. Here a stop signal goes to the
ranks and nothing else happens: they end when they have saved, and so does the launcher. All flags are torchrun's.
"""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

import psutil
from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_kaiyuan.host.stop_signals import LAUNCHER_WAITS, STOP_SIGNALS

__all__ = ["main"]


class _Stop:
    """Hands stop signals on to the ranks."""

    def __init__(self) -> None:
        self.number = 0
        """Of the first signal that came; 0: none has."""

    def listen(self) -> None:
        """Hand the signals on from now on.

        SIGHUP stays ignored where it is, as under `nohup`.
        """
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, _frame: object) -> None:
        self.number = self.number or number
        ranks = psutil.Process().children()
        for rank in ranks:
            # The rank alone: its loader workers and helpers are its own affair.
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if not ranks:
            raise SystemExit(128 + number)  # before they were started


def main() -> int:
    """Launch the ranks and wait for them.

    Returns:
        0 when all ranks ended with 0, after a stop signal too; 128 + the signal where it ended ranks which had nothing
        to save yet; else the exit code of the rank that failed first.
    """
    stop = _Stop()
    stop.listen()
    os.environ[LAUNCHER_WAITS] = "1"
    arguments = run.parse_args(sys.argv[1:])  # type: ignore[no-untyped-call]
    arguments.signals_to_handle = "SIGQUIT"  # for torch's own handler, which asks for one at least
    _restart_unless_stopped(stop)
    try:
        run.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        failures = failed.failures.values()
        if stop.number and _all_ended_by(stop.number, failures):
            print(f"stopped by {signal.Signals(stop.number).name}; nothing was saved", file=sys.stderr)
            return 128 + stop.number
        rank, first = failed.get_first_failure()
        print(f"rank {rank} failed first: {_reason(first)}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _restart_unless_stopped(stop: _Stop) -> None:
    """Do not start ranks anew (`--max-restarts`) which a stop signal has ended."""
    restart = LocalElasticAgent._restart_workers

    @functools.wraps(restart)
    def restarted(self: LocalElasticAgent, *args: Any, **kwargs: Any) -> None:
        if stop.number:
            raise SystemExit(128 + stop.number)
        restart(self, *args, **kwargs)

    LocalElasticAgent._restart_workers = restarted  # type: ignore[method-assign]


def _all_ended_by(number: int, failures: Iterable[ProcessFailure]) -> bool:
    """Whether each of these ranks ended by this signal, or by torch's SIGTERM to the others of a failed rank."""
    codes = {failure.exitcode for failure in failures}
    return -number in codes and codes <= {-number, -signal.SIGTERM}


def _reason(failure: ProcessFailure) -> str:
    """What the rank has recorded, in its own words."""
    message: Any = failure.message
    if isinstance(message, dict):
        return str(message["message"])
    return f"exit code {failure.exitcode}" if failure.exitcode > 0 else str(message)


if __name__ == "__main__":
    sys.exit(main())
