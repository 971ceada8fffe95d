"""The curriculum study's data, plans and statistics; its runs are those of the entry point, tested elsewhere."""

import argparse
import json
import random
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan, open_source
from megatron_kaiyuan.errors import StudyError
from studies import curriculum_study, curriculum_study_data
from studies.curriculum_study import pack
from studies.curriculum_study_data import DOMAINS, StudyData, build, collect
from studies.curriculum_study_report import _paired_t, draw, final_value, gains, print_report, rank_statement
from studies.curriculum_study_runs import ARMS, SIZES, Clock, Run, Study, finished, plan_of

TEXT = "value window sample order source number phase token weight document quality learning batch"
WORDS = TEXT.split()


def write_environment(root: Path) -> list[Any]:
    """Folders of Python files with docstrings of invented sentences."""
    from documents import SourceFile

    chance = random.Random(3)
    files = []
    for folder in range(60):
        for number in range(8):
            prose = " ".join(chance.choices(WORDS, k=60))
            text = (
                f'"""{prose}."""\n\n\ndef function_{folder}_{number}(value: int) -> int:\n    """{prose} {number}."""\n'
            )
            text += "".join(f"    value += {chance.choice(WORDS)!r}.count('{n}')\n" for n in range(20))
            path = root / f"folder_{folder}" / f"module_{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "    return value\n")
            files.append(SourceFile(path, path.relative_to(root).as_posix(), "python"))
    return files


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    collect(folder / "carried", {"code": 10.0, "prose": 10.0}, 400, write_environment(folder / "files"))
    return folder / "carried"


@pytest.fixture(scope="module")
def data(carried: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    return build(carried, tmp_path_factory.mktemp("data"), 1)


@pytest.fixture
def study(data: StudyData, monkeypatch: pytest.MonkeyPatch) -> Study:
    """About nine tenths of a pass, in batches of 2 x 32 tokens."""
    small = SIZES["tiny"].__class__(SIZES["tiny"].model, 32, 2, 2, 8e-3, 400, None)
    monkeypatch.setitem(SIZES, "tiny", small)
    return Study("tiny", int(0.9 * data.total_tokens) // 64, 8e-3, "fp32", data.digest)


def rows_of(data: StudyData, kind: str) -> list[dict[str, Any]]:
    path = data.shards.parent / "text" / f"{kind}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_text_is_whole_and_of_other_folders(data: StudyData) -> None:
    """Every word of it is one of the generator's, and no folder's functions are on both sides."""
    for domain in DOMAINS:
        clean = rows_of(data, f"clean_{domain}")
        assert clean
        assert all(set(row) == {"text"} for row in clean)
        assert all(row["text"].count("quality") + row["text"].count("value") for row in clean)
    numbers = {
        kind: {part.split("_")[1] for row in rows_of(data, kind) for part in row["text"].split() if "function_" in part}
        for kind in ("clean_code", "clean_prose")
    }
    assert not numbers["clean_code"] & numbers["clean_prose"], "a folder feeds one kind"


def test_the_share_of_damaged_words_follows_from_the_quality(data: StudyData) -> None:
    """Words of four or more letters survive with probability 1 - 0.9 (1 - quality), give or take a lucky shuffle."""
    long_words = {word for word in WORDS if len(set(word)) > 3}
    errors = []
    for row in rows_of(data, "code"):
        head = row["text"].split('"""')[1].rstrip(".").split()
        kept = np.mean([word in long_words for word in head])
        whole = len(long_words) / len(WORDS)
        errors.append(kept / whole - (1 - 0.9 * (1 - row["quality"])))
    assert abs(float(np.mean(errors))) < 0.03


def test_a_score_knows_the_quality_with_noise_and_a_lot_does_not(data: StudyData) -> None:
    rows = rows_of(data, "code") + rows_of(data, "prose")
    quality = np.array([row["quality"] for row in rows])
    noise = np.array([row["noisy_2"] for row in rows]) - quality
    assert abs(float(noise.std()) - 0.1) < 0.02
    assert abs(np.corrcoef(quality, [row["lot_2"] for row in rows])[0, 1]) < 0.2
    assert 0.9 < data.rank_correlation < 1


def test_shards_of_other_text_are_refused(carried: Path, data: StudyData, tmp_path: Path) -> None:
    other = tmp_path / "carried"
    (other / "tokenizer").mkdir(parents=True)
    (other / "corpus.jsonl.xz").write_bytes(b"another")
    (other / "tokenizer" / "tokenizer.json").write_bytes((carried / "tokenizer" / "tokenizer.json").read_bytes())
    with pytest.raises(StudyError, match="holds shards of other text"):
        build(other, data.shards.parent, 1)


def test_uniform_and_ascending_differ_in_the_name_of_the_score_alone(study: Study, data: StudyData) -> None:
    """So whatever differs between (a) and (b) is the order."""
    uniform, ascending = (plan_of(study, Run(arm, 2), data) for arm in ARMS[:2])
    assert json.dumps(uniform).replace("lot_2", "noisy_2") == json.dumps(ascending)
    assert "lot_2" in json.dumps(uniform)


def test_arms_differ_beyond_the_order_in_the_last_rate_alone(study: Study, data: StudyData) -> None:
    plans = [plan_of(study, Run(arm, 1), data) for arm in ARMS[1:4]]
    ends = [plan["phases"][2]["lr"].pop("end") for plan in plans]
    shapes = [plan["phases"][2]["lr"].pop("shape") for plan in plans]
    assert ends == pytest.approx([8e-5, 8e-3, 8e-3 / 3])
    assert shapes == ["sqrt", "constant", "sqrt"]
    assert plans[0] == plans[1] == plans[2]


def test_the_ascending_arm_shows_better_documents_from_phase_to_phase(study: Study, data: StudyData) -> None:
    """Scores of each source never fall over the whole run; a lot's order does not know the quality."""
    quality = {domain: np.array([row["quality"] for row in rows_of(data, domain)]) for domain in DOMAINS}
    sources = {domain: open_source(domain, str(data.shards / f"{domain}_text_document")) for domain in DOMAINS}
    tenths = {}
    for arm in ARMS[:2]:
        plan = Plan.from_spec(plan_of(study, Run(arm, 1), data))
        order = CurriculumDataset(plan)
        assert len(order) == study.steps * 2
        shown = [[] for _ in range(10)]
        for sample in range(len(order)):
            found = order.provenance(sample)
            numbers = [sources[found.source].number(segment) for segment in found.segments]
            shown[sample * 10 // len(order)] += [quality[found.source][number] for number in numbers]
        tenths[arm.key] = [float(np.mean(part)) for part in shown]
    rising = tenths["ascending_wsd"]
    assert all(later > earlier for earlier, later in pairwise(rising))
    assert rising[0] < 0.15
    assert rising[-1] > 0.85
    assert max(abs(mean - 0.5) for mean in tenths["uniform_wsd"]) < 0.2


def result_of(study: str, arm: str, seed: int, loss: float, average: float) -> dict[str, Any]:
    losses = {
        weights: {
            name: {"loss": value + shift, "bits_per_byte": value / 2, "tokens": 10}
            for name, shift in (("clean_code", 0.0), ("clean_prose", 1.0))
        }
        for weights, value in (("last", loss), ("average", average))
    }
    return {"study": study, "arm": arm, "seed": seed, "held_out": losses, "curve": [[0, 5.0, 0.1], [9, loss, 0.0]]}


@pytest.fixture
def results() -> dict[tuple[str, int], dict[str, Any]]:
    """Gains of (b) over (a): 0.1, 0.2 and 0.3; of the average of (c): 0.5, 0.7 and 0.6."""
    found = {}
    for seed, (first, second, third) in enumerate([(3.0, 2.9, 2.5), (3.2, 3.0, 2.5), (3.1, 2.8, 2.5)], 1):
        found["uniform_wsd", seed] = result_of("s", "uniform_wsd", seed, first, 9.0)
        found["ascending_wsd", seed] = result_of("s", "ascending_wsd", seed, second, 9.0)
        found["ascending_constant", seed] = result_of("s", "ascending_constant", seed, 9.0, third)
    return found


def test_an_arm_is_judged_by_the_weights_it_was_declared_with(results: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert final_value(results["uniform_wsd", 1], ARMS[0], "clean_code", "loss") == 3.0
    assert final_value(results["ascending_constant", 1], ARMS[2], "clean_prose", "loss") == 3.5
    assert final_value(results["ascending_constant", 1], ARMS[2], "all", "loss") == 3.0


def test_gains_are_paired_by_seed_and_their_interval_is_students(
    results: dict[tuple[str, int], dict[str, Any]],
) -> None:
    """By hand: both arms have gains of variance 0.01, so s = 0.1 with 2 degrees of freedom; t(0.975, 2) = 4.302653."""
    found = gains(results, "clean_code", "loss")
    assert [gain.value for gain in found] == pytest.approx([0.2, 0.6])
    assert [gain.half_width for gain in found] == pytest.approx([4.302653 * 0.1 / 3**0.5] * 2)
    # t = 0.2 / 0.057735 = 3.4641 with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2) = 0.0742; the larger of both
    assert found[0].p_value == pytest.approx(1 - 3.4641 / (2 + 12) ** 0.5, rel=1e-3)
    assert found[1].p_value == pytest.approx(2 * (1 - 10.3923 / (2 + 108) ** 0.5), rel=1e-3)


def test_the_intervals_of_three_arms_over_one_baseline_cover_what_they_say() -> None:
    """Noise of the baseline alone: pooling the gains' variances took its three draws for nine."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        baseline = rng.normal(size=3)
        half, _ = _paired_t(baseline + 0.1 * rng.normal(size=3))
        covered += abs(baseline.mean()) < half
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)


def test_ranks_need_no_variance(results: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Three uniform runs above six ascending ones: one of 84 ways to choose three of nine."""
    assert not rank_statement(results)[0]
    for (arm, _), result in results.items():
        if arm == "uniform_wsd":
            for told in result["held_out"]["last"].values():
                told["loss"] += 100
    apart, chance = rank_statement(results)
    assert apart
    assert chance == pytest.approx(1 / 84)


def test_one_seed_gives_no_interval(results: dict[tuple[str, int], dict[str, Any]]) -> None:
    found = gains({key: value for key, value in results.items() if key[1] == 1}, "all", "loss")
    assert [gain.value for gain in found] == pytest.approx([0.1, 0.5])
    assert all(np.isnan(gain.half_width) and gain.p_value == 1 for gain in found)


def test_the_report_has_every_arm_and_the_page_says_what_a_cpu_run_is(
    results: dict[tuple[str, int], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"size": "tiny", "tokens": 100, "steps": 10, "precision": "fp32", "note": ", smoke test"}
    numbers = print_report(results, told)
    shown = capsys.readouterr().out
    assert "(c) ascending, constant, average" in shown
    assert "+0.2000" in shown
    assert {row["arm"] for row in numbers["gains"]} == {"ascending_wsd", "ascending_constant"}
    assert "smoke test" in draw(results, told).layout.title.text


def test_without_the_first_arm_nothing_is_compared(results: dict[tuple[str, int], dict[str, Any]]) -> None:
    others = {key: value for key, value in results.items() if key[0] != "uniform_wsd"}
    with pytest.raises(StudyError, match="nothing to compare"):
        gains(others, "all", "loss")


def test_a_result_of_another_study_is_refused(tmp_path: Path) -> None:
    study, run = Study("tiny", 100, 8e-3, "fp32", "data"), Run(ARMS[0], 1)
    assert finished(study, run, tmp_path) is None
    (tmp_path / f"{run.name}.json").write_text(json.dumps({"study": study.digest}))
    assert finished(study, run, tmp_path) is not None
    longer = Study("tiny", 101, 8e-3, "fp32", "data")
    with pytest.raises(StudyError, match="another size, budget, rate"):
        finished(longer, run, tmp_path)


@pytest.mark.parametrize(("speed", "expected"), [(1000.0, 123_250), (1e9, 950_000)])
def test_the_budget_follows_from_the_time_and_ends_at_one_pass(speed: float, expected: int) -> None:
    """Two calls of 10 minutes, 210 s spent, 6 runs two at a time: 0.85 x (1200 - 210 - 3 x 40) x 1000 / 6."""
    args = argparse.Namespace(
        tokens=None, minutes=10.0, calls=2, seeds=3, arms="uniform_wsd,ascending_wsd", concurrent=2,
        tokens_per_second=speed,
    )  # fmt: skip
    data = StudyData(Path(), Path(), "", {"code": 600_000, "prose": 400_000}, 0.9)
    study = Study("tiny", 0, 8e-3, "fp32", "")
    began = curriculum_study.time.monotonic() - 210
    found = curriculum_study.budget(args, study, data, Clock(600.0), began)
    assert found == pytest.approx(expected, rel=1e-3)


def test_arms_and_seeds_are_checked() -> None:
    with pytest.raises(StudyError, match="'nothing' is unknown"):
        curriculum_study.chosen_runs(argparse.Namespace(arms="nothing", seeds=1))
    too_many = len(curriculum_study_data.SEEDS) + 1
    with pytest.raises(StudyError, match="the shards have scores for"):
        curriculum_study.chosen_runs(argparse.Namespace(arms="all", seeds=too_many))


def test_results_are_comparable_once_a_seed_has_two_arms(tmp_path: Path) -> None:
    for name, expected in (
        ("uniform_wsd-seed1", False), ("uniform_wsd-seed2", False), ("ascending_wsd-seed3", False),
        ("ascending_constant-seed2", True),
    ):  # fmt: skip
        (tmp_path / f"{name}.json").write_text("{}")
        assert curriculum_study.comparable(tmp_path) is expected


def test_results_are_packed_whole_and_unpack_into_the_output_folder(tmp_path: Path) -> None:
    for name in ("study.json", "a-seed1.json", ".a-seed2.json.half"):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / name).write_text("{}")
    pack(tmp_path / "results", tmp_path / "packed.tgz")
    with tarfile.open(tmp_path / "packed.tgz") as packed:
        assert sorted(packed.getnames()) == ["results/a-seed1.json", "results/study.json"]
