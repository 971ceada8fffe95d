"""Two sources over the same shards: what one of them holds out, no phase shows through the other either."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan
from megatron_kaiyuan.errors import PlanError, ResumeError, ShardError
from megatron_kaiyuan.reporting.plan_table import print_plan
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_manifest, write_source

DOCUMENTS = 100


@pytest.fixture
def shards(tmp_path):
    """100 documents of 5 tokens in three shards, with two scores."""
    write_source(tmp_path / "web", numbered_documents([5] * DOCUMENTS), range(DOCUMENTS), cuts=(30, 40))
    for number, (first, stop) in enumerate(((0, 30), (30, 40), (40, 100))):
        other = np.random.default_rng(number).random(stop - first).astype(np.float32)
        np.save(tmp_path / "web" / f"part-{number:03}.scores.other.npy", other)
    return tmp_path / "web"


def spec_of(first, second, validation, **more):
    """A plan over two sources of the same documents."""
    a, b = ({"shards": first, "score": "score"}, {"shards": second, "score": "other"})
    phases = (
        phase_of("shuffled", {"a": "all"}, "one"),
        phase_of("curriculum", {"a": "top 50%", "b": {"keep": "all", "repeat": 1.5}}, "two"),
        phase_of("shuffled", {"b": "random 70%"}, "three"),
    )
    return plan_of({"a": a, "b": b}, *phases, validation=validation, **more)


def shown(plan):
    """Documents that a plan predicts a token of, by their first token of five."""
    order = CurriculumDataset(plan)
    return {int(token) // 5 for sample in range(len(order)) for token in order[sample]["tokens"]}


def held_out(plan, name):
    return set(plan.opened[name].held_out.tolist())


def test_what_is_held_out_of_one_source_is_not_shown_through_another(shards):
    """20 of 20 were trained on."""
    alone = Plan.from_spec(plan_of({"a": {"shards": str(shards)}}, phase_of("shuffled", {"a": "all"})))
    assert shown(alone) == set(range(DOCUMENTS))
    plan = Plan.from_spec(spec_of(str(shards), str(shards), {"a": {"documents": 20}}))
    assert len(held_out(plan, "a")) == 20
    assert held_out(plan, "b") == set()
    assert shown(plan) == set(range(DOCUMENTS)) - held_out(plan, "a")
    assert plan.phases[1].streams["b"].selected.num_documents == 80


def test_both_may_hold_out_and_each_evaluates_its_own(shards):
    both = Plan.from_spec(spec_of(str(shards), str(shards), {"a": {"documents": 20}, "b": {"documents": 10}}))
    single = Plan.from_spec(spec_of(str(shards), str(shards), {"b": {"documents": 10}}))
    assert not shown(both) & (held_out(both, "a") | held_out(both, "b"))
    assert held_out(both, "b") == held_out(single, "b")
    seen = {int(token) // 5 for window in range(len(HeldOutDataset(both, "b"))) for token in window_of(both, window)}
    assert seen == held_out(both, "b")


def window_of(plan, window):
    return HeldOutDataset(plan, "b")[window]["tokens"]


@pytest.mark.parametrize("way", ["a glob", "one shard of three", "another order", "a link to the folder"])
def test_shards_are_the_same_however_they_are_named(shards, way):
    link = shards.parent / "link"
    link.symlink_to(shards)
    second, documents = {
        "a glob": (f"{shards}/part-*", range(100)),
        "one shard of three": (f"{shards}/part-002", range(40, 100)),
        "another order": ([f"{shards}/part-002", f"{shards}/part-000"], [*range(40, 100), *range(30)]),
        "a link to the folder": (str(link), range(100)),
    }[way]
    plan = Plan.from_spec(spec_of(str(shards), second, {"a": {"documents": 20}}))
    expected = [at for at, document in enumerate(documents) if document in held_out(plan, "a")]
    assert plan.opened["b"].held_out_elsewhere.tolist() == expected
    assert len(expected) > 5
    assert not shown(plan) & held_out(plan, "a")


@pytest.mark.parametrize("way", ["hard links", "copies with manifests", "a hard link to a shard with a manifest"])
def test_shards_are_the_same_whatever_file_leads_there(shards, way):
    """Documents held out of a source must not come back through the same bytes under another name."""
    other = shards.parent / "other"
    other.mkdir()
    if way != "hard links":
        for index in shards.glob("*.idx"):
            sums = {end: hashlib.sha256(index.with_suffix(f".{end}").read_bytes()) for end in ("bin", "idx")}
            files = {end: {"name": "", "bytes": 0, "sha256": told.hexdigest()} for end, told in sums.items()}
            write_manifest(index.with_suffix(""), files=files)
    for path in shards.iterdir():
        if "copies" in way:
            shutil.copy(path, other)
        elif "manifest" not in path.name:
            (other / path.name).hardlink_to(path)
    plan = Plan.from_spec(spec_of(str(shards), str(other), {"a": {"documents": 20}}))
    assert set(plan.opened["b"].held_out_elsewhere.tolist()) == held_out(plan, "a")
    assert not shown(plan) & held_out(plan, "a")


def test_a_hard_link_beside_its_shard_is_the_shard_named_twice(shards):
    for end in (".bin", ".idx", ".scores.score.npy"):
        (shards / f"again{end}").hardlink_to(shards / f"part-000{end}")
    with pytest.raises(ShardError, match="named twice"):
        Plan.from_spec(plan_of({"a": {"shards": str(shards)}}, phase_of("shuffled", {"a": "all"})))


@settings(deadline=None, max_examples=25)
@given(
    names=st.lists(
        st.lists(st.sampled_from([0, 2, 3, 4]), min_size=1, max_size=4, unique=True), min_size=2, max_size=3
    ),
    counts=st.lists(st.integers(0, 2), min_size=3, max_size=3),
)
def test_any_overlap_of_any_number_of_sources_agrees_with_brute_force(names, counts):
    with tempfile.TemporaryDirectory() as folder:
        write_source(Path(folder) / "s", numbered_documents([5] * 40), cuts=(7, 8, 20, 33))
        edges = [0, 7, 8, 20, 33, 40]
        sources, stored, validation = {}, {}, {}
        for number, some in enumerate(names):
            name = f"s{number}"
            sources[name] = {"shards": [f"{folder}/s/part-{shard:03}" for shard in some]}
            stored[name] = [document for shard in some for document in range(edges[shard], edges[shard + 1])]
            if counts[number]:
                validation[name] = {"documents": counts[number]}
        phase = phase_of("shuffled", dict.fromkeys(sources, "all"))
        plan = Plan.from_spec(plan_of(sources, phase, seq_length=1, validation=validation))
        out = {stored[name][at] for name in validation for at in plan.opened[name].held_out.tolist()}
        assert shown(plan) == {document for some in stored.values() for document in some} - out


def test_a_source_that_others_hold_out_whole_is_refused(shards):
    write_source(shards.parent / "tail", numbered_documents([5] * 3), range(3))
    tail = str(shards.parent / "tail")
    sources = {"a": {"shards": [tail, str(shards)]}, "b": {"shards": tail}}
    phase = phase_of("shuffled", {"a": "all", "b": "all"})
    with pytest.raises(PlanError, match=r"sources\.b: other sources name the same shards and hold out 3 of its doc"):
        Plan.from_spec(plan_of(sources, phase, seq_length=1, validation={"a": {"documents": 102}}))


def test_without_held_out_documents_or_shared_shards_the_order_is_what_it_was(shards):
    """Fingerprints taken before sources were compared, when plans had no version."""
    shared = Plan.from_spec(spec_of(str(shards), str(shards), {}) | {"version": 1})
    assert shared.fingerprint == "8e2df71db3f97522"
    apart = spec_of(f"{shards}/part-002", [f"{shards}/part-000", f"{shards}/part-001"], {"a": {"documents": 9}})
    assert Plan.from_spec(apart | {"version": 1}).fingerprint == "41b18015ae6f2afe"


def test_a_resume_is_refused_where_another_source_holds_out_other_documents(shards):
    """The names of sources that no phase shows are in no record, but what they hold out decides the order."""

    def plan_with(name):
        sources = {name: {"shards": str(shards)}, "b": {"shards": str(shards)}}
        return Plan.from_spec(
            plan_of(sources, phase_of("shuffled", {"b": "all"}), validation={name: {"documents": 20}})
        )

    record = json.loads(json.dumps(plan_with("a").order_record()))
    plan_with("a").check_resume(record, 10)
    with pytest.raises(ResumeError, match=r"sources\.b\.held_out_elsewhere was"):
        plan_with("c").check_resume(record, 10)
    before = plan_of({"b": {"shards": str(shards)}}, phase_of("shuffled", {"b": "all"}))
    with pytest.raises(ResumeError, match=r"sources\.b\.documents was 80 and is now 100"):
        Plan.from_spec(before).check_resume(record, 10)
    with pytest.raises(ResumeError, match=r"sources\.b\.documents was 100 and is now 80"):
        plan_with("a").check_resume(Plan.from_spec(before).order_record(), 10)


def test_the_dry_run_tells_what_is_left_out_and_a_simulated_plan_counts_the_same(shards, capsys):
    spec = spec_of(str(shards), str(shards), {"a": {"documents": 20}})
    for name in ("a", "b"):
        spec["sources"][name]["expected"] = {"documents": DOCUMENTS, "tokens": 5 * DOCUMENTS}
    for simulate in (False, True):
        plan = Plan.from_spec(spec, simulate=simulate)
        told = plan.describe()
        print_plan(told)
        assert "b: 20 more documents are left out, held out of another source with" in capsys.readouterr().out
        assert told["sources"]["b"]["held_out_documents"] == 0
        assert told["phases"][1]["sources"]["b"]["documents"] == 80
