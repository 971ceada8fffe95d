"""A metrics file that cannot be written is refused before the start, and ends no run that has begun."""

from pathlib import Path

import pytest

from megatron_kaiyuan.errors import MetricsError
from megatron_kaiyuan.monitoring.metrics_file import append_metrics, check_metrics_place, read_metrics


def test_a_place_that_cannot_be_written_is_named_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsError, match=r"file/metrics.jsonl cannot be written .*choose another --kaiyuan-metrics"):
        check_metrics_place(tmp_path / "file" / "metrics.jsonl")


def test_looking_at_the_place_leaves_the_lines_and_no_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    check_metrics_place(path)
    assert not path.exists()
    append_metrics(path, {"iteration": 1})
    check_metrics_place(path)
    assert read_metrics(path) == [{"iteration": 1}]


def test_lines_that_cannot_be_written_cost_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")  # takes no byte: no space left on device
    for iteration in (1, 2):
        append_metrics(path, {"iteration": iteration})
    told = capfd.readouterr().err
    assert told.count("WARNING") == 1
    assert f"{path} cannot be written (No space left on device); the run goes on" in told

    path.unlink()
    append_metrics(path, {"iteration": 3})
    assert read_metrics(path) == [{"iteration": 3}]
    path.unlink()
    path.symlink_to("/dev/full")
    append_metrics(path, {"iteration": 4})
    assert "WARNING" in capfd.readouterr().err, "lines were written in between"
