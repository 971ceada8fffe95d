"""Slices are exact, equal, disjoint and where they are said to be; what cannot be cut is refused with numbers."""

from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan
from megatron_kaiyuan.documents.order import StorageOrder
from megatron_kaiyuan.documents.runs import DocumentRuns
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.analysis import analyse
from megatron_kaiyuan.quantile.runs import my_share, read_slices, write_slices
from megatron_kaiyuan.quantile.slices import choose_slices, cut_band, open_sources
from megatron_kaiyuan.quantile.study import load_study, parse_study
from megatron_kaiyuan.shards.source import open_source
from tests.unit_tests.data.tiny import numbered_documents, write_shard
from tests.unit_tests.quantile.tiny_study import (
    invent_results,
    nothing,
    sliced_study,
    study_content,
    tiny_study,
    write_sources,
)
from tests.unit_tests.training.test_plan_arguments import FINGERPRINT, write_manifest


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=3, max_size=60),
    centre=st.floats(0, 1),
    parts=st.integers(1, 4),
    need=st.integers(1, 60),
)
def test_a_band_is_the_shortest_that_holds_the_tokens(
    lengths: list[int], centre: float, parts: int, need: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("band")
    source = open_source("s", write_shard(folder / "s", numbered_documents(lengths)))
    runs = DocumentRuns(StorageOrder(source), np.array([0]), np.array([len(lengths)]))
    edges = cut_band(runs, round(centre * len(lengths)), parts, need)
    if edges is None:  # whole documents may not divide even where the tokens would be enough
        assert sum(lengths) < parts * (need + max(lengths))
        return
    assert len(edges) == parts + 1
    assert 0 <= edges[0] < edges[-1] <= len(lengths)
    for first, last in pairwise(edges):
        assert sum(lengths[first:last]) >= need
        assert sum(lengths[first + 1 : last]) < need or sum(lengths[first : last - 1]) < need


def test_slices_are_equal_disjoint_and_in_order(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path)
    opened = open_sources(study)
    slices = choose_slices(study, opened)
    assert len(sliced.runs) == len(slices) == 2 * 3 * 3
    for one, other in combinations([piece for piece in slices if piece.source == "good"], 2):
        assert one.last <= other.first or other.last <= one.first
        if one.top < other.top:
            assert one.score_low > other.score_high
    for piece in slices:
        assert study.slices.tokens < piece.tokens <= study.slices.tokens + 70
    # the middle of three parts lies at its quantile: rank 540 of 900 is the top 40 %
    middle = next(piece for piece in slices if (piece.source, piece.top, piece.part) == ("good", Fraction(2, 5), 1))
    assert middle.first < 540 < middle.last


def test_a_run_sees_the_documents_of_its_slice_exactly_once_and_its_budget_exactly(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path)
    for run in sliced.runs[:4]:
        order = CurriculumDataset(Plan.load(run.plan))
        assert len(order) * study.seq_length == study.budget
        seen: dict[int, int] = {}
        scores = np.load(tmp_path / f"{run.source}.scores.score.npy")
        for sample in range(len(order)):
            for segment in order.provenance(sample).segments:
                seen[segment.document] = seen.get(segment.document, 0) + segment.stop - segment.start
        assert len(seen) == run.documents
        assert run.score_low == min(scores[document] for document in seen)
        assert run.score_high == max(scores[document] for document in seen)


def test_more_tokens_than_a_slice_are_whole_passes_of_the_same_documents(tmp_path: Path) -> None:
    training = study_content(tmp_path)["training"] | {"tokens": 3072}
    _, sliced = sliced_study(tmp_path, training=training)
    order = CurriculumDataset(Plan.load(sliced.runs[0].plan))
    assert [order.provenance(sample).pass_number for sample in (0, len(order) - 1)] == [0, 2]
    assert len(order) == 3072 // 32


def test_all_runs_hold_out_the_same_documents(tmp_path: Path) -> None:
    held_out = {"held_out": {"good": {"documents": 60}}}
    _, sliced = sliced_study(tmp_path, evaluation=held_out)
    first, *others = (Plan.load(run.plan) for run in sliced.runs)
    windows = [HeldOutDataset(first, "good")[number]["tokens"].tolist() for number in range(20)]
    kept = set(first.opened["good"].held_out.tolist())
    for plan in others:
        assert [HeldOutDataset(plan, "good")[number]["tokens"].tolist() for number in range(20)] == windows
    for run in sliced.runs[:9]:
        order = CurriculumDataset(Plan.load(run.plan))
        trained = {s.document for sample in range(len(order)) for s in order.provenance(sample).segments}
        assert not trained & kept


def test_seeds_have_documents_of_their_own_or_share_them_as_asked(tmp_path: Path) -> None:
    _, own = sliced_study(tmp_path / "own")
    assert len({run.keep for run in own.runs if run.source == "good"}) == 9
    shared_slices = study_content(tmp_path)["slices"] | {"documents": "shared"}
    _, shared = sliced_study(tmp_path / "shared", slices=shared_slices)
    assert len({run.keep for run in shared.runs if run.source == "good"}) == 3
    assert len({run.plan_fingerprint for run in shared.runs}) == 18


def test_which_seed_is_nearest_to_the_top_changes_with_the_quantile(tmp_path: Path) -> None:
    _, sliced = sliced_study(tmp_path)
    best = [
        max((run for run in sliced.runs if (run.source, run.top) == ("good", top)), key=lambda run: run.score_high).seed
        for top in (0.0, 0.4, 0.8)
    ]
    assert len(set(best)) == 3


def test_no_data_are_copied(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path)
    written = [path for path in study.folder.rglob("*") if path.is_file()]
    assert len(written) == len(sliced.runs) + 1
    assert sum(path.stat().st_size for path in written) < 40_000


def test_slicing_twice_gives_the_same_runs(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path)
    assert write_slices(study)[0] == sliced == read_slices(study)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tops": ["0%", "5%", "80%"]}, ["overlap by", "lower slices.tokens to at most", "shared"]),
        ({"tokens": 12_800}, ["115,200 tokens", "not held out", "at most"]),
        ({"min_documents": 100}, ["are only", "fewer than slices.min_documents 100"]),
    ],
)
def test_slices_that_cannot_be_cut_are_refused_with_numbers(
    tmp_path: Path, change: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(StudyError) as caught:
        sliced_study(tmp_path, slices=study_content(tmp_path)["slices"] | change)
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_size_that_a_refusal_names_is_the_largest_that_fits(tmp_path: Path) -> None:
    slices = study_content(tmp_path)["slices"] | {"tokens": 12_800}
    with pytest.raises(StudyError) as caught:
        sliced_study(tmp_path, slices=slices)
    largest = int(str(caught.value).split("at most ")[1].split(", name")[0].replace(",", ""))
    training = study_content(tmp_path)["training"] | {"global_batch_size": 1, "micro_batch_size": 1}
    write_slices(tiny_study(tmp_path, slices=slices | {"tokens": largest}, training=training))
    with pytest.raises(StudyError):
        write_slices(tiny_study(tmp_path, slices=slices | {"tokens": largest + 32}, training=training))


def test_the_slices_of_the_full_study_fit_the_smaller_of_its_sources(tmp_path: Path) -> None:
    """Its file cut from a hundred-thousandth of FineWeb-Edu's 190 B tokens."""
    full = load_study(Path(__file__).parents[3] / "examples/quantile/full_study.yaml")
    rng = np.random.default_rng(4)
    lengths = rng.integers(1, 40, size=95_000).tolist()
    lengths += [20] * ((1_900_000 - sum(lengths)) // 20)
    write_shard(tmp_path / "edu", [[1] * length for length in lengths], rng.permutation(len(lengths)).astype(float))
    content = study_content(tmp_path)
    content["sources"] = {"edu": {"shards": str(tmp_path / "edu"), "score": "score"}}
    content["slices"] |= {
        "tops": [str(top) for top in full.slices.tops],
        "tokens": full.slices.tokens // 3_200_000 * 32,
    }
    content["training"] |= {"seeds": len(full.training.seeds), "global_batch_size": 1, "micro_batch_size": 1}
    content["evaluation"] = {"held_out": {"edu": {"documents": 25}}}
    assert len(write_slices(parse_study(content))[0].runs) == 15


def test_constant_scores_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path)
    np.save(tmp_path / "odd.scores.score.npy", np.full(900, 2.0))
    with pytest.raises(StudyError, match="source 'odd': all 900 documents have the score 2"):
        write_slices(tiny_study(tmp_path))


def test_quantiles_that_the_score_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path)
    np.save(tmp_path / "odd.scores.score.npy", np.where(np.arange(900) < 600, 1.0, 5.0))
    with pytest.raises(StudyError, match="hold documents of the one score 1 only"):
        write_slices(tiny_study(tmp_path))


def test_training_on_what_is_evaluated_is_refused(tmp_path: Path) -> None:
    write_sources(tmp_path)
    held_out = {"held_out": {"clean": {"shards": str(tmp_path / "odd"), "documents": 40}}}
    with pytest.raises(StudyError, match="'odd' and 'clean' both name the shard"):
        write_slices(tiny_study(tmp_path, evaluation=held_out))


@pytest.mark.parametrize("spelling", ["./odd", "../{name}/odd", "link/odd", "file"])
def test_training_on_what_is_evaluated_is_refused_however_its_path_is_spelled(tmp_path: Path, spelling: str) -> None:
    write_sources(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"file{suffix}").symlink_to(tmp_path / f"odd{suffix}")
    path = f"{tmp_path}/{spelling.format(name=tmp_path.name)}"
    held_out = {"held_out": {"clean": {"shards": path, "documents": 40}}}
    with pytest.raises(StudyError, match=r"'odd' and 'clean' both name the shard .*/odd \(as "):
        write_slices(tiny_study(tmp_path, evaluation=held_out))


def test_too_few_held_out_documents_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path)
    held_out = {"held_out": {"clean": {"shards": str(tmp_path / "clean"), "documents": 19}}}
    with pytest.raises(StudyError, match="19 are too few"):
        write_slices(tiny_study(tmp_path, evaluation=held_out))


def test_slices_of_a_changed_study_are_not_used(tmp_path: Path) -> None:
    sliced_study(tmp_path)
    with pytest.raises(StudyError, match="run `slice` again"):
        read_slices(tiny_study(tmp_path, seed=5))


def test_shards_whose_tokenizer_is_not_known_are_named(tmp_path: Path) -> None:
    """A study of shards with manifests and one without; with a manifest for each, nothing is left to say."""
    write_sources(tmp_path)
    for name in ("good", "clean"):
        write_manifest(tmp_path / name, vocab_size=96)
    study = tiny_study(tmp_path)
    write_slices(study)
    sliced = read_slices(study)
    assert (sliced.tokenizer, sliced.unmanifested) == (FINGERPRINT, (str(tmp_path / "odd"),))
    (warning,) = sliced.warnings
    assert warning.startswith(f"Shards without a manifest (the other shards have one): {tmp_path / 'odd'}. Whether all")
    assert warning in analyse(study, sliced, invent_results(sliced, nothing)).warnings
    write_manifest(tmp_path / "odd", vocab_size=96)
    assert write_slices(study)[0].warnings == []


def test_many_shards_without_a_manifest_are_named_in_part(tmp_path: Path) -> None:
    _, sliced = sliced_study(tmp_path)
    (warning,) = replace(sliced, unmanifested=tuple("abcdef")).warnings
    assert warning.startswith("Shards without a manifest (no shard has one): a, b, c, d and 2 more. Whether all")


def test_tasks_of_a_job_array_share_all_runs_between_them(tmp_path: Path) -> None:
    _, sliced = sliced_study(tmp_path)
    shares = [my_share(sliced.runs, task, 4) for task in range(4)]
    assert sorted(run.name for share in shares for run in share) == sorted(run.name for run in sliced.runs)
    with pytest.raises(StudyError, match="--task-id 4 of --num-tasks 4"):
        my_share(sliced.runs, 4, 4)


def test_spread_seeds_lie_evenly_over_the_stratum_of_their_quantile(tmp_path: Path) -> None:
    """Three seeds at 1/6, 3/6 and 5/6 of it; strata meet half way between the quantiles 0, 40 and 80 %."""
    slices = study_content(tmp_path)["slices"] | {"documents": "spread"}
    study, sliced = sliced_study(tmp_path, slices=slices)
    strata = {0.0: (0.0, 0.2), 0.4: (0.2, 0.6), 0.8: (0.6, 1.0)}
    for top, (best, worst) in strata.items():
        runs = [run for run in sliced.runs if (run.source, run.top) == ("good", top)]
        middles = sorted(float(sum(run.reach) / 2) for run in runs)
        expected = [best + (worst - best) * share for share in (1 / 6, 1 / 2, 5 / 6)]
        assert middles == pytest.approx(expected, abs=0.005)
    ends = sorted(run.reach for run in sliced.runs if run.source == "good")
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(ends))
    assert study.slices.documents == "spread"


def test_spread_slices_that_do_not_fit_are_refused_with_a_size_that_does(tmp_path: Path) -> None:
    slices = study_content(tmp_path)["slices"] | {"documents": "spread"}
    only = {"good": study_content(tmp_path)["sources"]["good"]}  # each source has a size of its own
    one = study_content(tmp_path)["training"] | {"micro_batch_size": 1, "global_batch_size": 1}
    write_sources(tmp_path)
    with pytest.raises(StudyError, match=r"lower slices\.tokens to at most [0-9,]+") as refused:
        write_slices(tiny_study(tmp_path, sources=only, training=one, slices=slices | {"tokens": 4096}))
    most = int(str(refused.value).split("at most ")[1].split(", name")[0].replace(",", ""))
    write_slices(tiny_study(tmp_path, sources=only, training=one, slices=slices | {"tokens": most}))
    with pytest.raises(StudyError):
        write_slices(tiny_study(tmp_path, sources=only, training=one, slices=slices | {"tokens": most + 32}))
