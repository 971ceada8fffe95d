"""Amending a plan: earlier samples stay, resumes that would differ are refused, fingerprints follow the order."""

import copy
import json
import re

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan, open_source
from megatron_kaiyuan.documents.rank_index import build_rank_index, index_path, save_rank_index
from megatron_kaiyuan.errors import ResumeError
from tests.unit_tests.data.tiny import all_samples, numbered_documents, phase_of, plan_of, write_source


@pytest.fixture
def spec(tmp_path):
    """A shuffled, a curriculum and again a shuffled phase over a scored and a plain source; 40 samples each."""
    sources = {
        "web": write_source(tmp_path / "web", numbered_documents([4] * 40), [n % 5 for n in range(40)]),
        "code": write_source(tmp_path / "code", numbered_documents([4] * 40, 1000), [n % 7 for n in range(40)]),
        "spare": write_source(tmp_path / "spare", numbered_documents([4] * 40, 2000), range(40)),
    }
    both = {"web": {"keep": "all", "max_repeat": 9}, "code": {"keep": "all", "max_repeat": 9}}
    return plan_of(
        sources,
        phase_of("shuffled", both, "warm", tokens=160),
        phase_of("curriculum", both, "ramp", tokens=160),
        phase_of("shuffled", both, "tail", tokens=160),
        validation={"spare": {"documents": 3}},
    )


def changed(spec, **by_path):
    """A deep copy with `phases__0__tokens=...` style changes; None removes."""
    copied = copy.deepcopy(spec)
    for path, value in by_path.items():
        *where, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        place = copied
        for part in where:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return copied


LATER = {
    "longer last phase": {"phases__2__tokens": 320},
    "last phase stretched into more passes": {"phases__2__tokens": 1600},
    "shorter last phase": {"phases__2__tokens": 80},
    "other mix in a later phase": {"phases__2__sources": {"spare": "top 50%"}, "phases__2__tokens": None},
    "later phase in another order": {"phases__2__order": "curriculum"},
    "no later phases": {"phases__2": None},
}


@pytest.mark.parametrize("amendment", LATER)
def test_a_change_of_later_phases_leaves_every_earlier_sample_as_it_was(spec, amendment):
    later = changed(spec, **LATER[amendment])
    assert all_samples(later)[:80] == all_samples(spec)[:80]


def test_a_further_phase_leaves_every_earlier_sample_as_it_was(spec):
    longer = copy.deepcopy(spec)
    longer["phases"].append(phase_of("curriculum", {"spare": "all"}, "anneal"))
    samples = all_samples(spec)
    assert all_samples(longer)[: len(samples)] == samples
    Plan.from_spec(longer).check_resume(Plan.from_spec(spec).order_record(), len(samples))


@pytest.mark.parametrize("tokens", [164, 300, 640, 1280])
def test_a_longer_shuffled_phase_goes_on_where_the_shorter_one_ended(spec, tokens):
    samples = all_samples(spec)
    assert all_samples(changed(spec, phases__2__tokens=tokens))[:120] == samples


def test_a_phase_name_binds_its_random_choices_so_inserting_another_before_does_not_change_them(spec):
    inserted = copy.deepcopy(spec)
    inserted["phases"].insert(0, phase_of("shuffled", {"spare": "all"}, "new"))
    samples = all_samples(spec)
    assert all_samples(inserted)[-len(samples) :] == samples


ALLOWED = {
    "nothing": (120, {}),
    "longer begun shuffled phase": (100, {"phases__2__tokens": 400}),
    "longer shuffled phase after its last sample": (120, {"phases__2__tokens": 400}),
    "longer first phase after its last sample": (40, {"phases__0__tokens": 400}),
    "more passes of a begun shuffled phase": (100, {"phases__2__tokens": 1600}),
    "shorter begun shuffled phase": (100, {"phases__2__tokens": 80}),
    "another curriculum before it begins": (40, {"phases__1__tokens": 80, "phases__1__sources": {"spare": "all"}}),
    "no later phase": (80, {"phases__2": None}),
    "everything before the first step": (0, {"seed": 5, "seq_length": 3, "phases__0__order": "curriculum"}),
    "learning rate": (120, {f"phases__{number}__lr": {"start": 1e-3, "end": 1e-3} for number in range(3)}),
    "averaging": (120, {"averaging": {"last": 3, "every": 10}}),
    "domain": (120, {"sources__web__domain": "english"}),
    "max_repeat": (120, {"phases__0__sources__web__max_repeat": 4}),
    "an unused source": (120, {"sources__spare": None, "validation": {}}),
}


@pytest.mark.parametrize("freedom", ALLOWED)
def test_a_resume_whose_consumed_samples_stay_is_allowed_and_they_do_stay(spec, freedom):
    consumed, change = ALLOWED[freedom]
    amended = changed(spec, **change)
    record = json.loads(json.dumps(Plan.from_spec(spec).order_record()))
    Plan.from_spec(amended).check_resume(record, consumed)
    assert all_samples(amended)[:consumed] == all_samples(spec)[:consumed]


REFUSED = {
    "seq_length": (1, {"seq_length": 2}, "seq_length was 4 and is now 2"),
    "seed": (1, {"seed": 7}, "seed was 1234 and is now 7"),
    "phase name": (1, {"phases__0__name": "hot"}, r"phases\.0 \(warm\)\.name was 'warm' and is now 'hot'"),
    "order": (1, {"phases__0__order": "curriculum"}, r"\.order was 'shuffled' and is now 'curriculum'"),
    "sources": (1, {"phases__0__sources__web": None}, r"\.sources was \['web', 'code'\] and is now \['code'\]"),
    "keep": (1, {"phases__0__sources__web__keep": "top 50%"}, r"phases\.0 \(warm\)\.sources\.web\.\w+ was"),
    "random keep": (1, {"phases__0__sources__web__keep": "random 50%"}, r"sources\.web\.\w+ was"),
    "repeat": (1, {"phases__0__sources__web__repeat": 2}, r"sources\.web\.\w+ was"),
    "weights": (1, {"phases__0__sources__web__weight": 3, "phases__0__sources__code__weight": 1}, r"\.rate was"),
    "held out": (1, {"validation": {"web": {"documents": 3}}}, r"sources\.web\.\w+ was"),
    "score": (41, {"sources__web__score": None}, r"sources\.web\.\w+ was"),
    "sorted": (41, {"phases__1__sources__web__sorted": False}, r"sources\.web\.ascending was True and is now False"),
    "other documents": (1, {"sources__web": "spare"}, r"sources\.web\.content was"),
    "longer begun curriculum": (41, {"phases__1__tokens": 320}, r"phases\.1 \(ramp\)\.samples was 40 and is now 80"),
    "longer ended curriculum": (80, {"phases__1__tokens": 320}, r"phases\.1 \(ramp\)\.samples was 40 and is now 80"),
    "longer earlier shuffled phase": (41, {"phases__0__tokens": 320}, r"phases\.0 \(warm\)\.samples was 40 and is"),
    "shorter than consumed": (100, {"phases__2__tokens": 40}, r"phases\.2 \(tail\)\.samples was 40 and is now 10"),
    "a begun phase removed": (81, {"phases__2": None}, r"phases\.2 \(tail\) was 'present' and is now 'missing'"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_resume_whose_consumed_samples_would_differ_is_refused_with_both_values(spec, change):
    consumed, amendment, message = REFUSED[change]
    amended = changed(spec, **amendment)
    if amended["sources"]["web"] == "spare":
        amended["sources"]["web"] = amended["sources"]["spare"]
    with pytest.raises(ResumeError, match=message) as caught:
        Plan.from_spec(amended).check_resume(Plan.from_spec(spec).order_record(), consumed)
    assert re.search(rf"resume after {consumed:,} samples?: ", str(caught.value))
    assert "--finetune" in str(caught.value)


def test_sources_in_another_order_are_another_order_and_refused(spec):
    """Equal positions are merged by the number of the stream, so the order of the sources counts."""
    swapped = copy.deepcopy(spec)
    swapped["phases"][0]["sources"] = dict(reversed(spec["phases"][0]["sources"].items()))
    assert all_samples(swapped) != all_samples(spec)
    assert Plan.from_spec(swapped).fingerprint != Plan.from_spec(spec).fingerprint
    assert Plan.from_spec(swapped).order_record() != Plan.from_spec(spec).order_record()
    with pytest.raises(ResumeError, match="sources was"):
        Plan.from_spec(swapped).check_resume(Plan.from_spec(spec).order_record(), 1)


def test_ties_ranked_under_another_seed_are_another_order_and_refused(spec):
    before = Plan.from_spec(spec)
    samples, record, fingerprint = all_samples(spec), before.order_record(), before.fingerprint
    source = open_source("web", spec["sources"]["web"]["shards"])
    save_rank_index(build_rank_index(source, "score", seed=9), index_path(source, "score"))
    after = Plan.from_spec(spec)
    assert all_samples(spec) != samples
    assert after.fingerprint != fingerprint
    after.check_resume(record, 40)  # the first phase takes its sources as they are stored
    with pytest.raises(ResumeError, match=r"phases\.1 \(ramp\)\.sources\.web\.ranking was"):
        after.check_resume(record, 41)


def test_documents_that_became_longer_and_shorter_are_noticed_though_none_of_them_is_probed(tmp_path):
    """All counts stay, and so do the 64 documents probed; the tokens stored before them do not."""
    lengths = [5] * 1000
    spec = plan_of({"s": write_source(tmp_path / "a", numbered_documents(lengths))}, phase_of("shuffled", {"s": "all"}))
    lengths[101], lengths[901] = 6, 4
    moved = copy.deepcopy(spec)
    moved["sources"]["s"] = write_source(tmp_path / "b", numbered_documents(lengths))
    before, after = Plan.from_spec(spec), Plan.from_spec(moved)
    probed = np.unique(np.linspace(0, 999, 64).astype(np.int64))
    assert not {101, 901} & set(probed.tolist())
    assert before.num_samples == after.num_samples
    with pytest.raises(ResumeError, match=r"sources\.s\.content was"):
        after.check_resume(before.order_record(), 1)


SAME_ORDER = [name for name, (consumed, _) in ALLOWED.items() if consumed == 120 and "longer" not in name]


@pytest.mark.parametrize("name", SAME_ORDER)
def test_the_fingerprint_stays_when_the_order_stays(spec, name):
    assert Plan.from_spec(changed(spec, **ALLOWED[name][1])).fingerprint == Plan.from_spec(spec).fingerprint


@pytest.mark.parametrize("name", [*LATER, *REFUSED])
def test_the_fingerprint_changes_when_the_order_changes(spec, name):
    change = LATER[name] if name in LATER else REFUSED[name][1]
    amended = changed(spec, **change)
    if amended["sources"]["web"] == "spare":
        amended["sources"]["web"] = amended["sources"]["spare"]
    assert all_samples(amended) != all_samples(spec)
    assert Plan.from_spec(amended).fingerprint != Plan.from_spec(spec).fingerprint


def test_the_fingerprint_is_sixteen_hex_digits(spec):
    assert len(Plan.from_spec(spec).fingerprint) == 16
    int(Plan.from_spec(spec).fingerprint, 16)


def test_a_run_begun_under_version_1_goes_on_under_it_where_the_plan_names_none(spec):
    spec = changed(spec, phases__0__sources__web__keep="random 50%", phases__1__sources__code__repeat=2.5)
    begun, new = (Plan.from_spec(spec | {"version": version}) for version in (1, 2))
    record = json.loads(json.dumps(begun.order_record()))
    plan = Plan.from_spec(spec)
    assert plan.fingerprint == new.fingerprint != begun.fingerprint
    again = plan.as_begun(record)
    again.check_resume(record, 100)
    assert (again.fingerprint, again.spec.order_version) == (begun.fingerprint, 1)
    order = CurriculumDataset(again)
    shown = [tuple(order[sample]["tokens"].tolist()) for sample in range(len(order))]
    assert shown == all_samples(spec | {"version": 1}) != all_samples(spec)
    told = "\n".join(again.otherwise_in_newest())
    assert "phases.0 (warm).sources.web: random 50% is drawn independently" in told
    assert "phases.0 (warm).sources.code: the part of a pass in repeat 2.5 is drawn independently" in told
    assert "phases.1 (ramp).sources.code: copies rise in one ascent" in told
    assert plan.otherwise_in_newest() == []
    assert plan.as_begun(new.order_record()) is plan


@pytest.mark.parametrize("written", [1, 2])
def test_a_written_version_is_never_another_and_one_that_differs_is_refused_with_the_line_to_write(spec, written):
    plans = {version: Plan.from_spec(spec | {"version": version}) for version in (1, 2)}
    record = plans[3 - written].order_record()
    plan = plans[written].as_begun(record)
    assert plan is plans[written]
    with pytest.raises(ResumeError, match=f"under version {3 - written} .* Write version: {3 - written} to go on"):
        plan.check_resume(record, 1)
    plan.check_resume(record, 0)


def test_what_version_1_does_not_have_is_refused_in_a_run_that_it_began(spec):
    record = Plan.from_spec(spec | {"version": 1}).order_record()
    amended = changed(spec, phases__2__sources__web={"keep": "random 50%", "draw": "dev"})
    with pytest.raises(ResumeError, match=r"phases\.2 \(tail\)\.sources\.web\.draw: not in version 1"):
        Plan.from_spec(amended).as_begun(record)
    with pytest.raises(ValueError, match=r"phases\.2 \(tail\)\.sources\.web\.draw: not in version 1"):
        Plan.from_spec(amended | {"version": 1})
