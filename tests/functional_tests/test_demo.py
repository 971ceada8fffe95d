"""The whole demo with its tiny budget, as a user starts it: the last and longest of the tests."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def run_demo(output: Path) -> str:
    """Start the script; returns its output."""
    command = [sys.executable, "examples/demo/run_demo.py", "--quick", "--output", str(output)]
    environment = {**os.environ, "COLUMNS": "160"}
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of one quick demo."""
    output = tmp_path_factory.mktemp("demo") / "run"
    return output, run_demo(output)


def test_training_lowers_the_held_out_loss_of_every_domain(demo: tuple[Path, str]) -> None:
    untrained, last, average = json.loads((demo[0] / "evaluation.json").read_text())["results"]
    assert untrained["iteration"] == 0
    assert last["iteration"] == average["iteration"] == 40
    for name in ("code", "reference", "packages"):
        # an untrained model knows nothing of 1024 tokens: its loss is about their entropy
        assert untrained["sources"][name]["loss"] == pytest.approx(math.log(1024), abs=0.3)
        assert last["sources"][name]["loss"] < untrained["sources"][name]["loss"] - 0.4
        assert average["sources"][name]["loss"] < untrained["sources"][name]["loss"] - 0.4
        assert 0 < last["sources"][name]["bits_per_byte"] < 8


def test_the_loss_scaler_was_at_work(demo: tuple[Path, str]) -> None:
    _, text = demo
    assert "gradients overflowed" in text
    assert "no overflow for a whole window" in text


def test_the_report_names_every_result(demo: tuple[Path, str]) -> None:
    output, text = demo
    for part in ("Held-out loss", "Tokens seen per quality band", "Loss-scale history", "Generated with", "Wall time"):
        assert part in text
    for name in ("plan.html", "generated.txt", "averaged", "tensorboard", "logs/train.log", "release/README.md"):
        assert (output / name).exists()


def test_a_second_run_repeats_no_stage_and_prints_the_same_report(demo: tuple[Path, str]) -> None:
    output, text = demo
    again = run_demo(output)
    assert again.count("up to date, skipped") == 10
    cut = "Held-out loss"
    assert again[again.index(cut) : again.index("Wall time")] == text[text.index(cut) : text.index("Wall time")]
