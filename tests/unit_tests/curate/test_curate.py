"""The curation example: its settings anywhere, its pipeline where an environment with datatrove is.

datatrove and its friends pin other versions than this package, so they live in an environment of their own
(tools/dev/install_test_tools.sh makes it in .venv/curate) and the tests start its interpreter, as a user does.
"""

import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.shards.source import open_source
from tests.unit_tests.preprocess.corpus import save_bpe

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "examples" / "curate"
CURATE_PYTHON = Path(os.environ.get("CURATE_PYTHON", REPOSITORY / ".venv" / "curate" / "bin" / "python"))
FLAGS = ["--input", "raw", "--output", "out", "--tokenizer", "tok", "--model", "q.bin"]
needs_datatrove = pytest.mark.skipif(
    not CURATE_PYTHON.exists(), reason="no environment with datatrove; tools/dev/install_test_tools.sh makes one"
)
GOOD = ["careful", "proof", "shows", "bounded", "sequence", "numbers", "limit", "because", "intervals", "shrink"]
BAD = ["buy", "cheap", "click", "now", "free", "prize", "winner", "casino", "bonus", "hurry"]


@pytest.fixture
def curate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "settings", raising=False)
    yield importlib.import_module("settings")
    sys.modules.pop("settings", None)


def run_there(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(CURATE_PYTHON), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, check=False, timeout=300)


def test_minhash_has_the_settings_of_the_paper(curate: Any) -> None:
    settings = curate.parse_arguments(FLAGS)
    assert (settings.permutations, settings.bands, settings.rows_per_band, settings.n_grams) == (128, 14, 9, 5)
    assert settings.threshold == pytest.approx(0.746, abs=1e-3)
    numbers = [round(100 * settings.probability(similarity)) for similarity in (0.75, 0.85, 0.6)]
    text = (FOLDER / "README.md").read_text()
    assert all(f"{number} %" in text for number in numbers), numbers


def test_more_rows_than_permutations_are_refused(curate: Any) -> None:
    fields = {name: getattr(curate.parse_arguments(FLAGS), name) for name in curate.CurationSettings.__slots__}
    with pytest.raises(ValueError, match="14 x --rows-per-band 10 needs more than the 128"):
        curate.CurationSettings(**{**fields, "rows_per_band": 10})


def test_everything_that_is_missing_is_named_before_anything_runs(curate: Any, tmp_path: Path) -> None:
    flags = [str(tmp_path / flag) if not flag.startswith("--") else flag for flag in FLAGS]
    found = curate.parse_arguments([*flags, "--project-python", str(tmp_path / "python")]).complaints()
    assert [line.split()[0] for line in found] == ["--input", "--tokenizer", "--model", "--project-python"]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "some.jsonl.gz").touch()
    save_bpe(tmp_path / "tok")
    (tmp_path / "q.bin").touch()
    assert curate.parse_arguments([*flags, "--project-python", sys.executable]).complaints() == []


@needs_datatrove
def test_a_slurm_job_finds_datatrove_and_the_steps_from_any_folder(tmp_path: Path) -> None:
    line = run_there("-c", "import curate; print(curate.job_environment())").stdout.strip()
    code = "import steps, shutil; print(shutil.which('launch_pickled_pipeline'), steps.__file__)"
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    job = ["bash", "-c", f'{line}; python -c "{code}"']
    told = subprocess.run(job, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    programs, steps = told.stdout.split()
    assert programs == str(CURATE_PYTHON.parent / "launch_pickled_pipeline"), told.stderr
    assert steps == str(FOLDER / "steps.py")


@needs_datatrove
def test_the_stages_carry_the_settings() -> None:
    told = run_there(
        "-c",
        "import json; from settings import parse_arguments; from curate import stages\n"
        f"found = stages(parse_arguments({[*FLAGS, '--tasks', '5']!r})); config = found[0].steps[-1].config\n"
        "print(json.dumps([[[stage.name, stage.tasks] for stage in found],"
        " [config.n_grams, config.num_buckets, config.hashes_per_bucket]]))",
    )
    assert told.returncode == 0, told.stderr
    stages, config = json.loads(told.stdout.splitlines()[-1])
    assert stages == [["signatures", 5], ["buckets", 14], ["clusters", 1], ["documents", 5], ["shards", 5]]
    assert config == [5, 14, 9]


def sentence(words: list[str], chance: random.Random) -> str:
    return " ".join(chance.choice(words) + chance.choice(["", "s", "ed", "ing"]) for _ in range(80))


def write_raw(folder: Path) -> None:
    """Three files: 15 good documents, 15 bad ones, 6 copies under other names, and one with a word changed."""
    chance = random.Random(0)
    rows = [{"id": f"good {number}", "text": sentence(GOOD, chance)} for number in range(15)]
    rows += [{"id": f"bad {number}", "text": sentence(BAD, chance)} for number in range(15)]
    rows += [{"id": f"copy {number}", "text": rows[number * 5]["text"]} for number in range(6)]
    words = rows[7]["text"].split()
    rows.append({"id": "near", "text": " ".join([*words[:-1], "different"])})
    chance.shuffle(rows)
    folder.mkdir()
    for part in range(3):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[part::3]))


def train_classifier(folder: Path) -> Path:
    chance = random.Random(1)
    lines = [f"__label__hq {sentence(GOOD, chance)}\n__label__lq {sentence(BAD, chance)}\n" for _ in range(40)]
    (folder / "train.txt").write_text("".join(lines))
    # with fewer than eleven threads fastText leaves weights without a start value
    code = (
        f"import fasttext; fasttext.train_supervised({str(folder / 'train.txt')!r}, epoch=20, dim=8, thread=12, "
        f"verbose=0).save_model({str(folder / 'q.bin')!r})"
    )
    finished = run_there("-c", code)
    assert finished.returncode == 0, finished.stderr
    return folder / "q.bin"


@needs_datatrove
def test_copies_are_removed_and_the_rest_become_shards_with_scores(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    save_bpe(tmp_path / "tokenizer")
    flags = ["--input", tmp_path / "raw", "--output", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer"]
    flags += ["--model", train_classifier(tmp_path), "--project-python", sys.executable, "--tasks", "2"]
    for _ in range(2):  # the second time everything is done
        finished = run_there(FOLDER / "curate.py", *flags)
        assert finished.returncode == 0, finished.stderr[-3000:]
    source = open_source("curated", str(tmp_path / "out" / "shards"))
    assert source.num_documents == 30
    scores = np.sort(source.scores_of("metadata.quality", np.arange(30)))
    # what stays of each cluster is one of its documents, so 15 are of each kind, on both sides of even odds
    assert (scores[:15] < 0.5).all()
    assert (scores[15:] > 0.5).all()
