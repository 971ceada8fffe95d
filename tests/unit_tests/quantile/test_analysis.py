"""Claims: rarely false where nothing is there, made where something is, and never from one seed."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

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
    return *sliced_study(folder, slices=study_content(folder)["slices"] | {"documents": "spread"}), folder


def analysed(sliced: tuple[Study, SlicedStudy, Path], effect: Effect, seed: int = 0, **noise: float) -> Analysis:
    rng = np.random.default_rng(seed)
    return analyse(sliced[0], sliced[1], invent_results(sliced[1], effect, rng=rng, **noise))


def claims(analysis: Analysis) -> int:
    return sum(one.claim != "none" for one in (*analysis.trends, *analysis.bends, *analysis.pairs))


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


def test_slices_that_spread_more_than_others_are_named_and_no_pair_with_them_is_claimed(
    sliced: tuple[Study, SlicedStudy, Path],
) -> None:
    results = invent_results(sliced[1], lambda source, top: 0.5 * top, seed_spread=0.02)
    assert not any("spread more" in line for line in analyse(sliced[0], sliced[1], results).warnings)
    wild = replace(results["odd-top0-seed1"].held_out["clean"], nats=(9000.0,) * 60)
    results["odd-top0-seed1"] = replace(results["odd-top0-seed1"], held_out={"clean": wild})
    analysis = analyse(sliced[0], sliced[1], results)
    assert any(line.startswith("overall: the seeds of odd top 0% spread more") for line in analysis.warnings)
    assert analysis.unsteady[OVERALL] == (3,)
    claimed = {cell for pair in analysis.pairs if pair.claim != "none" for cell in (pair.first, pair.second)}
    assert claimed == {0, 1, 2, 4, 5}


def test_a_measure_that_is_equal_in_all_seeds_is_left_out_and_named(tmp_path: Path) -> None:
    """Its spread is rounding, and one over it was the weight that decided everything."""
    evaluation = {
        "held_out": study_content(tmp_path)["evaluation"]["held_out"],
        "tasks": [{"name": "quiz", "capability": "language modelling"}],
    }
    study, sliced = sliced_study(tmp_path, evaluation=evaluation)
    results = invent_results(sliced, informative, task=True)
    same = {name: replace(one.tasks["quiz"], answer_bits_per_byte=(0.1,) * 60) for name, one in results.items()}
    for number, (name, task) in enumerate(same.items()):
        digits = tuple(value * (1 + 1e-16 * number) for value in task.answer_bits_per_byte)
        results[name] = replace(results[name], tasks={"quiz": replace(task, answer_bits_per_byte=digits)})
    analysis = analyse(study, sliced, results)
    assert any(line.startswith("Equal in all seeds, and so without a unit: quiz") for line in analysis.warnings)
    alone = analyse(tiny_study(tmp_path), sliced, invent_results(sliced, informative, task=False))
    spread = [float(cell.mean()) for cell in analysis.scores[OVERALL].run_means]
    assert max(spread) - min(spread) < 1000
    assert len(alone.metrics) == 1


def test_effects_are_told_as_a_reader_knows_them(tmp_path: Path) -> None:
    held_out = study_content(tmp_path)["evaluation"]["held_out"]
    evaluation = {"held_out": held_out, "tasks": [{"name": "quiz", "capability": "knowledge"}]}
    study, sliced = sliced_study(tmp_path, evaluation=evaluation)
    analysis = analyse(study, sliced, invent_results(sliced, informative, task=True, seed_spread=0.01))
    bits = [analysis.metrics[number].shown(0).mean() - analysis.metrics[number].shown(2).mean() for number in (0, 1)]
    assert analysis.effects(OVERALL, 0, 2)["bits/byte"] == pytest.approx(np.mean(bits))
    assert analysis.effects("knowledge", 0, 2)["bits/byte"] == pytest.approx(bits[1])
    assert set(analysis.effects("language modelling", 0, 2)) == {"bits/byte"}
    accuracy = analysis.metrics[2].shown(0).mean() - analysis.metrics[2].shown(2).mean()
    assert analysis.effects("knowledge", 0, 2)["accuracy"] == pytest.approx(accuracy)


def test_documents_of_one_group_are_one_draw(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    """Every document five times over: nothing new is known of the population."""
    plain = invent_results(sliced[1], informative, items=20)
    copied, grouped = {}, {}
    for name, result in plain.items():
        told = result.held_out["clean"]
        five = {key: tuple(np.repeat(getattr(told, key), 5).tolist()) for key in ("nats", "tokens", "bytes")}
        groups = tuple(np.repeat(np.arange(20), 5).tolist())
        copied[name] = replace(result, held_out={"clean": replace(told, **five)})
        grouped[name] = replace(result, held_out={"clean": replace(told, **five, groups=groups)})
    errors = [
        analyse(sliced[0], sliced[1], results).pair(OVERALL, 0, 2).estimate.error
        for results in (plain, copied, grouped)
    ]
    assert errors[2] == pytest.approx(errors[0])
    assert errors[1] < errors[0]


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
    values = np.concatenate(analysis.scores[OVERALL].run_means[:3])
    runs = [run for run in sliced[1].runs if run.source == "good"]
    places = [float(1 - sum(run.reach) / 2) for run in runs]
    assert trend is not None
    assert trend.estimate.value == pytest.approx(np.polyfit(places, values, 1)[0] * np.ptp(places))


def test_without_claims_everything_is_kept(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    proposal = propose(sliced[0], analysed(sliced, nothing))
    assert {(advice.broad, advice.best, advice.in_order) for advice in proposal.advice} == {("all", "all", False)}
    assert all(advice.undecided and "keep it as it is" in advice.reasons[0] for advice in proposal.advice)
    assert not any(mix.decided for mix in proposal.mixes)


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
    assert "1 of 6 slices have fewer than 3 seeds" in analysis.warnings[1]
    assert analysis.seeds[0] == 2


def test_a_slice_with_one_seed_left_is_in_no_claimed_pair(sliced: tuple[Study, SlicedStudy, Path]) -> None:
    results = invent_results(sliced[1], lambda source, top: 5 * top)
    for seed in (1, 2):
        results.pop(f"odd-top80-seed{seed}")
    analysis = analyse(sliced[0], sliced[1], results)
    assert {pair.claim for pair in analysis.pairs if 5 in (pair.first, pair.second)} == {"none"}
    assert analysis.claimed_better(OVERALL, 0, 2)
    assert any("1 of 6 slices have fewer than 3 seeds" in line for line in analysis.warnings)


def dip(source: str, top: float) -> float:
    """`good` is worse by 0.4 bits in its middle."""
    return 0.4 if (source, top) == ("good", 0.4) else 0.0


def test_a_score_that_is_not_monotone_is_called_so(tmp_path: Path) -> None:
    tops = {"tops": ["0%", "20%", "40%", "60%", "80%"], "documents": "spread"}
    study, sliced = sliced_study(tmp_path, slices=study_content(tmp_path)["slices"] | tops)

    def valley(source: str, top: float) -> float:
        return 0.4 - abs(top - 0.4) if source == "good" else 0.0

    analysis = analyse(study, sliced, invent_results(sliced, valley, seed_spread=0.01, item_spread=0.01))
    assert {bend.source: bend.claim for bend in analysis.bends} == {"good": "dips", "odd": "none"}
    assert any("its middle is worse than its ends" in line for line in propose(study, analysis).advice[0].reasons)
    straight = analyse(study, sliced, invent_results(sliced, informative, seed_spread=0.02))
    assert {bend.claim for bend in straight.bends} == {"none"}


def test_neighbouring_seeds_leave_roughness_to_the_quantiles(tmp_path: Path) -> None:
    """With three quantiles one number is left over to tell it by, and a trend has to be far above it."""
    study, own = sliced_study(tmp_path)
    analysis = analyse(study, own, invent_results(own, informative, seed_spread=0.03))
    trend = analysis.trend("good", OVERALL)
    assert trend is not None
    assert trend.exact < 0.005
    assert trend.rough > trend.exact
    assert any("documents: spread puts the seeds apart" in line for line in analysis.warnings)


def test_a_source_that_is_best_at_one_thing_is_kept_although_it_lost_overall(tmp_path: Path) -> None:
    """`odd` is much worse on held-out text and better at the quiz."""
    held_out = study_content(tmp_path)["evaluation"]["held_out"]
    evaluation = {"held_out": held_out, "tasks": [{"name": "quiz", "capability": "knowledge"}]}
    study, sliced = sliced_study(tmp_path, evaluation=evaluation)

    def text(source: str, top: float) -> float:
        return 4.0 if source == "odd" else 0.2 * top

    def quiz(source: str, top: float) -> float:
        return 0.0 if source == "odd" else 1.2

    results = invent_results(sliced, text, task=True, seed_spread=0.02)
    known = invent_results(sliced, quiz, task=True, seed_spread=0.02, rng=np.random.default_rng(1))
    for name, result in results.items():
        results[name] = replace(result, tasks=known[name].tasks)
    proposal = propose(study, analyse(study, sliced, results))
    (_, odd) = proposal.advice
    assert odd.best is not None
    assert "its best slice is the best of all on knowledge" in odd.reasons[-1]
    shares = {mix.capability: mix.shares for mix in proposal.mixes}
    assert shares["language modelling"] == {"good": 1.0, "odd": 0.0}
    assert shares["knowledge"]["odd"] >= 0.5
    assert proposal.plan is not None
    assert "odd" in Plan.from_spec(yaml.safe_load(proposal.plan)).phases[1].streams


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
    assert tiny_study(sliced[2], slices=study_content(sliced[2])["slices"] | {"documents": "spread"}) == sliced[0]
