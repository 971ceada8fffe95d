"""The report: what the page and the data say, and that a real browser draws it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_kaiyuan.data.plan_schema import parse_plan_spec
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.analysis import analyse
from megatron_kaiyuan.quantile.figures import curve_figure, heat_figure, matrix_figure, overall_figure, ranking_figure
from megatron_kaiyuan.quantile.report import write_report
from megatron_kaiyuan.quantile.results import read_result, result_path
from megatron_kaiyuan.quantile.runs import SlicedStudy, run_folder
from megatron_kaiyuan.quantile.study import Study
from tests.browser import drawn, needs_browser, opened
from tests.unit_tests.quantile.tiny_study import (
    informative,
    invent_results,
    nothing,
    sliced_study,
    study_content,
    tiny_study,
    write_results,
)

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, SlicedStudy]:
    folder = tmp_path_factory.mktemp("report")
    held_out = study_content(folder)["evaluation"]["held_out"]
    evaluation = {"held_out": held_out, "tasks": [{"name": "quiz", "capability": "knowledge <&>"}]}
    slices = study_content(folder)["slices"] | {"documents": "spread"}
    study, sliced = sliced_study(folder, evaluation=evaluation, slices=slices)
    write_results(study, sliced, informative, task=True)
    line = {"consumed_samples": 8, "learning_rate": 0.1, "loss": 3.0, "tokens": 256, "seconds": 1.0}
    for run, text in zip(sliced.runs, [json.dumps({"iteration": 1} | line), "torn"], strict=False):
        checkpoints = run_folder(study, run) / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "metrics.jsonl").write_text(text + "\n")
    return study, sliced


def test_results_are_read_as_they_were_written(reported: tuple[Study, SlicedStudy]) -> None:
    study, sliced = reported
    result = read_result(result_path(study, sliced.runs[0]))
    assert result.run == sliced.runs[0].name
    assert len(result.held_out["clean"].nats) == len(result.tasks["quiz"].metrics["accuracy"]) == 60


def test_the_conclusions_name_the_informative_score_and_refuse_the_other(reported: tuple[Study, SlicedStudy]) -> None:
    told = write_report(*reported).conclusions
    assert told[0].startswith("good: better-scored documents train a better model")
    assert told[1].startswith("odd: its score was not shown to order quality")


def test_the_data_hold_every_number_of_the_page(reported: tuple[Study, SlicedStudy]) -> None:
    study, sliced = reported
    content = json.loads(write_report(study, sliced).data.read_text())
    assert len(content["cells"]) == 6
    assert {pair["claim"] for pair in content["pairs"]} >= {"none", "first"}
    assert all(0 <= pair["p_value"] <= pair["p_adjusted"] <= 1 for pair in content["pairs"])
    assert [len(metric["seed_values"]) for metric in content["metrics"]] == [6, 6, 6]
    # the figure of a run is its nats over its bytes, from the file of results
    result = read_result(result_path(study, sliced.runs[0])).held_out["clean"]
    bits = sum(result.nats) / sum(result.bytes) / 0.6931471805599453
    assert content["metrics"][0]["seed_values"][0][0] == pytest.approx(bits)
    assert parse_plan_spec(yaml.safe_load(content["proposal"]["plan"])).seq_length == 32
    assert (study.folder / "proposed_plan.yaml").read_text() == content["proposal"]["plan"]


def test_the_page_is_whole_and_loads_nothing(reported: tuple[Study, SlicedStudy]) -> None:
    text = write_report(*reported).page.read_text()
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', text)
    assert "knowledge &lt;&amp;&gt;" in text
    assert "knowledge <&>" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    for heading in ("Score against quantile", "Sources by quantiles", "Which of two slices is better", "Ranking"):
        assert f"<h2>{heading}</h2>" in text


def test_training_curves_are_shown_and_what_lacks_them_is_named(reported: tuple[Study, SlicedStudy]) -> None:
    study, sliced = reported
    page = write_report(study, sliced).page.read_text()
    training = page[page.index("Training curves") : page.index("<h2>Runs")]
    assert sliced.runs[0].name in training
    assert "holds no readable line" in training
    assert "Of 16 runs the metrics are not on this machine." in training


def test_a_report_without_all_results_is_refused_or_marked(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path)
    with pytest.raises(StudyError, match="18 of 18 runs have no results"):
        write_report(study, sliced)
    write_results(study, sliced, nothing)
    result_path(study, sliced.runs[3]).unlink()
    with pytest.raises(StudyError, match=r"1 of 18 runs have no results: good-top40-seed1; .*--partial"):
        write_report(study, sliced)
    assert "Incomplete: 17 of 18" in write_report(study, sliced, partial=True).page.read_text()


def test_results_of_another_evaluation_are_refused_and_a_renamed_capability_is_none(tmp_path: Path) -> None:
    held_out = study_content(tmp_path)["evaluation"]["held_out"]
    told = {"held_out": held_out, "tasks": [{"name": "quiz", "capability": "a"}]}
    study, sliced = sliced_study(tmp_path, evaluation=told)
    write_results(study, sliced, nothing, task=True)
    write_report(tiny_study(tmp_path, evaluation=told | {"tasks": [{"name": "quiz", "capability": "b"}]}), sliced)
    with pytest.raises(StudyError, match=r"another evaluation than the study file has now .18 of 18.*`evaluate` again"):
        write_report(tiny_study(tmp_path, evaluation={"held_out": held_out}), sliced)


def test_a_plan_from_a_part_of_the_results_says_so_and_a_stale_one_is_removed(
    tmp_path: Path,
) -> None:
    study, sliced = sliced_study(tmp_path)
    write_results(study, sliced, informative)
    plan = study.folder / "proposed_plan.yaml"
    assert write_report(study, sliced).plan == plan
    assert set(yaml.safe_load(plan.read_text())["sources"]) == {"good", "odd"}
    assert "Incomplete" not in plan.read_text()
    for run in sliced.runs:
        if run.source == "odd":
            result_path(study, run).unlink()
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study_content(tmp_path)))
    command = [sys.executable, "tools/quantile_benchmark.py", "report", str(file), "--partial"]
    shown = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert "warning: Incomplete: 9 of 18 runs have results.\n" in shown
    comments = [line for line in plan.read_text().splitlines() if line.startswith("# ")]
    assert comments[0] == "# Incomplete: 9 of 18 runs have results."
    assert comments[-2] == "# Not measured, and so not in the plan: odd."
    assert comments[-1].startswith("# overall: ")
    assert any("Shards without a manifest" in line for line in comments)
    assert set(yaml.safe_load(plan.read_text())["sources"]) == {"good"}
    advice = json.loads((study.folder / "report.json").read_text())["proposal"]["advice"]
    assert advice[1]["reasons"] == ["Not measured: none of its runs has results."]
    assert advice[1]["followed"] is False
    for run in sliced.runs:
        if run.seed > 1:
            result_path(study, run).unlink(missing_ok=True)
    assert write_report(study, sliced, partial=True).plan is None
    assert not plan.exists()


def test_a_report_on_one_seed_says_that_it_concludes_nothing(tmp_path: Path) -> None:
    training = study_content(tmp_path)["training"] | {"seeds": 1}
    study, sliced = sliced_study(tmp_path, training=training)
    write_results(study, sliced, informative)
    written = write_report(study, sliced)
    assert written.conclusions == (
        "No conclusion is drawn: a slice with one seed has no spread to compare a difference with. Train at least two "
        "seeds of each, better three.",
    )
    text = written.page.read_text()
    assert "highest mean, of one seed: not a finding" in text
    assert "Nothing was tested" in text
    assert "Which of two slices is better" not in text
    assert not (study.folder / "proposed_plan.yaml").exists()


def test_slices_that_go_against_the_score_are_marked_in_the_figures(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path)

    def dip(source: str, top: float) -> float:
        return 0.4 * (top == 0.4) if source == "good" else -0.001 * top

    analysis = analyse(study, sliced, invent_results(sliced, dip, seed_spread=0.005, item_spread=0.005))
    claimed, open_ = "against the score, claimed", "against the score, not claimed"
    for figure in (overall_figure(analysis), curve_figure(analysis, analysis.metrics[0])):
        spots = {trace.name: list(trace.x) for trace in figure.data if trace.name in (claimed, open_)}
        assert spots[claimed] == [analysis.places[2]]  # `good` at top 80 % beat its top 40 %
        assert analysis.places[5] in spots[open_]  # `odd` falls by less than its noise
    (good, odd) = heat_figure(analysis, "overall").data[0].text
    assert [text[-1] for text in good] == ["▲", good[1][-1], good[2][-1]]
    assert "▲" not in "".join(odd) + good[1] + good[2]
    stars = sum(text.count("★") for row in matrix_figure(analysis, "overall").data[0].text for text in row)
    assert stars == 2 * sum(pair.claim != "none" for pair in analysis.pairs)
    best = analysis.cells[analysis.ranking("overall")[0]].name
    assert ranking_figure(analysis).layout.yaxis.categoryarray[-1] == best


@needs_browser
def test_a_real_browser_draws_every_figure(reported: tuple[Study, SlicedStudy], tmp_path: Path) -> None:
    document = opened(write_report(*reported).page, tmp_path)
    counts = drawn(document)
    # overall, trends, three curves, the ranking, the training; maps and matrices of overall and both capabilities
    assert len(counts) == 7 + 2 * 3
    assert all(counts)
    for word in ("top 40%", "good", "odd", "claimed"):
        assert word in document
