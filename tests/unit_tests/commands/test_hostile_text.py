"""Nothing that others wrote moves the cursor: documents, names of files, keys, ids, sources, metrics, in any output."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from megatron_kaiyuan.commands.kaiyuan import VERBS
from megatron_kaiyuan.host import cli
from megatron_kaiyuan.host.cli import run_tool
from tests.unit_tests.preprocess.corpus import save_bpe, write_jsonl

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


def run(capsys: pytest.CaptureFixture[str], verb: str, *words: object) -> tuple[int, str]:
    """The exit code of a verb, and all that it said, which has no raw control character."""
    sys.argv = [f"kaiyuan {verb}", *map(str, words)]
    try:
        code = run_tool(lambda: import_module(f"megatron_kaiyuan.commands.{VERBS[verb][0]}").main())
    except SystemExit as left:  # of argparse
        code = int(left.code or 0)
    said = "".join(capsys.readouterr())
    assert RAW.findall(said) == [], said
    return code, said


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A shard whose text, ids, file names and score key are hostile, and a plan over it."""
    monkeypatch.setattr(sys, "argv", [])
    rows = [{"text": f"{EVIL} {number}" * 20, f"q{EVIL}": number / 9, "id": f"{EVIL}{number}"} for number in range(40)]
    write_jsonl(tmp_path / f"in{EVIL}.jsonl", [*rows, {"text": 3, f"q{EVIL}": EVIL}])
    code, said = run(
        capsys, "preprocess", "--input", tmp_path / f"in{EVIL}.jsonl", "--output-prefix", tmp_path / "out",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", save_bpe(tmp_path / "bpe"),
        "--score-key", f"q{EVIL}", "--on-error", "skip", "--workers", 1, "--append-eod",
    )  # fmt: skip
    assert code == 0, said
    return tmp_path


def test_shards_are_shown_with_their_text_visible(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "inspect", corpus / "out_text_document", "--samples", 3, "--verify")
    assert code == 0, said
    assert "\\x1b[2J" in said
    for more in (["--json"], ["--score", EVIL]):
        run(capsys, "inspect", corpus / "out_text_document", *more)
    run(capsys, "rank", corpus / "out_text_document", "--score", f"q{EVIL}")
    run(capsys, "rank", corpus / "out_text_document", "--score", f"none{EVIL}")


def test_a_plan_with_hostile_names_is_shown_or_refused_visibly(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", f"a{EVIL}"):
        plan = {
            "seq_length": 16,
            "sources": {name: {"shards": str(corpus / "out_text_document"), "domain": f"d{EVIL}"}},
            "phases": [{"name": f"p{EVIL}", "order": "shuffled", "sources": {name: "all"}}],
        }
        (corpus / "plan.yaml").write_text(yaml.safe_dump(plan, allow_unicode=False))
        run(capsys, "plan", corpus / "plan.yaml", "--plot", corpus / "plan.html")
        run(capsys, "inspect", "--plan", corpus / "plan.yaml", "--sample", 3)
        run(capsys, "inspect", "--plan", corpus / "plan.yaml", "--verify")
    (corpus / "plan.yaml").write_text(f'"{EVIL.encode("unicode_escape").decode()}": [')
    code, said = run(capsys, "plan", corpus / "plan.yaml")
    assert code == 1, said


def test_a_manifest_that_somebody_has_written_over_is_refused_visibly(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = corpus.glob("out*.json")
    manifest = json.loads(path.read_text())
    for change in ({EVIL: 1}, dict.fromkeys(manifest, EVIL)):
        path.write_text(json.dumps(manifest | change))
        run(capsys, "inspect", corpus / "out_text_document", "--verify")
        run(capsys, "rank", corpus / "out_text_document", "--score", f"q{EVIL}")


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"train", "doctor"}))
def test_a_path_that_is_not_there_is_named_visibly(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    code, said = run(capsys, verb, tmp_path / f"none{EVIL}")
    assert code != 0
    assert "Traceback" not in said
    assert run(capsys, verb, tmp_path, f"--flag{EVIL}")[0] != 0


def test_metrics_of_another_run_are_reported_visibly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    line = {"iteration": 1, "consumed_samples": 4, "loss": 2.0, "sources": {EVIL: {"loss": 2.0, "tokens": 64}}}
    folder = tmp_path / f"run{EVIL}"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    run(capsys, "report", folder)
    (folder / "metrics.jsonl").write_text(json.dumps(EVIL) + "\n{" + EVIL)
    run(capsys, "report", folder)


def test_no_command_prints_past_the_function_that_shows_control_characters() -> None:
    folder = Path(cli.__file__).parents[1] / "commands"
    against = [
        f"{path.name}:{number}"
        for path in sorted(folder.glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"(?<![\w.])print\(|argparse\.ArgumentParser\(", line)
    ]
    assert against == []


def test_counts_are_in_words() -> None:
    """`1 shard`, not `1 shard(s)`."""
    package = Path(cli.__file__).parents[1]
    assert [path.name for path in package.rglob("*.py") if re.search(r"[a-z]{3}\(s\)", path.read_text())] == []
