"""The example plan of Kaiyuan-2B says what the report says: phases, selections, repetitions, bands and costs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.plan_schema import load_plan_spec

ROOT = Path(__file__).resolve().parents[3]
PLAN = ROOT / "examples" / "kaiyuan_2b" / "plan.yaml"
PHASES = ["phase1", "phase2", "phase3", "phase4", "phase5"]

# The authors' public configurations, one row a dataset and one column a phase: `-` = not used, `top q` = the best q %
# by score, `rand q` = a random q %, `xK` = all of it K times. Typed from the recipe's table, not from the plan.
RECIPE = """
dclm               | all     | top 40  | top 10  | top 6   | top 3
fineweb_edu_zh_raw | all     | -       | -       | -       | -
fineweb_edu_zh     | -       | top 20  | top 12  | top 10  | top 5
fineweb_edu        | -       | all     | top 50  | top 30  | top 10
starcoder          | rand 10 | top 10  | top 5   | top 4   | top 1
megamath_web       | rand 30 | -       | -       | rand 20 | rand 10
finepdf_en         | -       | -       | all     | top 60  | top 30
finemath_4plus     | -       | all     | top 60  | top 80  | top 40
megamath_web_pro   | -       | all     | top 60  | top 80  | top 40
openwebmath        | -       | all     | top 40  | top 90  | top 60
swallow_code       | -       | -       | top 40  | top 90  | top 40
swallow_math       | -       | -       | rand 40 | all     | rand 60
python_edu         | -       | -       | top 50  | all     | top 60
automathtext       | -       | -       | top 40  | all     | top 60
cosmopedia_v2      | -       | all     | rand 20 | rand 40 | rand 10
arxiv              | -       | all     | rand 60 | rand 80 | rand 40
stackexchange      | -       | all     | rand 40 | rand 60 | rand 30
finewiki_en        | -       | all     | x2      | x2      | x1.5
finewiki_zh        | -       | all     | x2      | x2      | x2.5
baidu_baike        | -       | -       | all     | x2      | x1.5
undl_zh_en         | -       | -       | all     | -       | rand 50
chinese_pool       | -       | -       | -       | rand 10 | top 5
sft_downstream     | -       | -       | -       | x10     | x30
jiuzhang_cot       | -       | -       | -       | x2      | x2
tulu3_sft          | -       | -       | -       | -       | x7
slimorca           | -       | -       | -       | -       | x2
stack_v2_smol      | -       | -       | -       | -       | rand 20
algebraic_stack    | -       | -       | -       | -       | top 60
flan               | -       | rand 10 | -       | -       | -
pes2o              | -       | rand 5  | -       | -       | -
megamath_text_code | -       | rand 50 | -       | -       | -
"""

# Of all documents of the release; and tokens that the configurations name.
DOCUMENTS = 2_091_505_724
NAMED_TOKENS = {
    "fineweb_edu_zh_raw": 430 * 10**9,
    "fineweb_edu": 190 * 10**9,
    "dclm": 610 * 10**9,
    "finepdf_en": 1100 * 10**9 // 20,
    "starcoder": 190 * 10**9,
}


@pytest.fixture(scope="module")
def plan():
    return Plan.load(PLAN, simulate=True)


@pytest.fixture(scope="module")
def told(plan):
    return plan.describe()


def recipe():
    """Cells by phase and source."""
    rows = [[cell.strip() for cell in line.split("|")] for line in RECIPE.strip().splitlines()]
    return {
        phase: {row[0]: row[number] for row in rows if row[number] != "-"} for number, phase in enumerate(PHASES, 1)
    }


def cell(keep, repeat):
    """How the recipe's table writes a selection and a repetition."""
    if repeat != 1:
        assert keep == "all"
        return f"x{repeat:g}"
    return keep.replace("random", "rand").removesuffix("%")


def test_all_31_datasets_are_sources_in_the_order_of_the_table(plan):
    names = [line.split("|")[0].strip() for line in RECIPE.strip().splitlines()]
    assert len(names) == 31
    assert list(plan.sources) == names


def test_every_cell_of_the_recipe_is_in_the_plan_and_no_other(told):
    found = {
        phase["name"]: {name: cell(row["keep"], row["repeat"]) for name, row in phase["sources"].items()}
        for phase in told["phases"]
    }
    assert found == recipe()
    assert [len(phase["sources"]) for phase in told["phases"]] == [4, 15, 19, 22, 27]


def test_phases_1_and_2_are_shuffled_and_the_others_ascend_in_every_scored_source(told):
    assert [phase["order"] for phase in told["phases"]] == ["shuffled"] * 2 + ["curriculum"] * 3
    for phase in told["phases"]:
        for name, row in phase["sources"].items():
            ascends = phase["order"] == "curriculum" and told["sources"][name]["score"] is not None
            assert row["order"] == ("ascending quality" if ascends else "random")


def test_only_sources_with_a_score_are_cut_by_quality(plan):
    scored = {name for name, source in plan.sources.items() if source.score is not None}
    cut = {name for phase in recipe().values() for name, text in phase.items() if text.startswith("top")}
    assert cut == scored


def test_learning_rates_are_those_of_the_report(plan):
    assert [(p.lr.start, p.lr.end) for p in plan.phases] == [(5e-3, 5e-3)] + 3 * [(3e-3, 3e-3)] + [(3e-3, 6e-4)]
    assert (plan.averaging.last, plan.averaging.every, plan.averaging.weights) == (8, 400, "mean")
    assert plan.seq_length == 4096


def test_sizes_are_those_that_the_configurations_name(plan):
    assert sum(source.expected.documents for source in plan.sources.values()) == pytest.approx(DOCUMENTS, abs=31)
    assert {name: plan.sources[name].expected.tokens for name in NAMED_TOKENS} == NAMED_TOKENS


def test_fineweb_edu_is_seen_four_three_two_times_and_once(told):
    """The report's own summary: top 10 % four times, top 30 % three times, top 50 % twice, the rest once."""
    bands = told["sources"]["fineweb_edu"]["bands"][::-1]
    assert [band["high"] for band in bands] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    # 2 000 of 169 million documents are held out, and windows are whole: less than one part in 10 000
    assert [band["epochs"] for band in bands] == pytest.approx([4, 3, 3, 2, 2, 1, 1, 1, 1, 1], rel=1e-4)


@pytest.mark.parametrize("name", list(NAMED_TOKENS | {"chinese_pool": 0, "openwebmath": 0, "finewiki_zh": 0}))
def test_every_band_is_seen_as_often_as_the_recipe_adds_up_to(told, name):
    """An oracle of its own: each percent of quality gets 1 from a selection that covers it, q % from a random q %.

    A random part is exact in documents, and their lengths scatter.
    """
    seen = [0.0] * 100
    for phase in recipe().values():
        kind, _, size = phase.get(name, "rand 0").partition(" ")
        for percent in range(100):
            if kind == "all":
                seen[percent] += 1
            elif kind == "rand":
                seen[percent] += int(size) / 100
            elif kind == "top":
                seen[percent] += percent >= 100 - int(size)
            else:
                seen[percent] += float(kind[1:])
    source = told["sources"][name]
    assert source["epochs"] == pytest.approx(sum(seen) / 100, rel=1e-3)
    for number, band in enumerate(source["bands"]):
        # a tenth of 52,000 blocks by chance: the share of a band has a standard deviation of 1.3 %
        drawn = 0.1 * 5 * 0.013 if name == "chinese_pool" else 0
        assert band["epochs"] == pytest.approx(sum(seen[10 * number : 10 * number + 10]) / 10, rel=5e-3, abs=drawn)


def test_totals_are_the_sums_of_the_parts(plan, told):
    """Tokens of every selection, added up from the recipe alone; each stream drops less than one window and a token."""
    for phase in told["phases"]:
        expected = 0.0
        for name, text in recipe()[phase["name"]].items():
            kind, _, size = text.partition(" ")
            share = {"all": 1.0}.get(kind) or (int(size) / 100 if size else float(kind[1:]))
            expected += share * plan.sources[name].expected.tokens
        assert phase["tokens"] == pytest.approx(expected, rel=1e-4)
        assert phase["tokens"] == sum(row["tokens"] for row in phase["sources"].values())
        assert phase["tokens"] == phase["samples"] * 4096
    assert told["samples"] == len(range(told["phases"][-1]["first_sample"] + told["phases"][-1]["samples"]))
    assert told["samples"] > 537_000_000  # 2.2 T tokens and more: samples are counted past 2^29


def test_the_domain_bounds_of_the_report_hold_over_the_run_and_phase_1_says_why_not_per_phase(plan, told):
    bounds = {bound["domain"]: (bound["scope"], bound["min"], bound["max"]) for bound in told["domain_bounds"]}
    assert bounds == {"english": ("run", 0.3, None)} | dict.fromkeys(("chinese", "code", "math"), ("run", None, 0.3))
    assert all(bound["met"] for bound in told["domain_bounds"])
    assert told["phases"][0]["domains"]["chinese"] == pytest.approx(430 / 1125, rel=1e-3)
    for phase in told["phases"][1:]:
        assert phase["domains"]["english"] >= 0.3
        assert max(phase["domains"].get(domain, 0) for domain in ("chinese", "code", "math")) <= 0.3
    comment = PLAN.read_text(encoding="utf-8")
    over_the_run = [f"{100 * told['domains'][domain]:.1f}" for domain in ("english", "chinese", "code", "math")]
    assert f"{over_the_run[0]}, {over_the_run[1]}, {over_the_run[2]} and {over_the_run[3]} %" in comment


def test_the_plan_opens_in_a_second_of_processor_time_and_little_memory():
    """2.1 billion documents and 650 million samples: nothing is built, and the last sample is found like the first."""
    code = """
import pathlib, sys, time
from megatron_kaiyuan.data import Plan
started = time.process_time()
plan = Plan.load(sys.argv[1], simulate=True)
for sample in (0, plan.num_samples // 2, plan.num_samples - 1):
    phase = plan.phase_of(sample)
    phase.sample(sample - phase.first_sample)
seconds = time.process_time() - started
print(seconds, pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])
"""
    run = subprocess.run([sys.executable, "-c", code, PLAN], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, kibibytes = map(float, run.stdout.split())
    assert seconds < 1
    assert kibibytes < 512 * 1024


def test_the_file_is_read_without_its_sources():
    assert load_plan_spec(PLAN).seed == 1234


def test_the_totals_in_the_comment_are_those_of_the_plan():
    """The report speaks of 2.2 T tokens; the comment says what of the difference rests on estimates."""
    text = PLAN.read_text()
    told = Plan.load(PLAN, simulate=True).describe()
    letters = dict(re.findall(r"^  (\w+): +\{shards.*#\s+([RDE]);", text, re.MULTILINE))
    assert set(letters) == set(told["sources"])
    shown = dict.fromkeys(("RD", "E"), 0)
    for name, letter in letters.items():
        shown["E" if letter == "E" else "RD"] += told["sources"][name]["tokens_seen"]
    for number in (
        f"{told['tokens'] / 1e12:.2f} T tokens, {told['samples'] / 1e6:.0f} M samples",
        f"{2.2e12 / 4096 / 1e6:.0f} M samples",
        f"show {shown['RD'] / 1e12:.2f} T",
        f"another {shown['E'] / 1e12:.2f} T",
        f"room for {2.2 - shown['RD'] / 1e12:.2f} T",
    ):
        assert number in " ".join(text.replace("\n#", "").split()), number
