"""The page of a run in a real browser: it draws every figure, offline and without an error of its scripts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.reporting.run_report import report_runs
from tests.functional_tests.training_run import train_well, write_corpus
from tests.unit_tests.reporting.run_files import entry, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium (apt-get install chromium)")

WATCH = """<script>window.failures = [];
addEventListener("error", event => failures.push(event.message || event.target.src));
addEventListener("load", () => setTimeout(() => {
  document.body.dataset.failures = failures.join("; ") || "none";
  document.body.dataset.drawn = [...document.querySelectorAll(".plotly-graph-div")]
      .map(plot => plot.querySelectorAll(".scatterlayer .trace, .heatmaplayer .hm").length).join(",");
}, 500));</script>"""


def opened(page: Path, profile: Path) -> str:
    """The document after its scripts ran, in a browser that reaches nothing."""
    watched = page.with_name("watched.html")
    watched.write_text(page.read_text().replace("<head>", f"<head>{WATCH}", 1))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--proxy-server=127.0.0.1:9", "--window-size=1240,2000", "--virtual-time-budget=8000", "--dump-dom"]
    finished = subprocess.run([*command, watched.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return finished.stdout


def drawn(document: str) -> list[int]:
    """Traces of each figure; none may have failed."""
    failures = re.search(r'data-failures="([^"]*)"', document)
    assert failures is not None, "the page did not finish loading"
    assert failures[1] == "none"
    counts = re.search(r'data-drawn="([^"]*)"', document)
    assert counts is not None
    return [int(count) for count in counts[1].split(",")]


@needs_browser
def test_a_real_run_is_drawn_with_its_plan(tmp_path: Path) -> None:
    plan = write_corpus(tmp_path)
    flags = ("--fp16", "--initial-loss-scale", str(2**24), "--kaiyuan-activation-interval", "2")
    train_well(tmp_path, "--plan", str(plan), "--save", "saved", "--save-interval", "6", *flags)
    page = tmp_path / "report.html"
    (told,) = report_runs([tmp_path / "saved"], page, plan)
    description = Plan.load(plan).describe()
    assert told["tokens"] == told["planned_tokens"] == description["tokens"]
    assert told["skipped_steps"] > 0
    for name, source in told["sources"].items():
        assert source["tokens"] == description["sources"][name]["tokens_seen"] == source["expected_tokens"]
    curves, activations, sources, bands = drawn(opened(page, tmp_path / "profile"))
    # two lines for each source and all of them, four quantities, the skipped steps
    assert curves == 2 * 3 + 4 + 1
    assert activations == 2
    assert sources == 2 * 2
    assert bands == 2 * 10


@needs_browser
def test_runs_that_went_wrong_are_drawn_side_by_side(tmp_path: Path) -> None:
    peaks: dict[str, float | None] = {"embedding": 1.0, "decoder.layers.0": None}
    wrong = [entry(step, loss_scale=2.0**step, skipped_steps=1) for step in range(1, 8)]
    wrong += [entry(8, sources={}, loss=None, grad_norm=None, activations=peaks), '{"iteration": 9, "con', entry(5)]
    runs = [write_run(tmp_path / "wrong", wrong), write_run(tmp_path / "bare", [entry(1, sources={})])]
    report_runs(runs, tmp_path / "report.html")
    counts = drawn(opened(tmp_path / "report.html", tmp_path / "profile"))
    assert len(counts) == 1 + 2 + 1 + 1  # curves, the loss of two sources, what one run was fed, its bands
    assert all(counts)
