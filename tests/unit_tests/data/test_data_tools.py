"""`tools/rank_data.py` and `tools/plan_data.py` as a user runs them: exit codes, output, and being killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_kaiyuan.data import Plan, open_source, resolve_prefixes
from megatron_kaiyuan.documents.rank_index import index_path, open_rank_index
from megatron_kaiyuan.errors import ScoreError, ShardError
from megatron_kaiyuan.shards.score_import import import_scores
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_shard, write_source

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(tool, *args):
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, args)]


def run(tool, *args):
    return subprocess.run(command(tool, *args), capture_output=True, text=True, env=ENVIRONMENT, check=False)


def start(tool, *args):
    return subprocess.Popen(command(tool, *args), stdout=subprocess.DEVNULL, env=ENVIRONMENT)


def assert_told_without_traceback(done, code, *words):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def folder(tmp_path):
    scores = [(7 * n) % 50 for n in range(50)]
    write_source(tmp_path / "web", numbered_documents([8] * 50), scores, [20])
    return tmp_path / "web"


@pytest.fixture
def plan_file(folder):
    lr = {"start": 1e-3, "end": 1e-4, "shape": "sqrt"}
    phases = [
        phase_of("shuffled", {"web": "all"}, "a", lr=lr | {"end": 1e-3}),
        phase_of("curriculum", {"web": "top 20%"}, "b", lr=lr),
    ]
    spec = plan_of({"web": {"shards": str(folder), "score": "score"}}, *phases)
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def test_ranking_and_verifying_a_source(folder):
    built = run("rank_data", folder)
    assert built.returncode == 0, built.stderr
    assert "50 documents, 400 tokens in 2 shards" in built.stdout
    source = open_source("web", str(folder))
    path = index_path(source, "score")
    assert str(path) in built.stdout
    verified = run("rank_data", folder, "--verify")
    assert verified.returncode == 0, verified.stderr
    assert "correct for 50 documents, 400 tokens" in verified.stdout
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    failed = run("rank_data", folder, "--verify")
    assert_told_without_traceback(failed, 1, "1 entry of order differs", "tools/rank_data.py again without --verify")


def test_wrong_usage_of_rank_data_is_told(folder, tmp_path):
    assert_told_without_traceback(run("rank_data"), 2, "SHARDS")
    assert_told_without_traceback(run("rank_data", folder, "--plan", "plan.yaml"), 2, "SHARDS")
    assert_told_without_traceback(run("rank_data", "--plan", "plan.yaml", "--verify"), 2, "--verify")
    assert_told_without_traceback(run("rank_data", folder, "--seed", "many"), 2, "--seed")
    assert_told_without_traceback(run("rank_data", tmp_path / "nowhere"), 1, "error: shard", "does not exist")
    assert_told_without_traceback(run("rank_data", folder, "--score", "fun"), 1, "no such score sidecar")
    assert_told_without_traceback(
        run("rank_data", folder, "--verify"), 1, "no rank index", f"{Path(sys.executable).name} tools/rank_data.py"
    )


def test_ranking_a_plan_builds_what_is_missing_or_old(folder, tmp_path):
    write_source(tmp_path / "code", numbered_documents([8] * 30), [float(n) for n in range(30)])
    write_source(tmp_path / "plain", numbered_documents([8] * 30))
    sources = {name: {"shards": str(tmp_path / name), "score": "score"} for name in ("web", "code")}
    sources["code"]["rank_index"] = str(tmp_path / "code.index")
    sources["plain"] = {"shards": str(tmp_path / "plain")}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan_of(sources, phase_of("shuffled", {"web": "all"})), sort_keys=False))

    def states():
        done = run("rank_data", "--plan", path)
        assert done.returncode == 0, done.stderr
        return [line.split(",")[0] for line in done.stdout.splitlines()]

    assert states() == ["web: ranked", "code: ranked"]
    assert (tmp_path / "code.index").is_file()
    assert states() == ["web: up to date", "code: up to date"]
    (tmp_path / "code.index").unlink()
    assert states() == ["web: up to date", "code: ranked"]
    scores = next(folder.glob("*.scores.score.npy"))
    os.utime(scores, ns=(time.time_ns() + 10**9,) * 2)
    assert states() == ["web: ranked", "code: up to date"]


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_scores_made_elsewhere_become_sidecars(folder, tmp_path, kind):
    scores = np.arange(50)[::-1].astype(np.float64) / 7
    if kind == "npy":
        origin = tmp_path / "scores.npy"
        np.save(origin, scores)
    else:
        pq.write_table(pa.table({"grade": scores, "text": ["x"] * 50}), tmp_path / "scores.parquet")
        origin = f"{tmp_path / 'scores.parquet'}:grade"
    done = run("rank_data", folder, "--scores", origin, "--score", "grade")
    assert done.returncode == 0, done.stderr
    source = open_source("web", str(folder))
    assert np.array_equal(source.load_scores("grade"), scores)
    index = open_rank_index(index_path(source, "grade"), source, "grade")
    assert index.order.tolist() == list(range(49, -1, -1))


@pytest.mark.parametrize(("first", "stored"), [(0, np.float32), (1 << 24, np.float64), (1 << 40, np.float64)])
def test_neighbouring_whole_numbers_stay_apart(folder, tmp_path, first, stored):
    np.save(tmp_path / "numbers.npy", np.arange(first, first + 50)[::-1])
    source = open_source("web", str(folder))
    import_scores(source, str(tmp_path / "numbers.npy"), "when")
    scores = source.load_scores("when")
    assert scores.dtype == stored
    assert scores.tolist() == list(range(first + 49, first - 1, -1))


def test_scores_that_do_not_fit_are_refused_and_nothing_is_written(folder, tmp_path):
    np.save(tmp_path / "short.npy", np.zeros(49))
    np.save(tmp_path / "nan.npy", np.full(50, np.nan))
    np.save(tmp_path / "huge.npy", np.arange((1 << 62) + 1, (1 << 62) + 51))
    (tmp_path / "text.npy").write_text("0.5\n")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "bad.parquet").write_text("0.5\n")
    pq.write_table(pa.table({"text": ["x"] * 50}), tmp_path / "text.parquet")
    before = sorted(folder.iterdir())
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"grade": np.random.default_rng(0).random(50)}), whole, compression="gzip")
    torn = bytearray(whole.read_bytes())
    torn[40:200] = bytes(160)
    (tmp_path / "torn.parquet").write_bytes(torn)
    source = open_source("web", str(folder))
    for origin, message in (
        ("short.npy", r"shape \(49,\)"),
        ("nan.npy", "50 scores are NaN"),
        ("huge.npy", r"beyond 2\^53"),
        ("text.npy", r"not a whole \.npy file"),
        ("empty.npy", r"not a whole \.npy file"),
        ("gone.npy", "no file"),
        ("text.parquet:grade", r"no column 'grade'; give .* \(it has text\)"),
        ("text.parquet:text", "does not hold numbers"),
        ("bad.parquet:grade", "is not a Parquet file"),
        ("torn.parquet:grade", "column 'grade' cannot be read"),
    ):
        with pytest.raises(ScoreError, match=f"--scores .*{origin}.*{message}"):
            import_scores(source, str(tmp_path / origin), "grade")
    done = run("rank_data", folder, "--scores", tmp_path / "nan.npy", "--score", "grade")
    assert_told_without_traceback(done, 1, "error: --scores", "50 scores are NaN")
    assert sorted(folder.iterdir()) == before


def test_planning_prints_tables_json_and_a_page(plan_file, tmp_path):
    page = tmp_path / "pages" / "plan.html"
    done = run("plan_data", plan_file, "--json", "--plot", page, "--bands", 5)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads(json.dumps(Plan.load(plan_file).describe(5)))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert told["fingerprint"] in text
    assert "<script src=" not in text
    tables = run("plan_data", plan_file, "--global-batch-size", 4)
    assert tables.returncode == 0, tables.stderr
    for word in ("top 20%", "ascending quality", "web", told["fingerprint"], "steps of 4"):
        assert word in tables.stdout


@pytest.mark.parametrize("score", ["../x", "a/b", ""])
def test_a_score_that_is_no_name_is_wrong_usage_of_rank_data(folder, score):
    assert_told_without_traceback(run("rank_data", folder, "--score", score), 2, "is not the name of a score")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["web"]


def test_an_empty_name_of_shards_is_not_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert run("rank_data", ".").returncode == 0
    assert_told_without_traceback(run("rank_data", ""), 1, "shards '': an empty name; name a prefix")
    with pytest.raises(ShardError, match="an empty name"):
        resolve_prefixes("")


def test_wrong_usage_of_plan_data_is_told(plan_file, tmp_path):
    assert_told_without_traceback(run("plan_data"), 2, "plan")
    assert_told_without_traceback(run("plan_data", plan_file, "--bands", 0), 2, "--bands")
    assert_told_without_traceback(run("plan_data", plan_file, "--global-batch-size", 0), 2, "at least 1")
    assert_told_without_traceback(run("plan_data", tmp_path / "no.yaml"), 1, "no.yaml: cannot be read")
    plan_file.write_text(plan_file.read_text().replace("top 20%", "top 20"))
    assert_told_without_traceback(run("plan_data", plan_file), 1, "phases.1.sources.web", "did you mean 20%?")


@pytest.mark.parametrize("tool", ["rank_data", "plan_data"])
def test_help_is_complete(tool):
    done = run(tool, "--help")
    assert done.returncode == 0
    assert "--" in done.stdout


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    """A million one-token documents with coarse scores, and the index that an undisturbed build writes."""
    folder = tmp_path_factory.mktemp("million")
    count = 1_000_000
    prefix = write_shard(folder / "web", [])
    np.zeros(count, np.int32).tofile(f"{prefix}.bin")
    header = Path(f"{prefix}.idx").read_bytes()[:18] + np.array([count, count + 1], np.uint64).tobytes()
    arrays = np.ones(count, np.int32), 4 * np.arange(count), np.arange(count + 1)
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    np.save(f"{prefix}.scores.score.npy", np.random.default_rng(0).integers(0, 1000, count).astype(np.float32))
    started = time.perf_counter()
    assert run("rank_data", prefix).returncode == 0
    path = folder / "web.score.rank"
    whole = path.read_bytes()
    path.unlink()
    return prefix, path, whole, time.perf_counter() - started


def test_a_killed_build_leaves_no_index_or_the_whole_one(million):
    prefix, path, whole, duration = million
    rng = random.Random(5)
    outcomes = set()
    for attempt in range(8):
        path.unlink(missing_ok=True)
        process = start("rank_data", prefix)
        time.sleep(duration * (0.5 + 0.5 * rng.random()) if attempt else 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        outcomes.add(path.exists())
        if path.exists():
            assert path.read_bytes() == whole
    assert False in outcomes
    assert run("rank_data", prefix).returncode == 0  # what a killed build left behind is in nobody's way
    assert path.read_bytes() == whole


def test_builders_that_start_together_write_the_same_index(million):
    prefix, path, whole, _ = million
    path.unlink(missing_ok=True)
    builders = [start("rank_data", prefix) for _ in range(2)]
    assert [builder.wait() for builder in builders] == [0, 0]
    assert path.read_bytes() == whole
