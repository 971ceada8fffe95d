"""Every file that a run reports to: refused before the start where it cannot be written, lost during the run."""

import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_kaiyuan.errors import MetricsError
from megatron_kaiyuan.monitoring.metrics_file import append_metrics, check_metrics_place, read_metrics
from megatron_kaiyuan.monitoring.outputs import append_or_lose, keep_event_file
from megatron_kaiyuan.training.observation import check_event_place
from tests.helpers import files_end_at


def look_at_metrics(place: Path) -> None:
    check_metrics_place(place / "metrics.jsonl")


def look_at_events(place: Path) -> None:
    check_event_place(Namespace(tensorboard_dir=str(place), rank=1, world_size=2))


LOOKS = {"--kaiyuan-metrics": look_at_metrics, "--tensorboard-dir": look_at_events}


@pytest.mark.parametrize("flag", LOOKS)
def test_a_place_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsError, match=rf"{tmp_path}/file\S* cannot be written \(.*choose another {flag}, or mend"):
        LOOKS[flag](tmp_path / "file")


@pytest.mark.parametrize("flag", LOOKS)
def test_a_full_disk_is_refused_before_the_start(tmp_path: Path, flag: str) -> None:
    told = rf"cannot be written \(File too large\); choose another {flag}"
    with files_end_at(0), pytest.raises(MetricsError, match=told):
        LOOKS[flag](tmp_path)
    with files_end_at(100):
        LOOKS[flag](tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_rank_that_writes_no_events_does_not_look(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_event_place(Namespace(tensorboard_dir=str(tmp_path / "file"), rank=0, world_size=2))
    check_event_place(Namespace(tensorboard_dir=None, rank=0, world_size=1))


def test_an_append_is_whole_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    append_or_lose(path, b"12345", "numbers")
    with files_end_at(8):
        append_or_lose(path, b"6789", "numbers")
        append_or_lose(path, b"6789", "numbers")
        assert path.read_bytes() == b"12345"
        assert capsys.readouterr().err.count("the run goes on, numbers are lost until there is space") == 1
        append_or_lose(path, b"678", "numbers")
    assert path.read_bytes() == b"12345678"


def test_metrics_and_events_go_on_after_the_disk_was_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both lose what is written meanwhile, with one warning each, and what is read back is whole."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics, writer = tmp_path / "metrics.jsonl", SummaryWriter(str(tmp_path / "events"), flush_secs=0)
    keep_event_file(writer)

    def write(steps: range) -> None:
        for step in steps:
            append_metrics(metrics, {"iteration": step})
            writer.add_scalar("loss", step, step)
            writer.flush()

    write(range(1, 4))
    with files_end_at(metrics.stat().st_size):
        write(range(4, 7))
    write(range(7, 10))
    writer.close()
    kept = [1, 2, 3, 7, 8, 9]
    assert [line["iteration"] for line in read_metrics(metrics)] == kept
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == kept
    assert capsys.readouterr().err.count("the run goes on") == 2
    assert len(os.listdir(tmp_path / "events")) == 1  # noqa: PTH208


PRINTING = """
import sys
from megatron_kaiyuan.host.quiet import lose_lines
lose_lines()
for number in range(3):
    print(number, flush=True)
    print(number, file=sys.stderr)
print("end", end="")
with open(sys.argv[1], "w") as file:
    file.write("went on")
"""


@pytest.mark.parametrize("place", ["/dev/full", "a pipe that nobody reads"])
def test_a_process_goes_on_where_its_log_cannot_be_written(tmp_path: Path, place: str) -> None:
    command = [sys.executable, "-c", PRINTING, str(tmp_path / "done")]
    if place == "/dev/full":
        output = os.open(place, os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    process = subprocess.run(command, stdout=output, stderr=output, check=False, timeout=60)
    os.close(output)
    assert process.returncode == 0
    assert (tmp_path / "done").read_text() == "went on"


def test_a_log_that_can_be_written_is_whole_and_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRINTING, str(tmp_path / "done")]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    assert finished.stdout == "0\n0\n1\n1\n2\n2\nend"


def test_a_run_shows_the_control_characters_of_all_that_is_printed() -> None:
    """Whoever prints: a source's name in Megatron's line, a warning, a traceback."""
    script = (
        "import sys, warnings; from megatron_kaiyuan.host.quiet import lose_lines; lose_lines()\n"
        "evil = '\\x1b[2J\\x9b31m\\x07\\u202e\\r'\n"
        "print(evil, end='\\n'); sys.stderr.write(evil); warnings.warn(evil); raise ValueError(evil)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    shown = r"\x1b[2J\x9b31m\x07\u202e\x0d"
    assert done.stdout.decode() == f"{shown}\n"
    said = done.stderr.decode()
    assert said.count(shown) == 3
    assert [letter for letter in said if not letter.isprintable() and letter != "\n"] == []


def test_an_unbuffered_process_holds_nothing_back() -> None:
    """`os._exit` flushes nothing."""
    script = "import os; from megatron_kaiyuan.host import quiet; quiet.lose_lines(); print(1, end=''); os._exit(0)"
    assert subprocess.run([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, check=True).stdout == b"1"


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_process_waits_for_a_slow_reader_of_a_non_blocking_log(flags: list[str]) -> None:
    """A terminal or pipe is non-blocking as soon as one program that shares it has made it so."""
    script = (
        "import os; from megatron_kaiyuan.host import quiet; os.set_blocking(1, False); quiet.lose_lines()\n"
        "for number in range(20000): print(number, flush=True)"
    )
    command = [sys.executable, *flags, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        time.sleep(0.5)
        assert process.stdout.read().split() == [b"%d" % number for number in range(20000)]
    assert process.returncode == 0
