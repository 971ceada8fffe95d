"""Claims: rarely false where nothing is there, made where something is, and never from one seed."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.selection import parse_fraction
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.analysis import OVERALL, Analysis, analyse
from megatron_kaiyuan.quantile.proposal import propose
from megatron_kaiyuan.quantile.results import Identity, check_comparable
from megatron_kaiyuan.quantile.runs import SlicedStudy
from megatron_kaiyuan.quantile.study import Study
from tests.unit_tests.quantile.tiny_study import (
    Effect,
    informative,
    invent_results,
    nothing,
    sliced_study,
    study_content,
    tiny_study,
)

REPETITIONS = 300


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, SlicedStudy, Path]:
    folder = tmp_path_factory.mktemp("study")
    return *sliced_study(folder), folder


def analysed(sliced: tuple[Study, SlicedStudy, Path], effect: Effect, seed: int = 0, **noise: float) -> Analysis:
    rng = np.random.default_rng(seed)
    return analyse(sliced[0], sliced[1], invent_results(sliced[1], effect, rng=rng, **noise))


def claims(analysis: Analysis) -> int:
    return sum(one.claim != "none" for one in (*analysis.trends, *analysis.pairs))


@pytest.mark.parametrize(("seed_spread", "item_spread"), [(0.05, 0.0), (0.02, 0.15), (0.0, 0.3)])
def test_a_report_on_nothing_makes_a_claim_at_most_as_often_as_its_level_says(
    sliced: tuple[Study, SlicedStudy, Path], seed_spread: float, item_spread: float
) -> None:
    false = sum(
        claims(analysed(sliced, nothing, seed, seed_spread=seed_spread, item_spread=item_spread)) > 0
        for seed in range(REPETITIONS)
    )
    # at 5 % the count is binomial: more than 25 of 300 happens once in a hundred times
    assert false <= 25


def test_a_true_trend_is_found_and_the_random_score_is_not_claimed(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    found = wrong = 0
    for seed in range(100):
        analysis = analysed(sliced, informative, seed, seed_spread=0.03)
        good, odd = (analysis.trend(source, OVERALL) for source in ("good", "odd"))
        assert good is not None
        assert odd is not None
        found += good.claim == "rises"
        wrong += odd.claim != "none"
    assert found >= 90
    assert wrong <= 5


def test_a_score_of_the_wrong_sign_is_called_so(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    analysis = analysed(sliced, lambda source, top: -informative(source, top), seed_spread=0.01, item_spread=0.02)
    trend = analysis.trend("good", OVERALL)
    assert trend is not None
    assert trend.claim == "falls"
    assert [sure for upper, lower, sure in analysis.reversals(OVERALL) if analysis.cells[upper].source == "good"]
    advice = propose(sliced[0], analysis).advice[0]
    assert not advice.in_order
    assert "check its sign" in advice.reasons[0]


def test_a_bad_middle_is_a_reversal_and_neighbours_in_noise_are_called_chance(
    sliced: tuple[Study, SlicedStudy, Path],
) -> None:
    def dip(source: str, top: float) -> float:
        return 0.4 if (source, top) == ("good", 0.4) else 0.0

    analysis = analysed(sliced, dip, seed_spread=0.01, item_spread=0.01)
    names = {
        (analysis.cells[upper].name, analysis.cells[lower].name): sure
        for upper, lower, sure in analysis.reversals(OVERALL)
    }
    assert names[("good top 40%", "good top 80%")] is True
    assert all(not sure for pair, sure in names.items() if pair[0].startswith("odd"))


def test_one_seed_gives_no_conclusion_at_all(tmp_path: Path) -> None:
    training = study_content(tmp_path)["training"] | {"seeds": 1}
    study, one = sliced_study(tmp_path, training=training)
    analysis = analyse(study, one, invent_results(one, lambda source, top: 5 * top))
    assert claims(analysis) == 0
    assert "No conclusion is drawn" in analysis.refusals[0]
    proposal = propose(study, analysis)
    assert proposal.plan is None
    assert "one seed" in proposal.summary


def test_one_seed_still_shows_which_mean_is_best(tmp_path: Path) -> None:
    training = study_content(tmp_path)["training"] | {"seeds": 1}
    study, one = sliced_study(tmp_path, training=training)
    analysis = analyse(study, one, invent_results(one, lambda source, top: 5 - top if source == "odd" else 9 + top))
    names = [analysis.cells[cell].name for cell in analysis.ranking(OVERALL)]
    assert names == [*(f"odd top {top}%" for top in (80, 40, 0)), *(f"good top {top}%" for top in (0, 40, 80))]
    assert analysis.unit == "spreads between slices"


def test_slices_that_spread_more_than_others_are_marked(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    results = invent_results(sliced[1], nothing, seed_spread=0.02)
    assert not any("fold" in line for line in analyse(sliced[0], sliced[1], results).warnings)
    wild = replace(results["odd-top0-seed1"].held_out["clean"], nats=(9000.0,) * 60)
    results["odd-top0-seed1"] = replace(results["odd-top0-seed1"], held_out={"clean": wild})
    warnings = analyse(sliced[0], sliced[1], results).warnings
    assert any(line.startswith("overall: the variance between seeds differs") for line in warnings)


def test_shared_documents_allow_no_statement_about_scores(tmp_path: Path) -> None:
    slices = study_content(tmp_path)["slices"] | {"documents": "shared"}
    study, shared = sliced_study(tmp_path, slices=slices)
    analysis = analyse(study, shared, invent_results(shared, informative, seed_spread=0.01))
    assert analysis.trends == ()
    assert claims(analysis) > 0
    assert "share the documents" in analysis.refusals[0]
    proposal = propose(study, analysis)
    assert (proposal.plan, proposal.advice) == (None, ())
    assert "share the documents" in proposal.summary


def test_probabilities_of_the_matrix_are_complementary(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    analysis = analysed(sliced, informative)
    for first in range(6):
        for second in range(6):
            both = analysis.probability(OVERALL, first, second) + analysis.probability(OVERALL, second, first)
            assert both == pytest.approx(1.0)
            assert not (
                analysis.claimed_better(OVERALL, first, second) and analysis.claimed_better(OVERALL, second, first)
            )


def test_rank_ranges_are_what_the_claims_leave_open(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    analysis = analysed(sliced, lambda source, top: 3 * top + (10 if source == "odd" else 0), seed_spread=0.001)
    order = analysis.ranking(OVERALL)
    assert [analysis.rank_range(OVERALL, cell) for cell in order] == [(rank, rank) for rank in range(1, 7)]
    assert {analysis.rank_range(OVERALL, cell) for cell in range(6)} >= {(1, 1), (6, 6)}
    vague = analysed(sliced, nothing)
    assert all(vague.rank_range(OVERALL, cell) == (1, 6) for cell in range(6))


def test_the_proposal_keeps_the_good_top_and_loads_as_a_plan(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    study, _, _ = sliced
    proposal = propose(study, analysed(sliced, lambda source, top: top if source == "good" else 0.4, seed_spread=0.01))
    good, odd = proposal.advice
    assert (good.broad, good.best, good.in_order) == ("top 60%", "top 22%", True)
    assert (odd.broad, odd.best, odd.in_order) == ("all", None, False)
    assert proposal.plan is not None
    path = study.folder / "plan.yaml"
    path.write_text(proposal.plan)
    plan = Plan.load(path)
    assert [phase.name for phase in plan.phases] == ["broad", "best"]
    assert list(plan.phases[1].streams) == ["good"]


def test_a_plan_keeps_all_documents_of_the_slices_it_keeps(tmp_path: Path) -> None:
    """The best slices reach down to a fifth of the source: further than half way to the quantile that lost."""
    slices = study_content(tmp_path)["slices"] | {"tops": ["0%", "35%", "80%"], "tokens": 2560}
    study, wide = sliced_study(tmp_path, slices=slices)
    results = invent_results(wide, lambda source, top: 2 * top if source == "good" else 0.0, seed_spread=0.01)
    analysis = analyse(study, wide, results)
    best = [run for run in wide.runs if (run.source, run.top) == ("good", 0.0)]
    end = max(run.reach[1] for run in best)
    assert analysis.reaches[0] == (0, end)
    assert end > Fraction(175, 1000)
    assert analysis.places[0] == pytest.approx(1 - float(end) / 2)
    (good, _) = propose(study, analysis).advice
    assert good.best is not None
    kept = parse_fraction(good.best.removeprefix("top "))
    assert end <= kept <= analysis.reaches[1][0]


def test_a_trend_is_a_line_through_where_the_documents_lie(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    analysis = analysed(sliced, informative, seed_spread=0.01)
    trend = analysis.trend("good", OVERALL)
    means = [float(runs.mean()) for runs in analysis.scores[OVERALL].run_means[:3]]
    slope = np.polyfit(analysis.places[:3], means, 1)[0]
    assert trend is not None
    assert trend.estimate.value == pytest.approx(slope * (analysis.places[0] - analysis.places[2]))


def test_without_claims_everything_is_kept(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    proposal = propose(sliced[0], analysed(sliced, nothing))
    assert {(advice.broad, advice.best, advice.in_order) for advice in proposal.advice} == {("all", "all", False)}


def test_capabilities_are_compared_one_by_one(tmp_path: Path) -> None:
    held_out = study_content(tmp_path)["evaluation"]["held_out"]
    evaluation = {"held_out": held_out, "tasks": [{"name": "quiz", "capability": "knowledge"}]}
    study, sliced = sliced_study(tmp_path, evaluation=evaluation)
    analysis = analyse(study, sliced, invent_results(sliced, informative, task=True))
    assert list(analysis.scores) == [OVERALL, "language modelling", "knowledge"]
    assert [metric.name for metric in analysis.metrics if not metric.decides] == ["quiz: accuracy"]
    assert len(analysis.trends) == 2 * 3
    assert len(analysis.pairs) == 15 * 3


def test_missing_runs_are_marked(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    results = invent_results(sliced[1], nothing)
    results.pop("good-top0-seed2")
    analysis = analyse(sliced[0], sliced[1], results)
    assert "Incomplete: 17 of 18" in analysis.warnings[0]
    assert "Two seeds" in analysis.warnings[1]
    assert analysis.seeds[0] == 2


def test_one_slice_with_one_seed_left_stops_all_conclusions(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    results = invent_results(sliced[1], lambda source, top: 5 * top)
    for seed in (1, 2):
        results.pop(f"odd-top80-seed{seed}")
    analysis = analyse(sliced[0], sliced[1], results)
    assert claims(analysis) == 0
    assert "No conclusion is drawn" in analysis.refusals[0]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tokenizer", "other", "the tokenizer differs"),
        ("model", "other", "the model or its training differs"),
        ("tokens", 2048, "the training budget in tokens differs \\(1024 and 2048\\)"),
        ("evaluation", "other", "what they were measured with differs"),
    ],
)
def test_results_that_do_not_compare_are_refused(
    sliced: tuple[Study, SlicedStudy, Path], field: str, value: object, words: str
) -> None:
    identity = Identity("tok", "model", 1024, "suite")
    odd = {"odd-top40-seed3": replace(identity, **{field: value})}
    with pytest.raises(StudyError, match=f"good-top0-seed1 and odd-top40-seed3 do not compare: {words}"):
        check_comparable(invent_results(sliced[1], nothing, identities=odd))


def test_results_on_other_documents_are_refused(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    results = invent_results(sliced[1], nothing)
    changed = replace(results["good-top0-seed2"].held_out["clean"], tokens=(1,) * 60)
    results["good-top0-seed2"] = replace(results["good-top0-seed2"], held_out={"clean": changed})
    with pytest.raises(StudyError, match="different documents of 'clean'"):
        check_comparable(results)


def test_unknown_bytes_are_marked_as_bound_to_the_tokenizer(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    results = {
        name: replace(
            result,
            held_out={"clean": replace(result.held_out["clean"], bytes=(0,) * len(result.held_out["clean"].bytes))},
        )
        for name, result in invent_results(sliced[1], nothing).items()
    }
    analysis = analyse(sliced[0], sliced[1], results)
    assert analysis.metrics[0].unit == "bits/token"
    assert any("of this tokenizer only" in line for line in analysis.warnings)


def test_fewer_than_two_slices_are_nothing_to_compare(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    results = {name: result for name, result in invent_results(sliced[1], nothing).items() if "good-top0-" in name}
    with pytest.raises(StudyError, match="nothing to compare"):
        analyse(sliced[0], sliced[1], results)
    assert tiny_study(sliced[2]) == sliced[0]
