"""Branches from one trunk: their plans share the trunk, its weights exist once, and what they share makes no claim."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ResumeError, StudyError
from megatron_kaiyuan.quantile.analysis import analyse
from megatron_kaiyuan.quantile.claimable import known_spread, planned_design, smallest_claimable
from megatron_kaiyuan.quantile.inference import (
    OVERALL,
    PAIRS_SHARE,
    SHAPES_SHARE,
    Design,
    pairs_of,
    shapes_of,
)
from megatron_kaiyuan.quantile.paired import without_trunks
from megatron_kaiyuan.quantile.proposal import propose
from megatron_kaiyuan.quantile.report import write_report
from megatron_kaiyuan.quantile.results import RunResult
from megatron_kaiyuan.quantile.runs import Run, SlicedStudy, last_step, run_folder, training_command
from megatron_kaiyuan.quantile.statistics import Measure, Score
from megatron_kaiyuan.quantile.study import Study
from megatron_kaiyuan.quantile.training import check_trunks
from tests.unit_tests.quantile.tiny_study import (
    Effect,
    invent_results,
    sliced_study,
    study_content,
    tiny_study,
    write_results,
)

STEP = 8 * 32
BRANCH = {"design": "branch", "trunk": {"tokens": 20 * STEP}}
STUDIES = 60


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, SlicedStudy]:
    return sliced_study(tmp_path_factory.mktemp("branches"), **BRANCH)


def control(sliced: SlicedStudy, kind: str, seed: int = 1) -> Run:
    return next(run for run in sliced.runs if run.control == kind and run.seed == seed)


def test_a_study_has_its_slices_and_controls_for_each_trunk(branched: tuple[Study, SlicedStudy]) -> None:
    _, sliced = branched
    names = [(run.cell_name, run.seed) for run in sliced.runs]
    assert len(names) == len(set(names)) == 3 * (2 * 3 + 2 + 1)
    assert [trunk.name for trunk in sliced.trunks] == ["trunk-seed1", "trunk-seed2", "trunk-seed3"]


def test_a_branch_resumes_its_trunk_and_no_other(branched: tuple[Study, SlicedStudy]) -> None:
    study, sliced = branched
    trunks = {trunk.seed: Plan.load(trunk.plan) for trunk in sliced.trunks}
    assert trunks[1].num_samples == 20 * 8
    for run in sliced.runs:
        plan = Plan.load(run.plan)
        assert plan.num_samples == (20 + study.steps) * 8
        plan.check_resume(trunks[run.seed].order_record(), 20 * 8)
        other = trunks[run.seed % 3 + 1].order_record()
        with pytest.raises(ResumeError, match=r"phases\.0"):
            plan.check_resume(other, 20 * 8)


def test_half_of_a_branch_is_its_slice_and_the_other_half_the_mix_of_all_branches(
    branched: tuple[Study, SlicedStudy],
) -> None:
    _, sliced = branched
    shown = {}
    for run in (sliced.runs[0], control(sliced, "random"), control(sliced, "mix")):
        phase = Plan.load(run.plan).phases[-1]
        shown[run.control] = dict(zip(phase.streams, (int(used) for used in phase.used), strict=True))
        assert phase.lr is not None
        assert (phase.lr.start, phase.lr.end) == (1e-2, 1e-4)
    assert shown[""]["good-slice"] == shown["random"]["good-slice"] == 1024 // 32
    assert set(shown["mix"]) == {"good", "odd"}
    mixes = [{name: used for name, used in one.items() if name != "good-slice"} for one in shown.values()]
    assert mixes[0] == mixes[1]
    assert sum(mixes[2].values()) == 2 * sum(mixes[0].values())


def test_held_out_documents_are_in_no_slice(tmp_path: Path) -> None:
    held_out = {"good": {"documents": 40}}
    _, sliced = sliced_study(tmp_path, **BRANCH, evaluation={"held_out": held_out})
    plan = Plan.load(sliced.runs[0].plan)
    assert set(plan.opened["good-slice"].held_out_elsewhere.tolist()) == set(plan.opened["good"].held_out.tolist())
    assert len(plan.opened["good"].held_out) == 40


def test_a_branch_loads_the_one_checkpoint_of_its_trunk_until_it_has_its_own(
    tmp_path: Path, branched: tuple[Study, SlicedStudy]
) -> None:
    study, sliced = branched
    study = study.model_copy(update={"output": str(tmp_path)})
    run = sliced.runs[0]

    def loaded(one: Study) -> str:
        command = training_command(one, run)
        assert not {"--lr", "--finetune"} & set(command), "the plan gives the rate, and a branch goes on"
        return command[command.index("--load") + 1]

    own = run_folder(study, run) / "checkpoints"
    assert loaded(study) == str(tmp_path / "runs" / "trunk-seed1" / "checkpoints")
    assert study.trunk is not None
    elsewhere = study.model_copy(update={"trunk": study.trunk.model_copy(update={"folder": "/other"})})
    assert loaded(elsewhere) == "/other/runs/trunk-seed1/checkpoints"
    own.mkdir(parents=True)
    (own / "latest_checkpointed_iteration.txt").write_text("22")
    assert loaded(study) == loaded(elsewhere) == str(own)
    assert (last_step(study, sliced.trunks[0]), last_step(study, run)) == (20, 28)


def test_no_branch_is_trained_before_its_trunk_or_from_another_one(branched: tuple[Study, SlicedStudy]) -> None:
    study, sliced = branched
    with pytest.raises(StudyError, match="the trunk is not trained to its last step"):
        check_trunks(study, sliced.trunks)
    folder = run_folder(study, sliced.trunks[0])
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"digest": "other", "steps": 20}')
    with pytest.raises(StudyError, match="another plan, model or training \\(other"):
        check_trunks(study, sliced.trunks)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"design": "branch"}, "design: branch needs trunk"),
        ({"trunk": {"tokens": 20 * STEP}}, "trunk: is of design: branch"),
        (BRANCH | {"trunk": {"tokens": 20 * STEP + 1}}, "not a whole number of two steps or more; 5,120 is"),
        (BRANCH | {"trunk": {"tokens": 20 * STEP, "mix": {"better": 1}}}, "trunk.mix: weights above 0"),
        (BRANCH | {"trunk": {"tokens": 20 * STEP, "share": "100%"}}, "leaves no room for the mix"),
    ],
)
def test_wrong_branches_are_refused_by_field(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(StudyError, match=told):
        tiny_study(tmp_path, **changes)


def test_a_study_from_scratch_keeps_the_identity_that_it_had_before_there_were_branches(tmp_path: Path) -> None:
    plain, said = (tiny_study(tmp_path, **changes) for changes in ({}, {"design": "scratch"}))
    branch = tiny_study(tmp_path, **BRANCH)
    assert plain.training_digest == said.training_digest != branch.training_digest
    assert branch.trunk is not None
    moved = branch.model_copy(update={"trunk": branch.trunk.model_copy(update={"folder": "/other"})})
    assert moved.training_digest == branch.training_digest


def test_trunks_are_taken_out_and_the_spread_of_the_branches_stays_what_it_was() -> None:
    rng = np.random.default_rng(0)
    own = [rng.normal(number, 2.0, (3, 1)) for number in range(400)]
    shifted = [cell + np.array([[-50.0], [7.0], [90.0]]) for cell in own]
    found, without = (without_trunks(cells, [[1, 2, 3]] * 400) for cells in (own, shifted))
    np.testing.assert_allclose([cell - 47 / 3 for cell in without], found, atol=1e-9)
    assert np.mean([cell.var(ddof=1) for cell in found]) == pytest.approx(4.0, rel=0.15)


def test_a_missing_branch_does_not_move_its_slice_by_the_luck_of_a_trunk() -> None:
    trunks, effects = np.array([0.0, 10.0, -4.0]), np.arange(6.0)
    cells = [(effect + trunks)[:, None] for effect in effects]
    cells[2], seeds = cells[2][:2], [[1, 2, 3]] * 2 + [[1, 2]] + [[1, 2, 3]] * 3
    np.testing.assert_allclose(
        [cell.mean() for cell in without_trunks(cells, seeds)], effects + trunks.mean(), atol=1e-9
    )


def simulated(
    rng: np.random.Generator, *, wild: float = 1.0, missing: float = 0.0, items: float = 0.0, rise: float = 0.0
) -> tuple[Design, dict[str, Score]]:
    """Two sources x three quantiles and three controls; trunks differ five times as much as branches of one."""
    sources = ["a"] * 3 + ["b"] * 3 + ["a, random", "b, random", "mix"]
    thirds = np.arange(3) / 9
    places = [8 / 9 - number / 3 - thirds for number in (0, 1, 2, 0, 1, 2)] + [np.full(3, 0.5)] * 3
    trunks, wide = 5 * rng.normal(size=3), int(rng.integers(9))
    cells, seeds, kept = [], [], []
    for number, (source, place) in enumerate(zip(sources, places, strict=True)):
        values = trunks + (wild if number == wide else 1.0) * rng.normal(size=3) + rise * place * source.startswith("a")
        some = np.flatnonzero(rng.random(3) >= missing)
        some = some if len(some) else np.array([0])
        cells.append((values[:, None] + items * rng.normal(size=(1, 40)))[some])
        seeds.append(some.tolist())
        kept.append(place[some])
    design = Design(sources, kept, spread=True)
    return design, {OVERALL: Measure("x", without_trunks(cells, seeds), np.ones(40))}


@pytest.mark.parametrize("world", [{}, {"wild": 3.0}, {"wild": 10.0}, {"missing": 0.15}, {"items": 8.0}])
def test_false_claims_about_branches_stay_within_what_6_percent_allows(world: dict[str, float]) -> None:
    rng, false = np.random.default_rng(1), 0
    for _ in range(STUDIES):
        design, scores = simulated(rng, **world)
        claims = [*shapes_of(design, scores, 0.05 * SHAPES_SHARE), *pairs_of(scores, 0.05 * PAIRS_SHARE)]
        false += any(one.claim != "none" for one in claims)
    assert false <= 9  # binomial with 6 %: above it less than once in a hundred times


def test_a_planted_trend_is_found_under_trunks_that_differ_more() -> None:
    rng, found = np.random.default_rng(2), 0
    for _ in range(30):
        design, scores = simulated(rng, rise=7.0)
        found += shapes_of(design, scores, 0.05 * SHAPES_SHARE)[0].claim == "rises"
    assert found > 20


def branch_results(study: Study, sliced: SlicedStudy, quality: Effect, seed: int = 3) -> dict[str, RunResult]:
    """Results whose controls are all at 0.25, under trunks that differ more than the slices."""
    rng = np.random.default_rng(seed)
    luck = {seed: rng.normal(0, 0.5) for seed in study.training.seeds}
    results = {}
    for name, result in invent_results(sliced, quality, rng=rng).items():
        run = next(run for run in sliced.runs if run.name == name)
        held_out = result.held_out["clean"]
        bits = luck[run.seed] + (0.25 - quality(run.source, run.top) if run.control else 0.0)
        nats = tuple(
            float(one + bits * size * np.log(2)) for one, size in zip(held_out.nats, held_out.bytes, strict=True)
        )
        results[name] = replace(result, held_out={"clean": replace(held_out, nats=nats)})
    return results


def test_only_what_is_worse_than_the_mix_alone_is_left_out(branched: tuple[Study, SlicedStudy]) -> None:
    """Both times all slices of `odd` lose to the best slice of `good`."""
    study, sliced = branched
    advice = []
    for level in (0.25, 1.5):
        quality = partial(lambda level, source, top: 0.6 * top if source == "good" else level, level)
        advice.append(propose(study, analyse(study, sliced, branch_results(study, sliced, quality, 4))).advice[1])
    assert [one.best is None for one in advice] == [False, True]
    assert "not shown to be worse than the mix alone: it is not left out" in advice[0].reasons[-1]


def test_a_report_compares_slices_with_the_mix_alone_and_random_documents(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path, **BRANCH)

    def quality(source: str, top: float) -> float:
        return 0.6 * top if source == "good" else 0.25

    analysis = analyse(study, sliced, branch_results(study, sliced, quality))
    claims = {
        (analysis.cells[pair.first].name, analysis.controls[pair.second - len(analysis.cells)]): pair.claim
        for pair in analysis.against_controls
    }
    assert claims["good top 0%", "the mix alone"] == claims["good top 0%", "good, random documents"] == "first"
    assert claims["good top 80%", "the mix alone"] == "second"
    trends = {trend.source: trend.claim for trend in analysis.trends}
    assert set(trends) == {"good", "odd"}
    write_results(study, sliced, quality)
    written = write_report(study, sliced)
    page = written.page.read_text()
    assert "Against the controls" in page
    assert "odd, random documents" in page


def test_a_study_says_in_advance_what_it_can_claim_in_bits_per_byte(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path, **BRANCH)
    scratch = tiny_study(tmp_path, **{key: value for key, value in study_content(tmp_path).items() if key == "slices"})
    sizes, fewer = (smallest_claimable(planned_design(one), 0.05) for one in (study, scratch))
    assert sizes.pair > fewer.pair, "controls are compared too"
    assert known_spread("0.02") == 0.02
    write_results(study, sliced, lambda source, top: 0.0, seed_spread=0.02)
    told = known_spread(str(write_report(study, sliced).data))
    assert told == pytest.approx(0.02, rel=0.35)
    assert f"({sizes.pair * told:.2g} bits per byte)" in sizes.lines([0.0, 0.4, 0.8], told)[0]
    for wrong in ("0", "-1", "nan", "nowhere.json"):
        with pytest.raises(StudyError, match="--expected-spread"):
            known_spread(wrong)
