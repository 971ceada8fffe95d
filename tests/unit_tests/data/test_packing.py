"""`packing: whole`: documents stay whole where they fit, by best fit, and nobody learns the padding that is left."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.data.rank_plan import rank_plan_sources
from megatron_kaiyuan.documents import packing
from megatron_kaiyuan.errors import PlanError, RankIndexError, ResumeError
from megatron_kaiyuan.model.samples import SampleOptions
from megatron_kaiyuan.reporting.plan_table import padding_notes
from megatron_kaiyuan.training.provider import PlanSamples
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import (
    all_samples,
    assert_resumes_anywhere,
    numbered_documents,
    phase_of,
    plan_of,
    write_source,
)

ROOM = 7
RANDOM = np.random.default_rng(11)
LENGTHS = [int(length) for length in RANDOM.integers(0, 25, 300)]
DOCUMENTS = numbered_documents(LENGTHS, 1)
SCORES = np.random.default_rng(5).permutation(len(LENGTHS)).tolist()
OF_TOKEN = {token: number for number, document in enumerate(DOCUMENTS) for token in document}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return {"a": write_source(tmp_path_factory.mktemp("a") / "a", DOCUMENTS, SCORES, cuts=(120,))}


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(packing, "_GROUP", 64)


def spec_of(source, order="shuffled", **part):
    return plan_of(source, phase_of(order, {"a": {"packing": "whole"} | part}), seq_length=ROOM - 1)


def sizes_of(windows):
    return sorted(sum(map(len, window)) for window in windows)


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_those_of_best_fit(seed):
    random = np.random.default_rng(seed)
    room = int(random.integers(2, 60))
    lengths = [int(length) for length in random.integers(0, random.integers(2, 3 * room), 200)]
    documents = numbered_documents(lengths)
    got = [[documents[n][start:stop] for n, start, stop in one] for one in packing.pack_group(lengths, room - 1)]
    assert sizes_of(got) == sizes_of(oracle.packed_whole(documents, room, 200))
    middles = [
        np.mean([n for n, start, stop in one for _ in range(start, stop)])
        for one in packing.pack_group(lengths, room - 1)
    ]
    assert middles == sorted(middles)


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
@pytest.mark.parametrize("shuffle", ["windows", "documents"])
def test_each_document_is_whole_where_it_fits_and_predicted_once_a_pass(source, order, shuffle):
    plan = Plan.from_spec(spec_of(source, order, shuffle=shuffle, repeat=2))
    dataset = CurriculumDataset(plan)
    targets, pieces_of, per_window = Counter(), Counter(), []
    for sample in range(len(dataset)):
        padding, tokens = dataset.padding(sample), dataset[sample]["tokens"].tolist()
        real = tokens[: ROOM - padding]
        assert all(real) and tokens[ROOM - padding :] == [0] * padding  # noqa: PT018
        targets.update(real[1:])
        pieces_of.update({OF_TOKEN[token] for token in real})
        per_window.append(real)
        assert dataset.band_tokens(sample).sum() == len(real) - 1
        told = [
            DOCUMENTS[plan.opened["a"].source.number(s)][s.start : s.stop] for s in dataset.provenance(sample).segments
        ]
        assert [token for piece in told for token in piece] == real
    for number, document in enumerate(DOCUMENTS):
        if document:
            wanted = 1 if len(document) <= ROOM else -(-(len(document) - 1) // (ROOM - 1))
            assert pieces_of[number] == 2 * wanted
    firsts = Counter(window[0] for window in per_window)
    for document in DOCUMENTS:
        for place, token in enumerate(document):
            shown = 4 if place and place % (ROOM - 1) == 0 and place + 1 < len(document) else 2  # where it is cut
            assert targets[token] + firsts[token] == shown, "a token is predicted, or begins its window"
            assert place == 0 or targets[token] >= 2


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_the_fill_is_that_of_best_fit_and_the_dry_run_tells_its_padding(source, order):
    plan = Plan.from_spec(spec_of(source, order))
    ranked = [DOCUMENTS[n] for n in np.argsort(SCORES)] if order == "curriculum" else DOCUMENTS
    by_hand = oracle.packed_whole(ranked, ROOM, 16 if order == "curriculum" else 64)
    dataset = CurriculumDataset(plan)
    got = sorted(ROOM - dataset.padding(sample) for sample in range(len(dataset)))
    assert got == sizes_of(by_hand)
    told = plan.describe()
    row = told["phases"][0]["sources"]["a"]
    share = 1 - sum(size - 1 for size in got) / (len(got) * (ROOM - 1))
    assert row["padding"] == pytest.approx(share)
    assert f"{share:.2%} of what is shown of a is padding" in padding_notes(told)[0]
    assert row["documents"] == 300
    assert row["shown"] == [{"times": 1, "tokens": len(got) * (ROOM - 1)}]


def test_padding_is_not_learned(source):
    samples = PlanSamples(CurriculumDataset(Plan.from_spec(spec_of(source))), SampleOptions())
    seen = set()
    for number in range(60):
        padding = samples.order.padding(number)
        seen.add(padding > 0)
        mask, labels = samples[number]["loss_mask"].tolist(), samples[number]["labels"].tolist()
        assert mask == [1.0] * (ROOM - 1 - padding) + [0.0] * padding
        assert all(label for label, counts in zip(labels, mask, strict=True) if counts)
    assert seen == {True, False}


def test_a_curriculum_ascends_group_by_group(source):
    plan = Plan.from_spec(spec_of(source, "curriculum", keep="top 50%"))
    stream = plan.phases[0].streams["a"]
    groups = [
        {(position - 150) // 16 for one in stream.pieces(w) for position in one.positions}
        for w in range(len(CurriculumDataset(plan)))
    ]
    assert all(len(group) == 1 for group in groups)
    numbers = [next(iter(group)) for group in groups]
    assert numbers == sorted(numbers) and numbers[-1] == 149 // 16  # noqa: PT018


def test_repeated_windows_of_a_curriculum_rise_band_by_band(source):
    plan = Plan.from_spec(spec_of(source, "curriculum", repeat=3, repeat_spacing="25%"))
    once = Plan.from_spec(spec_of(source, "curriculum")).num_samples
    stream = plan.phases[0].streams["a"]
    shown = [stream.selected.order.locate(stream._packed_token(window)) for window in range(stream.num_windows)]
    edges = [once * band // 4 for band in range(5)]
    assert shown == [w for low, high in pairwise(edges) for _ in range(3) for w in range(low, high)]


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
@pytest.mark.parametrize(
    "part", [{"repeat": 2.5}, {"keep": "random 10%"}, {"shuffle": "documents", "keep": "top 40 documents"}]
)
def test_it_resumes_at_any_sample_however_it_was_read(source, order, part):
    spec = spec_of(source, order, **{"keep": "top 30 documents"} | part)
    assert_resumes_anywhere(spec)
    dataset = CurriculumDataset(Plan.from_spec(spec))
    backwards = [tuple(dataset[s]["tokens"].tolist()) for s in reversed(range(len(dataset)))]
    assert backwards[::-1] == all_samples(spec)


def test_budgets_count_windows(source):
    once = Plan.from_spec(spec_of(source)).num_samples
    for order in ("shuffled", "curriculum"):
        less = spec_of(source, order)
        less["phases"][0]["tokens"] = (once // 2) * (ROOM - 1)
        shown = all_samples(less)
        assert len(set(shown)) == len(shown) == once // 2
        more = spec_of(source, order, max_repeat=3)
        more["phases"][0]["tokens"] = (2 * once + 50) * (ROOM - 1)
        windows = Plan.from_spec(spec_of(source, order)).num_samples
        more["phases"][0]["tokens"] = (2 * windows + 50) * (ROOM - 1)
        times = Counter(Counter(all_samples(more)).values())
        assert times == {2: windows - 50, 3: 50}
        with pytest.raises(PlanError, match="max_repeat"):
            Plan.from_spec(more | {"phases": [more["phases"][0] | {"tokens": (4 * windows) * (ROOM - 1)}]})


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_what_is_unseen_goes_on_with_the_same_windows(source, order):
    first = phase_of(order, {"a": {"packing": "whole"}}, "p", tokens=600)
    second = phase_of(order, {"a": {"from": "unseen"}}, "q")
    cut = all_samples(plan_of(source, first, second, seq_length=ROOM - 1))
    del first["tokens"]
    whole = all_samples(plan_of(source, first, seq_length=ROOM - 1))
    assert Counter(cut) == Counter(whole)
    second["sources"]["a"]["packing"] = "flowing"
    with pytest.raises(PlanError, match=r"packed the source with packing: whole.*leave out packing"):
        all_samples(plan_of(source, first | {"tokens": 600}, second, seq_length=ROOM - 1))


@pytest.mark.parametrize("part", [{"packing": "whole"}, {"shuffle": "documents"}])
def test_a_curriculum_that_has_begun_gets_another_length_and_held_out_documents_stay_out(source, part):
    base = plan_of(source, phase_of("curriculum", {"a": part}, tokens=600), seq_length=ROOM - 1)
    base["validation"] = {"a": {"documents": 20}}
    longer = base | {"phases": [base["phases"][0] | {"amended": [{"at": 40, "tokens": 900}]}]}
    before, after = all_samples(base), all_samples(longer)
    assert (len(before), len(after)) == (100, 150)
    assert (after[:40], after[-1]) == (before[:40], before[-1])
    assert len(set(after)) == 150
    plan = Plan.from_spec(longer)
    plan.check_resume(Plan.from_spec(base).order_record(), 40)
    held_out = {token for number in plan.opened["a"].held_out for token in DOCUMENTS[number]}
    assert held_out.isdisjoint(token for sample in after for token in sample)


def test_a_run_does_not_go_on_with_another_packing(source):
    plans = [Plan.from_spec(spec_of(source, packing=packed)) for packed in ("whole", "flowing")]
    for one, other in (plans, plans[::-1]):
        with pytest.raises(ResumeError, match=r"sources\.a\.packing"):
            one.check_resume(other.order_record(), 5)
    longer = spec_of(source, max_repeat=2)
    longer["phases"][0]["tokens"] = (plans[0].num_samples + 50) * (ROOM - 1)
    Plan.from_spec(longer).check_resume(plans[0].order_record(), plans[0].num_samples)
    assert all_samples(longer)[: plans[0].num_samples] == all_samples(spec_of(source))
    with pytest.raises(PlanError, match="packing: not in version 1"):
        Plan.from_spec(spec_of(source) | {"version": 1})


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_sums_of_a_large_source_are_stored_by_the_tool(tmp_path, order, monkeypatch):
    source = {"a": write_source(tmp_path / "a", DOCUMENTS, SCORES, cuts=(120,))}
    spec = spec_of(source, order)
    in_memory = all_samples(spec)
    monkeypatch.setattr(packing, "_SMALL_SET", 10)
    with pytest.raises(RankIndexError, match=r"rank_data.py --plan PLAN"):
        Plan.from_spec(spec)
    (tmp_path / "plan.yaml").write_text(str(spec))

    def built():
        return [one for one in rank_plan_sources(tmp_path / "plan.yaml") if one.path.suffix == ".packing"]

    (found,) = built()
    assert found.built and not built()[0].built  # noqa: PT018
    assert found.path.stat().st_size - 4096 <= 8 * 300
    assert all_samples(spec) == in_memory
    content = found.path.read_bytes()
    found.path.write_bytes(content[:-8])
    with pytest.raises(RankIndexError, match="damaged"):
        Plan.from_spec(spec)
    wrong = bytearray(content)
    wrong[4096 + 8] ^= 1
    found.path.write_bytes(wrong)
    with pytest.raises(RankIndexError, match="pack otherwise"):
        all_samples(spec)


def test_a_simulated_source_is_estimated():
    sources = {"a": {"shards": "none", "score": "s", "expected": {"documents": "200k", "tokens": "160M"}}}
    for order in ("shuffled", "curriculum"):
        plan = Plan.from_spec(
            plan_of(sources, phase_of(order, {"a": {"packing": "whole"}}), seq_length=4096), simulate=True
        )
        row = plan.describe()["phases"][0]["sources"]["a"]
        assert 0 < row["padding"] < 0.05
        assert row["tokens"] * (1 - row["padding"]) == pytest.approx(160e6, rel=0.02)


def test_an_empty_selection_is_refused_by_name_in_a_simulation_too(source):
    simulated = {"a": {"shards": "none", "score": "s", "expected": {"documents": "1k", "tokens": "1M"}}}
    for sources, simulate in ((source, False), (simulated, True)):
        for shuffle in ("windows", "documents"):
            spec = spec_of(sources, "curriculum", keep="top 0.01%", shuffle=shuffle)
            with pytest.raises(PlanError, match="leaves 0 documents"):
                Plan.from_spec(spec, simulate=simulate)


def test_a_run_does_not_go_on_with_other_bands_of_shuffled_documents(tmp_path):
    source = {"a": write_source(tmp_path / "a", numbered_documents([5] * 200), list(range(200)))}
    specs = [spec_of(source, "curriculum", shuffle="documents", repeat_spacing=share) for share in ("5%", "50%")]
    one, other = map(Plan.from_spec, specs)
    assert one.num_samples == other.num_samples
    assert all_samples(specs[0]) != all_samples(specs[1])
    assert one.fingerprint != other.fingerprint
    with pytest.raises(ResumeError, match=r"sources\.a\.shuffle"):
        other.check_resume(one.order_record(), 50)


def test_bands_of_an_amended_curriculum_count_no_padding(tmp_path):
    source = {"a": write_source(tmp_path / "a", numbered_documents([4] * 200), list(range(200)))}
    base = phase_of("curriculum", {"a": {"packing": "whole"}}, tokens=100 * (ROOM - 1))
    longer = base | {"amended": [{"at": 40, "tokens": 150 * (ROOM - 1)}]}
    told = Plan.from_spec(plan_of(source, longer, seq_length=ROOM - 1)).describe()["sources"]["a"]
    assert told["tokens_seen"] == 150 * 3
    assert sum(sum(band["seen"].values()) for band in told["bands"]) == pytest.approx(150 * 3, abs=len(told["bands"]))


@pytest.mark.parametrize("field", [{"repeat_spacing": "50%"}, {"repeat_order": "passes"}])
def test_what_is_unseen_has_no_bands_of_its_own(source, field):
    first = phase_of("curriculum", {"a": {"shuffle": "documents"}}, "p", tokens=600)
    second = phase_of("curriculum", {"a": {"from": "unseen"} | field}, "q")
    with pytest.raises(PlanError, match=rf"{next(iter(field))}: .*from: unseen.*leave it out"):
        Plan.from_spec(plan_of(source, first, second, seq_length=ROOM - 1))
