"""Several scores of one dataset: each is cut by itself, all hold out the same documents, and the plan follows one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.analysis import OVERALL, analyse
from megatron_kaiyuan.quantile.proposal import Proposal, propose
from megatron_kaiyuan.quantile.runs import SlicedStudy, write_slices
from megatron_kaiyuan.quantile.study import Study, parse_study
from tests.unit_tests.quantile.tiny_study import invent_results, study_content, tiny_study, write_sources


def content(folder: Path, **source: Any) -> dict[str, Any]:
    """`good` by its own score and by a second one, `odd` by one; 60 documents of `good` are held out."""
    told = study_content(folder)
    told["sources"]["good"] |= {"score": ["score", "second.edu"]} | source
    told["evaluation"]["held_out"] |= {"good": {"documents": 60}}
    return told


def two_scores(folder: Path) -> tuple[Study, SlicedStudy]:
    write_sources(folder)
    np.save(folder / "good.scores.second.edu.npy", np.random.default_rng(9).permutation(900).astype(float))
    study = parse_study(content(folder))
    return study, write_slices(study)[0]


def test_each_score_is_cut_by_itself_and_none_sees_what_is_held_out(tmp_path: Path) -> None:
    study, sliced = two_scores(tmp_path)
    assert list(study.sources) == ["good-score", "good-second_edu", "odd"]
    assert study.datasets == {"good": ["good-score", "good-second_edu"], "odd": ["odd"]}
    assert len(sliced.runs) == 3 * 3 * 3
    held_out = {tuple(Plan.load(run.plan).opened["good"].held_out.tolist()) for run in sliced.runs}
    assert len(held_out) == 1
    for source, score in (("good-score", "score"), ("good-second_edu", "second.edu")):
        run = next(run for run in sliced.runs if (run.source, run.top) == (source, 0.4))
        order = CurriculumDataset(Plan.load(run.plan))
        seen = {part.document for sample in range(len(order)) for part in order.provenance(sample).segments}
        scores = np.load(tmp_path / f"good.scores.{score}.npy")
        assert (run.score_low, run.score_high) == (min(scores[list(seen)]), max(scores[list(seen)]))
        assert not seen & set(next(iter(held_out)))


def proposed(folder: Path, first: float, second: float) -> tuple[Study, Proposal]:
    """What is proposed where the loss rises by these from the best to the worst quantile of the two scores."""
    study, sliced = two_scores(folder)
    rise = {"good-score": first, "good-second_edu": second, "odd": 0.0}
    results = invent_results(sliced, lambda source, top: rise[source] * top, seed_spread=0.01, item_spread=0.01)
    analysis = analyse(study, sliced, results)
    assert {trend.source for trend in analysis.trends if trend.score == OVERALL} == set(study.sources)
    return study, propose(study, analysis)


@pytest.mark.parametrize(("first", "second", "followed"), [(0.5, 0.0, "score"), (0.0, 0.5, "second.edu")])
def test_the_plan_follows_the_score_that_orders_quality(
    tmp_path: Path, first: float, second: float, followed: str
) -> None:
    study, proposal = proposed(tmp_path, first, second)
    advice = {one.source: one for one in proposal.advice}
    used = [name for name in study.datasets["good"] if advice[name].followed]
    assert [study.sources[name].score for name in used] == [followed]
    assert f"The plan follows `{followed}`" in advice[used[0]].reasons[0]
    (other,) = set(study.datasets["good"]) - set(used)
    assert advice[other].reasons[0].startswith(f"Not followed: the plan takes `{followed}` of the same data, which was")
    assert proposal.plan is not None
    plan = yaml.safe_load(proposal.plan)
    assert plan["sources"]["good"] == {"shards": str(tmp_path / "good"), "score": followed}
    path = tmp_path / "proposed.yaml"
    path.write_text(proposal.plan)
    assert list(Plan.load(path).phases[0].streams) == ["good", "odd"]


def test_without_an_order_the_best_slice_decides_and_nothing_is_claimed(tmp_path: Path) -> None:
    _, proposal = proposed(tmp_path, 0.0, 0.0)
    followed = [one for one in proposal.advice if one.source.startswith("good") and one.followed]
    assert len(followed) == 1
    other = next(one for one in proposal.advice if not one.followed)
    assert "which has the better best slice; the best slices of the two were not told apart" in other.reasons[0]


def test_a_score_without_results_is_not_followed(tmp_path: Path) -> None:
    study, sliced = two_scores(tmp_path)
    results = invent_results(sliced, lambda source, top: 0.0)
    kept = {name: result for name, result in results.items() if not name.startswith("good-score")}
    advice = {one.source: one for one in propose(study, analyse(study, sliced, kept)).advice}
    assert not advice["good-score"].followed
    assert advice["good-second_edu"].followed


def test_a_study_with_one_score_a_source_keeps_its_runs(tmp_path: Path) -> None:
    write_sources(tmp_path)
    plain = tiny_study(tmp_path)
    assert plain.datasets == {"good": ["good"], "odd": ["odd"]}
    plan = yaml.safe_load(Path(write_slices(plain)[0].runs[0].plan).read_text())
    assert plan["sources"]["good"] == {"shards": str(tmp_path / "good"), "score": "score"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"score": ["a", "a"]}, "sources.good.score: ['a', 'a'] is no list of different scores"),
        ({"score": ["a"]}, "sources.good.score: ['a'] is no list of different scores"),
        ({"rank_index": "x.rank"}, "sources.good.rank_index: is of one score"),
        ({"score": ["a.b", "a_b"]}, "sources: two of them are called alike"),
    ],
)
def test_scores_that_are_not_several_are_refused(tmp_path: Path, source: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError) as caught:
        parse_study(content(tmp_path, **source))
    assert words in str(caught.value)
