"""The figure of held-out losses shows what the file of evaluations says."""

import json
import re
from pathlib import Path

import pytest

from megatron_kaiyuan.data import NUM_BANDS
from megatron_kaiyuan.reporting.run_held_out import (
    held_out_figure,
    last_held_out,
    read_averages,
    read_evaluations,
    spell_average,
)
from megatron_kaiyuan.reporting.run_metrics import read_run
from megatron_kaiyuan.reporting.run_report import report_runs
from megatron_kaiyuan.reporting.run_summary import print_summaries
from tests.unit_tests.reporting.run_files import SEQ_LENGTH, entry, write_run


def evaluation(step: int, scored: float) -> dict[str, object]:
    bands = [None] * (NUM_BANDS - 2) + [scored + 1, scored]
    return {
        "iteration": step,
        "consumed_samples": step * 8,
        "sources": {
            "scored": {"loss": scored, "tokens": 20, "bands": bands, "band_tokens": [0] * 8 + [10, 10]},
            "plain": {"loss": 5.0, "tokens": 9, "bands": [None] * NUM_BANDS, "band_tokens": [0] * NUM_BANDS},
        },
    }


def run_with_evaluations(folder: Path) -> Path:
    write_run(folder, [entry(step) for step in range(1, 7)])
    lines = [evaluation(2, 4.0), evaluation(4, 3.5), evaluation(6, 3.25), evaluation(6, 3.0)]
    text = "\n".join(map(json.dumps, lines))
    (folder / "metrics.held_out.jsonl").write_text(f"{text}\n")
    return folder


def test_curves_are_the_evaluations_and_bands_are_those_of_the_first_and_the_last(tmp_path: Path) -> None:
    run = read_run(run_with_evaluations(tmp_path / "run"))
    evaluations = read_evaluations(run)
    assert [told["iteration"] for told in evaluations] == [2, 4, 6]
    over_tokens, first, last, plain = held_out_figure(run, evaluations, [], []).data
    assert list(over_tokens.x) == [step * 8 * SEQ_LENGTH for step in (2, 4, 6)]
    assert list(over_tokens.y) == [4.0, 3.5, 3.0], "an evaluation that was made again counts as it was last"
    assert (list(first.x), list(first.y)) == ([NUM_BANDS - 2, NUM_BANDS - 1], [5.0, 4.0])
    assert (list(last.x), list(last.y)) == ([NUM_BANDS - 2, NUM_BANDS - 1], [4.0, 3.0])
    assert list(last.customdata) == ["80-90%", "90-100%"]
    assert plain.name == "plain"
    assert list(plain.y) == [5.0] * 3


def test_a_run_without_evaluations_has_no_such_part(tmp_path: Path) -> None:
    for folder, shown in (
        (write_run(tmp_path / "bare", [entry(1)]), False),
        (run_with_evaluations(tmp_path / "r"), True),
    ):
        report_runs([folder], tmp_path / "page.html")
        assert ("Held-out documents" in (tmp_path / "page.html").read_text()) is shown


def with_averages(folder: Path) -> Path:
    """Averages after steps 4 and 6; that of step 5 is left of an attempt that was given up."""
    run_with_evaluations(folder)
    lines = [evaluation(4, 3.25) | {"averaged": [2, 4]}, evaluation(5, 9.0), evaluation(5, 2.9)]
    lines.append(evaluation(6, 2.75) | {"averaged": [2, 4, 6]})
    (folder / "metrics.held_out_average.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_the_average_is_drawn_beside_the_curve_of_its_source_and_named_once(tmp_path: Path) -> None:
    run = read_run(with_averages(tmp_path / "run"))
    figure = held_out_figure(run, read_evaluations(run), read_averages(run), [])
    scored, plain = (trace for trace in figure.data if trace.marker.symbol == "star")
    own = next(trace for trace in figure.data if trace.name == "scored")
    assert (scored.xaxis, scored.line.color) == (own.xaxis, own.line.color)
    assert list(scored.x) == [step * 8 * SEQ_LENGTH for step in (4, 5, 6)]
    assert list(scored.y) == [3.25, 2.9, 2.75]
    assert list(scored.customdata)[::2] == [
        "average of 2 checkpoints, steps 2 to 4",
        "average of 3 checkpoints, steps 2 to 6",
    ]
    assert spell_average(None) == "average of checkpoints", "files of earlier versions"
    assert (scored.showlegend, plain.showlegend) == (True, False)


def test_the_last_losses_are_weighed_by_tokens(tmp_path: Path) -> None:
    told = last_held_out(read_run(with_averages(tmp_path / "run")))
    own, average = told["held_out"], told["held_out_average"]
    assert own == {
        "step": 6,
        "loss": (3.0 * 20 + 5.0 * 9) / 29,
        "sources": {"scored": 3.0, "plain": 5.0},
        "averaged": None,
    }
    assert average is not None
    assert (average["step"], average["averaged"], average["sources"]["scored"]) == (6, [2, 4, 6], 2.75)
    assert last_held_out(read_run(write_run(tmp_path / "bare", [entry(1)]))) == {
        "held_out": None,
        "held_out_average": None,
    }


def test_the_average_is_in_the_summary_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched, bare = with_averages(tmp_path / "watched"), write_run(tmp_path / "bare", [entry(1)])
    [summary] = report_runs([watched], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<td>average of 3 checkpoints, steps 2 to 6</td>" in page
    assert "held-out loss of the average; 3.6207 of the last weights" in page
    print_summaries([summary])
    printed = capsys.readouterr().out
    assert re.search(r"average of 3 checkpoints, steps 2 to 6 │ 3\.4483 │ 2\.7500 │ 5\.0000", printed)
    assert re.search(r"step 6 +│ 3\.6207 │ 3\.0000 │ 5\.0000", printed)
    print_summaries(report_runs([watched, bare], tmp_path / "both.html"))
    assert re.search(r"watched .*│ +3\.6207 │ +3\.4483 │", capsys.readouterr().out)
    assert '<td class="n">3.4483</td>' in (tmp_path / "both.html").read_text()


def test_an_average_without_evaluations_of_the_run_is_shown(tmp_path: Path) -> None:
    folder = with_averages(tmp_path / "run")
    (folder / "metrics.held_out.jsonl").unlink()
    report_runs([folder], tmp_path / "page.html")
    assert "held-out loss of the average; - of the last weights" in (tmp_path / "page.html").read_text()
