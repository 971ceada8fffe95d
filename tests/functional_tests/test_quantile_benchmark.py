"""The tool end to end with Megatron: slices, a run killed midway and continued, evaluation, report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.unit_tests.quantile.tiny_study import study_content, write_sources

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two quantiles of one source with one seed each: two runs of 30 steps."""
    folder = tmp_path_factory.mktemp("quantile")
    write_sources(folder, names=("good",))
    content = study_content(folder)
    content["sources"] = {"good": content["sources"]["good"]}
    content["slices"] |= {"tops": ["0%", "80%"], "tokens": 3840}
    content["training"] |= {"seeds": [4], "tokens": 30 * 8 * 32 * 2, "save_interval": 10}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(command: str, study: Path, *flags: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tools" / "quantile_benchmark.py"), command, str(study), *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=study.parent,
    )


def finish(command: str, study: Path, *flags: str, code: int = 0) -> str:
    process = start(command, study, *flags)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output[-4000:]
    return output


def fail(command: str, study: Path) -> str:
    output = finish(command, study, code=1)
    assert "Traceback" not in output
    return output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_a_study_from_slices_to_report_with_a_run_killed_midway(study: Path) -> None:
    output = finish("slice", study)
    assert "2 runs of 60 steps" in output
    folder = study.parent / "study"
    run = folder / "runs" / "good-top0-seed4"

    interrupted = start("train", study)
    wait_for(run / "checkpoints" / "latest_checkpointed_iteration.txt", interrupted)
    interrupted.send_signal(signal.SIGTERM)
    interrupted.communicate(timeout=90)
    assert interrupted.returncode == 130
    assert not (run / "run.json").exists()
    saved = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 10 <= saved < 60

    assert "2 trained" in finish("train", study, "--concurrent", "2")
    log = (run / "log.txt").read_text().rpartition("$ ")[2]
    steps = re.findall(r" iteration +(\d+)/ *60 \|", log)
    assert [int(steps[0]), int(steps[-1])] == [saved + 1, 60]
    assert "2 already finished" in finish("train", study)

    checkpoint = run / "checkpoints" / "iter_0000060"
    whole = {path: path.read_bytes() for path in checkpoint.glob("*.distcp")}
    for path in whole:
        path.write_bytes(b"torn")
    told = fail("evaluate", study)
    assert "1 run evaluated" in told
    assert "good-top0-seed4 could not be evaluated: " in told
    assert "error: 1 run could not be evaluated: good-top0-seed4; mend the cause" in told
    for path, content in whole.items():
        path.write_bytes(content)
    assert "1 run evaluated, 1 were up to date" in finish("evaluate", study)
    results = json.loads((folder / "results" / "good-top0-seed4.json").read_text())
    assert results["identity"]["tokens"] == 60 * 8 * 32
    # random tokens under 95 ids: after training on them, the model knows at best that all are equally likely
    nats = sum(results["held_out"]["clean"]["nats"]) / sum(results["held_out"]["clean"]["tokens"])
    assert nats == pytest.approx(4.55, abs=0.35)

    assert "No conclusion is drawn" in finish("report", study)
    assert (folder / "report.html").stat().st_size > 1_000_000
