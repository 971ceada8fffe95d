"""`tools/inspect_data.py` as a user runs it: what it prints, its page, its exit codes."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_kaiyuan.data import CurriculumDataset, Plan, open_source
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.preprocess import TokenizerConfig
from megatron_kaiyuan.reporting.inspection_report import InspectionOptions, inspect_samples, inspect_sources
from megatron_kaiyuan.shards.tokenizer import load_reference_tokenizer
from tests.unit_tests.preprocess.corpus import build, save_bpe, write_jsonl

ROOT = Path(__file__).parents[3]
TEXTS = [f"the quick brown fox number {n} jumps over the lazy dog {'again and ' * (n % 7)}\n" for n in range(60)]


def run(*args):
    command = [sys.executable, str(ROOT / "tools" / "inspect_data.py"), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TokenizerConfig(type="HuggingFaceTokenizer", model=str(save_bpe(tmp_path_factory.mktemp("bpe"))))


@pytest.fixture
def folder(tmp_path, tokenizer):
    rows = [{"text": text, "score": (7 * n % 60) / 60} for n, text in enumerate(TEXTS)]
    for number, part in enumerate((rows[:25], [*rows[25:], {"text": "", "score": 0}])):
        path = write_jsonl(tmp_path / f"{number}.jsonl", part)
        build([path], tmp_path / "web" / f"p{number}", tokenizer=tokenizer, score_keys=("score",), on_error="skip")
    return tmp_path / "web"


@pytest.fixture
def plan_file(folder):
    spec = {
        "seq_length": 16,
        "sources": {
            "web": {"shards": str(folder), "score": "score"},
            "part": {"shards": str(folder / "p0_text_document")},
        },
        "phases": [
            {"name": "one", "order": "shuffled", "sources": {"web": "all"}},
            {"name": "two", "order": "curriculum", "sources": {"web": "top 50%", "part": {"keep": "all", "repeat": 2}}},
        ],
    }
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


class _Page(HTMLParser):
    """Visible text of a page, and everything it would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.text, self.loaded, self._hidden = "", [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in ("script", "style")
        self.loaded += [value for name, value in attrs if name == "src" or (name == "href" and tag == "link")]

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        self.text += "" if self._hidden else data


def test_whole_shards_are_described_verified_and_sampled_with_exit_code_0(folder, tmp_path):
    page = tmp_path / "pages" / "web.html"
    done = run(folder, "--verify", "--samples", 3, "--html", page)
    assert done.returncode == 0, done.stderr
    for words in ("2 present, 0 missing", "nothing is wrong", "HuggingFaceTokenizer", "empty_document", "quick brown"):
        assert words in done.stdout, words
    assert f"{sum(open_source('w', str(folder)).lengths(np.arange(60))):,}" in done.stdout
    shown = _Page(page.read_text(encoding="utf-8"))
    assert shown.loaded == []
    for words in ("empty_document", "quick brown", "every byte verified", "documents by score"):
        assert words in page.read_text(encoding="utf-8"), words
    assert "Score: score" in shown.text
    assert [path.name for path in page.parent.iterdir()] == ["web.html"]


def test_damage_gives_exit_code_1_and_is_named_in_tables_json_and_page(folder, tmp_path):
    path = folder / "p0_text_document.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    (folder / "<b>.partial").touch()
    assert run(folder / "p1_text_document", "--verify").returncode == 0
    page = tmp_path / "page.html"
    done = run(folder, "--verify", "--json", "--html", page)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: findings: 2, listed above" in done.stderr
    (source,) = json.loads(done.stdout)["sources"]
    assert {(row["kind"], Path(row["file"]).name) for row in source["findings"]} == {
        ("checksum", path.name), ("leftover", "<b>.partial"),
    }  # fmt: skip
    shown = _Page(page.read_text(encoding="utf-8"))
    assert "<b>.partial" in shown.text, "a file's name must not become markup"
    assert "bits have flipped" in shown.text


def test_json_is_the_description_and_nothing_else(folder):
    done = run(folder, "--json")
    assert done.returncode == 0, done.stderr
    (source,) = json.loads(done.stdout)["sources"]
    assert source["documents"] == 60
    assert source["manifests"]["skipped"] == {"empty_document": 1}


def test_infinite_scores_are_described_without_breaking_the_json(folder, tmp_path):
    np.save(folder / "p0_text_document.scores.wild.npy", np.array([np.inf, -np.inf, *range(23)], np.float32))
    np.save(folder / "p1_text_document.scores.wild.npy", np.linspace(0, 1, 35, dtype=np.float32))
    done = run(folder, "--json", "--score", "wild", "--samples", 2, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    wild = json.loads(done.stdout, parse_constant=pytest.fail)["sources"][0]["scores"]["wild"]
    assert (wild["quantiles"]["0"], wild["quantiles"]["1"], wild["count"]) == ("-inf", "inf", 60)


def test_documents_are_drawn_from_the_worst_to_the_best_and_decoded(folder, tokenizer):
    told = inspect_sources([str(folder)], InspectionOptions(documents=5, characters=0, quiet=True))["sources"][0]
    rows = told["document_samples"]
    scores = [row["scores"]["score"]["score"] for row in rows]
    assert scores == sorted(scores)
    assert (scores[0], scores[-1]) == (0, pytest.approx(59 / 60))
    for row in rows:
        original = TEXTS[row["document"] + (25 if "p1_" in row["shard"] else 0)]
        assert (row["text"], row["cut"]) == (original, False)
        assert row["scores"]["score"]["above"] == pytest.approx(row["scores"]["score"]["score"], abs=0.03)
        assert row["tokens"] == len(load_reference_tokenizer(tokenizer).encode([original]).tokens)


def test_a_long_text_is_cut_and_said_to_be(folder):
    told = inspect_sources([str(folder)], InspectionOptions(documents=2, characters=10, quiet=True))["sources"][0]
    assert [(len(row["text"]), row["cut"]) for row in told["document_samples"]] == [(10, True)] * 2


def test_a_sample_of_a_plan_is_decoded_with_all_its_documents(plan_file, tokenizer):
    order = CurriculumDataset(Plan.load(plan_file))
    told = inspect_samples(plan_file, [f"0-{len(order) - 1}"], InspectionOptions(characters=0, quiet=True))
    encode = load_reference_tokenizer(tokenizer).encode
    assert [row["sample"] for row in told["samples"]] == list(range(len(order)))
    for row in told["samples"]:
        origin = order.provenance(row["sample"])
        assert (row["phase"], row["source"], row["pass"]) == (origin.phase, origin.source, origin.pass_number)
        ids = []
        for segment in row["segments"]:
            original = TEXTS[segment["document"] + (25 if "p1_" in segment["shard"] else 0)]
            tokens = encode([original]).tokens[segment["start"] : segment["stop"]].tolist()
            assert segment["text"] in original
            ids += tokens
        assert ids == order[row["sample"]]["tokens"].tolist()
    assert {row["phase"] for row in told["samples"]} == {"one", "two"}


def test_samples_are_printed_by_number_and_range_with_their_origin(plan_file):
    done = run("--plan", plan_file, "--sample", 3, "5-6")
    assert done.returncode == 0, done.stderr
    assert [f"sample {n}: phase one, source web, pass 1, score quantiles" in done.stdout for n in (3, 4, 5, 6)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert "p0_text_document document" in done.stdout
    told = json.loads(run("--plan", plan_file, "--sample", 3, "--json").stdout)
    assert told["fingerprint"] == Plan.load(plan_file).fingerprint


def test_every_source_of_a_plan_is_described(plan_file, tmp_path):
    page = tmp_path / "plan.html"
    told = inspect_sources(plan_file, InspectionOptions(quiet=True, page=page))["sources"]
    assert [(row["name"], row["shards"]) for row in told] == [("web", 2), ("part", 1)]
    assert "What 2 sources hold" in _Page(page.read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "give SHARDS, or --plan"),
        (("web", "--plan", "p"), 2, "give SHARDS, or --plan"),
        (("web", "--sample", "1"), 2, "--sample needs --plan"),
        (("--plan", "plan.yaml", "--sample", "1", "--verify"), 2, "without it"),
        (("web", "--vocab-size", "5"), 2, "--verify; add it"),
        (("web", "--samples", "-1"), 2, "at least 0"),
        (("web", "--tokenizer-model", "x"), 2, "--tokenizer-model needs --tokenizer-type"),
        (("nowhere*",), 1, "matches no .idx file"),
        (("web", "--score", "fun"), 2, "no shard has these scores (there: score)"),
        (("--plan", "plan.yaml", "--sample", "x"), 2, "--sample x: not a sample number"),
        (("--plan", "plan.yaml", "--sample", "5-3"), 2, "ranges ascend; write 3-5"),
        (("",), 1, "shards '': an empty name"),
        (("--plan", "plan.yaml", "--sample", "0-99999"), 1, "the plan has samples 0 to"),
        (("--plan", "gone.yaml"), 1, "gone.yaml"),
        (("web", "--samples", "1", "--tokenizer-type", "Llama2Tokenizer"), 1, "--tokenizer-model is missing"),
    ],
)
def test_wrong_usage_is_told_without_a_traceback(plan_file, monkeypatch, args, code, words):
    monkeypatch.chdir(plan_file.parent)
    done = run(*args)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert words in " ".join(done.stderr.split())


@pytest.mark.parametrize("named", [["gone"], ["gone/"], ["gone", "lost/part"], ["gone/*"]])
def test_what_is_not_there_is_an_error_in_one_sentence(tmp_path, monkeypatch, capsys, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match=r"no such directory|matches no \.idx file") as caught:
        inspect_sources(named, InspectionOptions())
    assert str(tmp_path) in str(caught.value)
    assert "".join(capsys.readouterr()) == ""


def test_one_of_each_is_told_in_the_singular(tmp_path, tokenizer, capsys):
    path = write_jsonl(tmp_path / "one.jsonl", [{"text": "fox", "score": 1.0}])
    build([path], tmp_path / "one", tokenizer=tokenizer, score_keys=("score",))
    page = tmp_path / "page.html"
    inspect_sources([str(tmp_path / "one_text_document")], InspectionOptions(verify=True, documents=1, page=page))
    said = capsys.readouterr().out + page.read_text().partition("<script")[0]
    assert "uint16 in 1 shard" in said
    assert re.findall(r"(?<![\d.,])1 (?:shard|document|token|row|file|sequence|byte|sample)s\b", said) == []


def test_missing_shards_do_not_hide_the_rest(folder):
    (folder / "p0_text_document.bin").unlink()
    done = run(folder, "--samples", 2)
    assert done.returncode == 1
    assert "35" in done.stdout
    assert "p0_text_document.bin does not exist" in " ".join(done.stdout.split())
