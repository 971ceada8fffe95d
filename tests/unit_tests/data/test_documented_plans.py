"""The plans of docs/plan.md are read from there, and the numbers that stand beside them are those of the dry run."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.retention import repetition_notes
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.reporting.plan_table import fill_notes, format_tokens, times_shown

TEXT = (Path(__file__).parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)]
EXAMPLE = BLOCKS[0]


def told_of(content):
    return Plan.from_spec(content, simulate=True).describe()


def with_phases(phases, **more):
    """The sources of the worked example with other phases."""
    return EXAMPLE | {"validation": {}, "phases": phases} | more


def documented(text):
    """Whether this stands in the document, wherever its lines break."""
    return re.search(r"\s+".join(map(re.escape, text.split())), TEXT) is not None


def test_the_worked_example_shows_what_the_document_says():
    told = told_of(EXAMPLE)
    for phase, row in zip(told["phases"], ("1,199,663 1.2B 2,399.3", "590,000 590M 1,180.0"), strict=True):
        steps = f"{phase['samples'] / 500:,.1f}"
        assert f"{phase['samples']:,} {format_tokens(phase['tokens'])} {steps}" == row
        assert documented(f"{phase['name']} {phase['order']} {row}")
    for name, row in told["phases"][1]["sources"].items():
        columns = (
            f"{row['documents']:,} {format_tokens(row['unique_tokens'])} x{row['repeat']:g} "
            f"{format_tokens(row['tokens'])} {row['epochs']:.2f} {row['share']:.1%} {times_shown(row)}"
        )
        assert documented(f"{name} {row['keep']} {row['order']} {columns}"), columns
    epochs = [f"{band['epochs']:.2f}" for band in told["sources"]["web"]["bands"]]
    assert epochs == ["1.00"] * 7 + ["2.48", "2.48", "2.47"]


def test_the_refused_budget_is_refused_in_the_words_of_the_document():
    too_large = with_phases([EXAMPLE["phases"][0], EXAMPLE["phases"][1] | {"tokens": "700M"}])
    with pytest.raises(PlanError) as caught:
        told_of(too_large | {"validation": EXAMPLE["validation"]})
    assert documented(f"error: {caught.value}")


def test_a_named_draw_is_what_its_example_says():
    phases = next(block["phases"] for block in BLOCKS if "phases" in block and block["phases"][0]["name"] == "explore")
    plan = Plan.from_spec(with_phases(phases), simulate=True)
    explore, confirm, main = (phase.streams["web"].selected for phase in plan.phases)
    assert (explore.num_documents, main.num_documents) == (200_000, 800_000)
    assert explore.common_with(confirm).num_documents == 200_000
    assert explore.common_with(main).num_documents == 0
    for phase in phases[:2]:
        phase["sources"]["web"] = "random 20%"
    apart = [phase.streams["web"].selected for phase in Plan.from_spec(with_phases(phases[:2]), simulate=True).phases]
    assert abs(apart[0].common_with(apart[1]).num_documents - 40_000) < 5 * 130 * 8, "64 neighbours a block: 8 times"


def test_longer_windows_are_what_their_example_says():
    phases = next(block["phases"] for block in BLOCKS if "phases" in block and "seq_length" in block["phases"][-1])
    short, long = told_of(with_phases(phases))["phases"]
    assert (short["samples"], short["sources"]["web"]["windows_left_out"]) == (999_992, 7)
    assert long["samples"] == 12_500 * long["samples_per_window"] == 12_500 * 8
    assert documented("`short` shows 999 992 of its 999 999 windows. `long` has 12 500 windows")


def test_the_long_context_example_ends_with_long_windows():
    plan = Plan.load(Path(__file__).parents[3] / "examples" / "long_context" / "plan.yaml", simulate=True)
    assert [phase.seq_length for phase in plan.phases] == [4096, 4096, 32_768]
    assert plan.phases[-1].first_sample % 8 == 0
    assert plan.describe()["phases"][-1]["sources"]["books"]["padding"] < 0.01


def test_repeated_data_are_worth_what_the_document_says():
    (note,) = repetition_notes(told_of(EXAMPLE))
    assert "web is shown 1.48 times on the average, which is worth 99.5%" in note
    assert documented("1.48 times on the average, which is worth 99.5 %")


def test_shuffled_documents_are_what_their_example_says():
    phases = next(block["phases"] for block in BLOCKS if "phases" in block and block["phases"][0]["name"] == "mixed")
    plan = Plan.from_spec(with_phases(phases), simulate=True)
    assert plan.phases[0].num_samples == 1_999_999
    rising = plan.phases[1].streams["web"]
    assert (rising.shuffling.num_bands, rising.selected.num_documents) == (10, 400_000)
    assert plan.describe()["phases"][1]["sources"]["web"]["order"] == "random in 10 ascending bands"


def test_documents_packed_whole_are_what_their_example_says():
    phases = next(block["phases"] for block in BLOCKS if "phases" in block and block["phases"][0]["name"] == "whole")
    told = [phase["sources"]["web"] for phase in told_of(with_phases(phases))["phases"]]
    assert [row["samples"] for row in told] == [999_385, 99_908]
    assert [f"{row['padding']:.2%}" for row in told] == ["0.36%", "0.36%"]


def test_what_is_unseen_is_what_its_example_says():
    phases = next(block["phases"] for block in BLOCKS if "phases" in block and block["phases"][0]["name"] == "first")
    told = told_of(with_phases(phases))
    rows = [phase["sources"]["web"] for phase in told["phases"]]
    assert [row["samples"] for row in rows] == [500_000, 250_000, 249_999, 1_000_000]
    assert times_shown(rows[1]) == "25.0% never, 75.0% once"
    assert [times_shown(row) for row in rows[2:]] == ["100.0% once", "100.0% twice"]


def test_the_selections_take_what_stands_beside_them():
    phases = next(block["phases"] for block in BLOCKS if "phases" in block and block["phases"][0]["name"] == "amount")
    told = told_of(with_phases(phases))
    counts = [phase["sources"]["web"]["documents"] for phase in told["phases"]]
    written = re.findall(r"# (\d+ \d+)(?: documents)?$", TEXT, flags=re.MULTILINE)
    assert [f"{count:,}".replace(",", " ") for count in counts] == written[:4]
    assert counts[1:] == [300_000, 290_000, 250_000]
    assert abs(told["phases"][0]["sources"]["web"]["unique_tokens"] - 100_000_000) < 20_000


def test_the_mixture_of_bands_is_what_its_example_says():
    block = next(block for block in BLOCKS if "web_best" in block.get("sources", {}))
    content = block | {"seq_length": 1000}
    with pytest.raises(PlanError, match=r"source 'web_best' for 240,\d+,\d+ tokens.*max_repeat to at least 1\.21"):
        told_of(content)
    block["phases"][0]["sources"]["web_best"]["max_repeat"] = 1.21
    told = told_of(content)
    rows = told["phases"][0]["sources"]
    assert rows["code"]["samples"] == 399_999
    assert [f"{row['share']:.1%}" for row in rows.values()] == ["24.0%", "36.0%", "40.0%"]
    assert len(fill_notes(told)) == 1


def test_the_amended_curriculum_is_what_its_example_says():
    phases = next(block["phases"] for block in BLOCKS if "phases" in block and block["phases"][0]["name"] == "ramp")
    told = told_of(with_phases(phases))
    assert told["samples"] == 200_000
    epochs = [band["epochs"] for band in told["sources"]["web"]["bands"]]
    assert [round(epoch, 2) for epoch in (epochs[0], epochs[1], *epochs[3:])] == [0.4, 0.4] + 7 * [0.13]
    assert told["sources"]["web"]["quality"][-1] > 0.99


def test_the_weights_that_the_example_keeps_are_those_of_the_document():
    rows = Plan.from_spec(EXAMPLE, simulate=True).retained(500, 0.1)
    assert [round(row["kept"], 2) for row in rows[:2]] == [0.72, 0.72]
    assert [kept and round(kept, 2) for kept in rows[2]["bands"]] == [None] * 7 + [0.91, 0.69, 0.26]
