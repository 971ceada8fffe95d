"""What a call of the quantile study does when a step fails or its time is over; no model is trained."""

import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from megatron_kaiyuan.errors import StudyError
from studies import quantile_study
from studies.quantile_study import forget_unfinished, together, worth_packing

TOOL = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
child.wait()
"""


def test_a_command_whose_time_is_over_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, told = tmp_path / "tool.py", tmp_path / "child.txt"
    tool.write_text(TOOL)
    began = time.monotonic()
    with pytest.raises(StudyError, match="stopped after 5 s"):
        together([str(tool), str(told)], seconds=5.0)
    assert time.monotonic() - began < 40
    assert not psutil.pid_exists(int(told.read_text()))


def test_a_failure_is_told_and_nothing_starts_without_time(tmp_path: Path) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text("import sys; sys.exit(3 if 'bad' in sys.argv else 0)")
    together([str(tool), "good"])
    with pytest.raises(StudyError, match=r"failed with exit codes \[0, 3\]"):
        together([str(tool), "good"], [str(tool), "bad"])
    with pytest.raises(StudyError, match="no time is left"):
        together([str(tool), "good"], seconds=0.0)


def test_what_is_finished_is_evaluated_and_packed_after_training_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, archive = tmp_path / "study.yaml", tmp_path / "packed.tgz"
    study.write_text(f"output: {tmp_path}/data/study\ntraining: {{}}\n")
    (tmp_path / "data" / "study").mkdir(parents=True)
    seen: list[tuple[str, float]] = []

    def stand_in(*commands: Sequence[str], seconds: float) -> None:
        stage = commands[0][1]
        seen.append((stage, seconds))
        if stage == "train":
            raise StudyError("train: stopped")
        (tmp_path / "data" / "study" / stage).write_text("done")

    monkeypatch.setattr(quantile_study, "DATA", tmp_path)
    (tmp_path / "shards").mkdir()
    monkeypatch.setattr(quantile_study, "together", stand_in)
    monkeypatch.setattr(quantile_study, "runs_without_results", lambda _study: ["code-top30-seed1"])
    monkeypatch.setattr(sys, "argv", ["", "--study", str(study), "--tar", str(archive), "--minutes", "9"])
    with pytest.raises(StudyError, match="train: stopped\n1 runs have no results: code-top30-seed1"):
        quantile_study.main()
    assert [stage for stage, _ in seen][:3] == ["slice", "train", "evaluate"]
    of_train, of_evaluation = seen[1][1], seen[2][1]
    assert of_train == pytest.approx(540 - 120 - quantile_study.GRACE_SECONDS, abs=5)
    assert of_evaluation == pytest.approx(540, abs=5)
    with tarfile.open(archive) as packed:
        assert "study/evaluate" in packed.getnames()


def test_records_of_runs_that_were_not_evaluated_stay_behind(tmp_path: Path) -> None:
    """Elsewhere their checkpoints are missing: such a run must be trained again."""
    for name in ("runs/a/run.json", "runs/b/run.json", "runs/b/log.txt", "runs/a/checkpoints/x", "results/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    packed = {str(path.relative_to(tmp_path)) for path in worth_packing(tmp_path) if path.is_file()}
    assert packed == {"runs/a/run.json", "runs/b/log.txt", "results/a.json"}


@pytest.mark.parametrize(("flags", "left"), [("[--no-save-optim]", {"a"}), ("[]", {"a", "b"})])
def test_weights_that_no_run_can_go_on_from_are_removed(tmp_path: Path, flags: str, left: set[str]) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"training: {{flags: {flags}}}\n")
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text("{}")
    forget_unfinished(study, tmp_path)
    assert {path.parent.name for path in tmp_path.glob("runs/*/checkpoints")} == left
