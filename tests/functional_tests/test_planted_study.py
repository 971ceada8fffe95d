"""examples/quantile/run.sh as a user starts it: the planted difference is found, the blind score claims nothing, and
the specialist is kept.

Its size is the example's own, because that is what the page tells; about five minutes on two cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]


def test_the_report_finds_the_planted_difference_and_refuses_to_claim_the_other(tmp_path: Path) -> None:
    for name in ("examples", "tools"):  # the script works in the folder that these lie in
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = ["bash", str(tmp_path / "examples" / "quantile" / "run.sh")]
    finished = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    study = tmp_path / "runs" / "quantile" / "study"
    report = json.loads((study / "report.json").read_text())
    claims = {trend["source"]: trend["claim"] for trend in report["trends"] if trend["score"] == "overall"}
    assert claims == {"graded": "rises", "blind": "none", "code": "none"}, report["conclusions"]
    assert report["runs"] == 27
    assert not report["refusals"]
    best = yaml.safe_load((study / "proposed_plan.yaml").read_text())["phases"][-1]["sources"]
    assert "code" in best, report["proposal"]
    assert best["graded"]["keep"].startswith("top ")
