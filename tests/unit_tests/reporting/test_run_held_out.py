"""The figure of held-out losses shows what the file of evaluations says."""

import json
from pathlib import Path

from megatron_kaiyuan.data import NUM_BANDS
from megatron_kaiyuan.reporting.run_held_out import held_out_figure, read_evaluations
from megatron_kaiyuan.reporting.run_metrics import read_run
from megatron_kaiyuan.reporting.run_report import report_runs
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
    over_tokens, first, last, plain = held_out_figure(run, evaluations, []).data
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
