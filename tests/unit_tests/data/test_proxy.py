"""A proxy plan: a share of each source and of each amount, in which each band is seen as often as in the whole plan."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_kaiyuan.commands import plan as command
from megatron_kaiyuan.commands.proxy import proxy_plan, write_proxy
from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.documents.even_sample import every_nth
from megatron_kaiyuan.errors import PlanError, ResumeError
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source
from tests.unit_tests.documents.test_draws import whole
from tests.unit_tests.documents.test_runs import members


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxy")
    sources = {
        "web": write_source(folder / "web", numbered_documents([1] * 1600), np.random.default_rng(2).permutation(1600)),
        "code": write_source(folder / "code", numbered_documents([1] * 800, 10_000)),
    }
    phases = [
        phase_of("shuffled", {"web": "all", "code": None}, "broad", tokens=1120),
        phase_of("curriculum", {"web": {"keep": "top 30%", "repeat": 2}, "code": {"keep": "all"}}, "ramp"),
        phase_of("curriculum", {"web": "top 160 documents"}, "best"),
    ]
    return plan_of(sources, *phases, seq_length=1, version=2, averaging={"every": 32, "duration": 64})


def test_each_band_is_seen_as_often_as_in_the_whole_plan_to_one_document(content):
    small = Plan.from_spec(proxy_plan(content, Fraction(1, 16)))
    large = Plan.from_spec(content)
    for name in ("web", "code"):
        one, other = (plan.describe()["sources"][name] for plan in (large, small))
        assert one["epochs"] == pytest.approx(other["epochs"], abs=3 / 50)  # a window of each of three streams
        for big, little in zip(one["bands"], other["bands"], strict=True):
            assert little["tokens"] == 10
            assert abs(big["epochs"] - little["epochs"]) * little["tokens"] <= 1 + 1e-9
    assert small.num_samples == pytest.approx(large.num_samples / 16, abs=4)
    assert (small.averaging.last, small.averaging.every) == (3, 2)


def test_the_documents_of_all_phases_are_the_same_share(content):
    plan = Plan.from_spec(proxy_plan(content, Fraction(1, 16)))
    order = CurriculumDataset(plan)
    shown = {token for s in range(len(order)) for token in order[s]["tokens"].tolist() if token < 10_000}
    thinned = plan.opened["web"].trainable(ranked=True)
    ranks = plan.opened["web"].ranked_order.positions_of(np.array(sorted(shown)))
    assert thinned.num_documents == 100
    assert set(ranks.tolist()) <= set(members(thinned))
    assert max(ranks) == 1599, "the best one stays"


@given(total=st.integers(1, 400), data=st.data())
def test_every_nth_document_is_even_in_every_range(total, data):
    count = data.draw(st.integers(1, total))
    chosen = np.array(members(every_nth(whole(total), count)))
    assert len(chosen) == count
    assert chosen[-1] == total - 1
    below = np.searchsorted(chosen, np.arange(total + 1)) - np.arange(total + 1) * count / total
    assert below.min() > -1 - 1e-9
    assert below.max() < 1


@pytest.mark.parametrize("total", [2**17 + 1, 10**6 + 7, 10**8 + 3])
@pytest.mark.parametrize("share", [16, 3])
def test_every_nth_of_very_many_documents_is_exact_in_blocks(total, share):
    chosen = every_nth(whole(total), total // share)
    assert chosen.num_documents == total // share
    assert chosen.stops[-1] == total


def test_the_command_writes_a_plan_that_reads_back(content, tmp_path, monkeypatch):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setattr(
        sys, "argv", ["plan_data.py", f"{tmp_path}/plan.yaml", "--proxy", "1/16", "--output", f"{tmp_path}/small.yaml"]
    )
    command.main()
    small = yaml.safe_load((tmp_path / "small.yaml").read_text())
    assert small["sources"]["web"]["thin"] == "1/16"
    assert (small["phases"][0]["tokens"], small["phases"][2]["sources"]["web"]) == (70, "top 10 documents")
    assert (
        Plan.load(tmp_path / "small.yaml").fingerprint
        == Plan.from_spec(proxy_plan(content, Fraction(1, 16))).fingerprint
    )
    for share, message in (("2", "not between 0% and 100%"), ("1", "a proxy has a part"), ("x", "not a fraction")):
        with pytest.raises(PlanError, match=message):
            write_proxy(tmp_path / "plan.yaml", share, tmp_path / "no.yaml")
    with pytest.raises(PlanError, match="a plan of version 2 without amendments"):
        proxy_plan(content | {"version": 1}, Fraction(1, 2))


def test_a_source_thinned_in_mid_run_is_refused_and_another_order(content):
    whole_plan, half = (Plan.from_spec(content), Plan.from_spec(proxy_plan(content, Fraction(1, 2))))
    with pytest.raises(ResumeError, match=r"phases\.0 \(broad\)"):
        half.check_resume(whole_plan.order_record(), 1)
    assert half.order_record()["phases"][0]["sources"]["web"]["thin"] == "1/2"
