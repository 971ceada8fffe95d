"""`tools/report_run.py` as a user runs it: its tables, JSON, page and exit codes."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_kaiyuan.reporting.run_report import report_runs
from tests.unit_tests.reporting.run_files import entry, write_run

ROOT = Path(__file__).parents[3]
HOSTILE = "</script><script>alert(1)</script>"


def run(*args):
    command = [sys.executable, str(ROOT / "tools" / "report_run.py"), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


class _Page(HTMLParser):
    """Visible text of a page, its tags, and everything it would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.text, self.loaded, self.scripts, self._hidden = "", [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in ("script", "style")
        self.scripts += tag == "script"
        self.loaded += [value for name, value in attrs if name == "src" or (name == "href" and tag == "link")]

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        self.text += "" if self._hidden else data


@pytest.fixture
def folder(tmp_path):
    peaks = {"embedding": 2.0, "decoder.layers.0": 16.0}
    lines = [entry(step, **({"activations": peaks} if step % 5 == 0 else {})) for step in range(1, 21)]
    return write_run(tmp_path / "first", lines)


def test_the_tool_prints_the_headline_and_writes_the_page_beside_the_run(folder):
    finished = run(folder)
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"first\s+│\s+20 │\s+5.12k │\s+4\.0000", finished.stdout)
    assert str(folder / "report.html") in finished.stderr
    page = _Page((folder / "report.html").read_text())
    assert page.loaded == []
    for text in ("Run first", "20steps", "4,090 x", "What it was fed", "Activations and FP16"):
        assert text in page.text


def test_json_is_one_object_for_each_run(folder, tmp_path):
    other = write_run(tmp_path / "second", [entry(1, sources={})])
    finished = run(folder, other, "--json", "--html", tmp_path / "page.html")
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout)
    assert [(summary["run"], summary["steps"]) for summary in told] == [("first", 20), ("second", 1)]
    page = _Page((tmp_path / "page.html").read_text())
    assert "2 runs compared" in page.text
    assert "Loss by source" in page.text
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("arguments", [("missing",), ("first", "first"), ("first", "--html", "no/such/page.html")])
def test_mistakes_exit_with_1_and_name_the_remedy(folder, tmp_path, arguments):
    finished = run(*(tmp_path / word if not word.startswith("--") else word for word in arguments))
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr
    assert not (folder / "report.html").exists()


def test_no_run_is_bad_usage():
    assert run().returncode == 2


def test_the_page_never_replaces_the_metrics(folder):
    finished = run(folder, "--html", folder / "metrics.jsonl")
    assert finished.returncode == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20


def test_names_cannot_break_the_page(tmp_path):
    source = {"loss": 1.0, "tokens": 8, "bands": [1] * 10}
    clean, hostile = (
        write_run(tmp_path / place, [entry(1, sources={name: source}, activations={f"decoder.layers.{name}": None})])
        for place, name in (("clean", "web"), ("hostile", HOSTILE))
    )
    for folder in (clean, hostile):
        report_runs([folder], folder / "report.html")
    pages = [_Page((folder / "report.html").read_text()) for folder in (clean, hostile)]
    assert pages[0].scripts == pages[1].scripts


def test_runs_with_nothing_but_a_loss_still_get_a_page(tmp_path):
    bare = {"iteration": 4, "consumed_samples": 32, "loss": None}
    report_runs([write_run(tmp_path, [bare])], tmp_path / "report.html")
    assert "line without a finite loss" in _Page((tmp_path / "report.html").read_text()).text
