"""Selections by score, by amount, in lists, with exceptions and denied documents, against sorted Python lists."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan
from megatron_kaiyuan.errors import PlanError, ResumeError
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

SETTINGS = settings(deadline=None, max_examples=60)
LENGTHS = [1 + number * 5 % 7 for number in range(60)]
SCORES = [(number * number + number // 3) % 8 / 10 for number in range(60)]  # 0.1 is no float32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("s") / "s", numbered_documents(LENGTHS), SCORES, cuts=(20, 45))


def kept(source, part, held_out=0, **more):
    """Numbers of the documents that a phase keeps, as shown by its samples, and those that are held out."""
    more |= {"validation": {"s": {"documents": held_out}}} if held_out else {}
    plan = Plan.from_spec(plan_of({"s": source}, phase_of("curriculum", {"s": part}), seq_length=1, **more))
    order = CurriculumDataset(plan)
    owner = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    shown = {owner[token] for sample in range(len(order)) for token in order[sample]["tokens"].tolist()}
    return sorted(shown), set(plan.opened["s"].held_out.tolist()), plan


@SETTINGS
@given(limit=st.integers(-1, 8), sign=st.sampled_from([">=", ">", "<=", "<"]), held_out=st.sampled_from([0, 9]))
def test_a_threshold_keeps_the_documents_that_python_keeps(source, limit, sign, held_out):
    compare = {">=": lambda a, b: a >= b, ">": lambda a, b: a > b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b}
    expected = {n for n, score in enumerate(SCORES) if compare[sign](round(10 * score), limit)}
    if len(expected) < 12:  # perhaps none that is not held out
        return
    found, out, _ = kept(source, f"score {sign} {limit / 10}", held_out)
    assert set(found) == expected - out, "held-out documents move no border"


def test_a_range_of_scores_is_both_thresholds(source):
    assert kept(source, "0.2 <= score < 0.5")[0] == [n for n, s in enumerate(SCORES) if 0.2 <= s < 0.5]
    assert kept(source, "0.2 < score <= 0.5")[0] == [n for n, s in enumerate(SCORES) if 0.2 < s <= 0.5]


@SETTINGS
@given(kind=st.sampled_from(["top", "bottom"]), amount=st.integers(2, 60), held_out=st.sampled_from([0, 9]))
def test_an_amount_of_documents_is_exact(source, kind, amount, held_out):
    if amount > 60 - held_out:
        with pytest.raises(PlanError, match=f"keep {kind} {amount} documents, and there are 51 documents to train on"):
            kept(source, f"{kind} {amount} documents", held_out)
        return
    found, out, _ = kept(source, f"{kind} {amount} documents", held_out)
    assert len(found) == amount
    rest = [SCORES[n] for n in set(range(60)) - set(found) - out]
    mine = [SCORES[n] for n in found]
    assert not rest or (min(mine) >= max(rest) if kind == "top" else max(mine) <= min(rest))


@SETTINGS
@given(kind=st.sampled_from(["top", "bottom", "random"]), amount=st.integers(8, sum(LENGTHS)))
def test_an_amount_of_tokens_is_met_to_half_a_document(source, kind, amount):
    found, _, plan = kept(source, f"{kind} {amount} tokens")
    assert abs(sum(LENGTHS[n] for n in found) - amount) <= max(LENGTHS) / 2
    assert plan.describe()["phases"][0]["sources"]["s"]["keep"] == f"{kind} {amount} tokens"


def test_an_amount_of_random_documents_is_exact(source):
    assert len(kept(source, "random 17 documents")[0]) == 17


quality = st.sampled_from(
    ["top 10%", "bottom 20%", "band [30%, 60%)", "score >= 0.5", "top 12 documents", "score < 0.1"]
)


@SETTINGS
@given(several=st.lists(quality, min_size=1, max_size=4), but=st.none() | st.lists(quality, min_size=1, max_size=2))
def test_a_list_is_the_union_of_its_parts_less_the_exceptions(source, several, but):
    expected = set().union(*(kept(source, one)[0] for one in several))
    expected -= set().union(*(kept(source, one)[0] for one in but)) if but else set()
    part = {"keep": several} | ({"except": but} if but else {})
    if sum(LENGTHS[n] for n in expected) < 2:
        with pytest.raises(PlanError, match="one window needs"):
            kept(source, part)
        return
    found, _, plan = kept(source, part)
    assert found == sorted(expected)
    stored = plan.phases[0].streams["s"].selected
    assert (stored.starts[1:] > stored.stops[:-1]).all()


def test_a_random_part_may_have_an_exception(source):
    found, _, _ = kept(source, {"keep": "random 50%", "except": "top 10%"})
    best = set(kept(source, "top 10%")[0])
    assert not best & set(found)
    assert 24 <= len(found) <= 30


def test_all_but_a_part(source):
    assert len(kept(source, {"except": ["top 1 documents", "bottom 9 documents"]})[0]) == 50


@pytest.mark.parametrize("how", ["numbers", "shards"])
def test_denied_documents_are_shown_by_no_phase_and_by_no_evaluation(source, tmp_path, how):
    denied = sorted({3, 7, 20, 44, 45, 59} | set(kept(source, "all", 9)[1]) - {min(kept(source, "all", 9)[1])})
    pairs = [(0, n) if n < 20 else (1, n - 20) if n < 45 else (2, n - 45) for n in denied]
    lines = [f"part-00{s} {n}" if k % 2 else f"{source['shards']}/part-00{s}\t{n}" for k, (s, n) in enumerate(pairs)]
    path = tmp_path / "deny.txt"
    path.write_text("# requests\n\n" + "\n".join(map(str, denied) if how == "numbers" else lines) + "\n")
    found, out, plan = kept(source | {"deny": str(path)}, "all", 9)
    assert out == {min(kept(source, "all", 9)[1])}, "those that were to be held out are not replaced"
    assert found == sorted(set(range(60)) - set(denied) - out)
    assert set(HeldOutDataset(plan, "s").documents(0).tolist()) <= out
    assert plan.describe()["sources"]["s"]["denied_documents"] == len(denied)
    with pytest.raises(ResumeError, match=r"was \d+ and is now \d+"):
        plan.check_resume(kept(source, "all", 9)[2].order_record(), 1)


def test_what_is_denied_in_one_source_is_denied_in_every_source_of_the_same_shards(source, tmp_path):
    (tmp_path / "deny.txt").write_text("5\n6\n")
    other = {"shards": f"{source['shards']}/part-000"}
    plan = Plan.from_spec(
        plan_of({"s": source | {"deny": str(tmp_path / "deny.txt")}, "t": other}, phase_of("shuffled", {"t": "all"}))
    )
    assert plan.phases[0].streams["t"].selected.num_documents == 18


@pytest.mark.parametrize("line", ["60", "-1", "x", "part-000 20", "part-003 1", "nowhere/part-000 1", "1.5"])
def test_a_line_that_names_no_document_is_refused(source, tmp_path, line):
    (tmp_path / "deny.txt").write_text(f"3\n{line}\n")
    with pytest.raises(
        PlanError, match=r"sources\.s\.deny .*1 line without a document of the source.*line 2"
    ) as caught:
        kept(source | {"deny": str(tmp_path / "deny.txt")}, "all")
    assert "write a number below 60, or a shard and a number below its documents, such as part-000 17" in str(
        caught.value
    )


def test_a_list_of_everything_or_no_file_is_refused(source, tmp_path):
    (tmp_path / "deny.txt").write_text("\n".join(map(str, range(60))))
    with pytest.raises(PlanError, match="denies all 60 documents"):
        kept(source | {"deny": str(tmp_path / "deny.txt")}, "all")
    with pytest.raises(PlanError, match=r"none.txt: cannot be read .*give a text file"):
        kept(source | {"deny": str(tmp_path / "none.txt")}, "all")


def test_scores_and_denials_need_real_documents():
    simulated = {"shards": "none", "score": "score", "expected": {"documents": 100, "tokens": 1000}}
    spec = plan_of({"s": simulated}, phase_of("shuffled", {"s": "score > 3"}))
    with pytest.raises(PlanError, match="has ranks and no scores to compare; plan with top 30% until"):
        Plan.from_spec(spec, simulate=True)
    spec = plan_of({"s": simulated | {"deny": "x"}}, phase_of("shuffled", {"s": "all"}))
    with pytest.raises(PlanError, match=r"sources\.s\.deny: --simulate has no documents to deny"):
        Plan.from_spec(spec, simulate=True)


def test_thresholds_compare_in_the_type_of_the_stored_scores():
    """0.1 as a float32 is above 0.1: as numbers of one type they are equal."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_source(Path(folder) / "s", numbered_documents([2] * 60), np.float32([0.1] * 30 + [0.2] * 30))
        plan = Plan.from_spec(plan_of({"s": source}, phase_of("curriculum", {"s": "score <= 0.1"}), seq_length=1))
        assert plan.phases[0].streams["s"].selected.num_documents == 30
