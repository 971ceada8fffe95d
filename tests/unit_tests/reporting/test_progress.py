"""Progress of a long reading, where stderr is not a terminal."""

import pytest

from megatron_kaiyuan.reporting import progress
from megatron_kaiyuan.reporting.progress import ConsoleMeter


def test_a_log_gets_a_line_when_one_is_due_and_none_before(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with ConsoleMeter() as meter:
        meter.start("verifying", 100)
        meter.advance(10)
        assert capsys.readouterr().err == ""
        now = 20.0
        meter.advance(10)
    assert capsys.readouterr().err == "verifying: 20%, about 80 s left\n"


@pytest.mark.parametrize("total", [0, 1])
def test_nothing_to_read_is_no_division_by_zero(total):
    with ConsoleMeter() as meter:
        meter.start("verifying", total)
        meter.advance(total)
