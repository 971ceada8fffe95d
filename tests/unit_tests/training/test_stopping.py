"""The training loop learns of every stop signal, by name, before its first step and after each."""

import argparse
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from megatron.training import training

from megatron_kaiyuan.host.stop_signals import STOP_SIGNALS, StopRequests
from megatron_kaiyuan.training import compat, loop_observers, stopping


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Megatron's, on one rank; all changes are taken back."""
    fake = SimpleNamespace(sig=signal.SIGTERM, _signal_received=False)
    monkeypatch.setattr(compat, "get_signal_handler", lambda: fake)
    monkeypatch.setattr(stopping, "get_signal_handler", lambda: fake)
    monkeypatch.setattr(compat, "all_gather_item", lambda number, dtype: [number])
    monkeypatch.setattr(training, "print_datetime", print)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield fake
    for number, action in before.items():
        signal.signal(number, action)


def test_a_signal_that_comes_while_the_ranks_agree_is_not_lost(
    handler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = StopRequests()
    requests.listen(STOP_SIGNALS)
    compat.report_stop_signals(requests)

    def gather_during_a_signal(number: int, dtype: object) -> list[int]:
        os.kill(os.getpid(), signal.SIGTERM)
        return [number]

    with monkeypatch.context() as patch:
        patch.setattr(compat, "all_gather_item", gather_during_a_signal)
        assert not any(handler.signals_received())

    assert handler.signals_received() == [signal.SIGTERM]


def test_the_signal_of_another_rank_is_named(
    handler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = StopRequests()
    compat.report_stop_signals(requests)
    monkeypatch.setattr(compat, "all_gather_item", lambda number, dtype: [number, int(signal.SIGUSR1)])

    assert any(handler.signals_received())
    training.print_datetime("exiting program after receiving SIGTERM.")

    assert capsys.readouterr().out == "exiting program after receiving SIGUSR1.\n"


def test_a_signal_that_megatron_noted_before_is_taken_over(handler: SimpleNamespace) -> None:
    handler._signal_received = True
    compat.report_stop_signals(StopRequests())
    assert handler.signals_received() == [signal.SIGTERM]


def test_a_signal_before_the_first_step_ends_the_run_without_a_checkpoint(
    handler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    observers = []
    monkeypatch.setattr(loop_observers, "observe_loop", observers.append)
    monkeypatch.setattr(stopping, "print_rank_0", print)
    stopping.stop_when_asked(argparse.Namespace(exit_signal_handler=True, exit_signal=signal.SIGUSR2))
    [before_first_step] = observers
    before_first_step(None)

    os.kill(os.getpid(), signal.SIGUSR2)
    with pytest.raises(SystemExit) as left:
        before_first_step(None)

    assert left.value.code == 0
    assert "SIGUSR2 came before the first step" in capsys.readouterr().out


def test_without_a_place_to_save_signals_keep_their_meaning(handler: SimpleNamespace) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopping.stop_when_asked(argparse.Namespace(exit_signal_handler=False))
    assert signal.getsignal(signal.SIGTERM) is before
