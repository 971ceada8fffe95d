"""What a call of the stability benchmark keeps, repeats and refuses; a stand-in trains."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.errors import StudyError
from studies import fp16_stability
from studies.fp16_stability import Batch, Run, chosen_runs, parsed_arguments, save
from studies.fp16_stability_report import RunRecord, print_over_seeds

LINE = {"iteration": 10, "loss": 5.0, "loss_scale": 1.0, "skipped_steps": 0}
SAYS = {
    "ours": f"print({json.dumps(LINE)!r})",
    "stock": "import sys; sys.exit('TrainingStopped: 40 steps in a row were skipped, the loss scale is down to 1')",
    "nocap": "import sys; sys.exit('TrainingStopped: 40 of the last 80 steps were skipped with the loss scale at its')",
    "bf16": "import sys; sys.exit('ImportError: broken')",
    "noqk": "import time; time.sleep(100)",
}


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    options = ["--out", str(tmp_path / "out"), "--variants", ",".join(SAYS), "--rates", "0.1", "--smoke"]
    monkeypatch.setattr(sys, "argv", ["", *options, "--tar", str(tmp_path / "out.tgz"), "--limit", "60"])
    return parsed_arguments()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Variants in the order in which they were started."""
    seen: list[str] = []
    original = subprocess.Popen

    def stand_in(command: list[str], **options: Any) -> Any:
        metrics = Path(command[command.index("--kaiyuan-metrics") + 1])
        key = metrics.parent.name.split("_")[0]
        seen.append(key)
        if key == "ours":
            metrics.write_text(json.dumps(LINE) + "\n")
        return original([sys.executable, "-c", SAYS[key]], **options)

    monkeypatch.setattr("studies.fp16_stability.subprocess.Popen", stand_in)
    return seen


def trained(args: argparse.Namespace, after_each: Callable[[], object] = lambda: None, seconds: float = 2.0) -> Batch:
    args.plan, args.run_seconds = Path("plan.yaml"), seconds
    batch = Batch(args, after_each)
    batch.train(chosen_runs(args))
    return batch


def test_ended_runs_are_kept_and_broken_or_stopped_ones_repeated(args: argparse.Namespace, started: list[str]) -> None:
    trained(args)
    assert sorted(started) == sorted(SAYS)
    started.clear()
    trained(args)
    assert sorted(started) == ["bf16", "noqk"]


def test_a_finished_run_of_other_settings_is_refused(args: argparse.Namespace, started: list[str]) -> None:
    trained(args)
    args.steps += 1
    with pytest.raises(StudyError, match="name another --out"):
        trained(args)


def test_numbers_and_archive_are_written_after_every_run(args: argparse.Namespace, started: list[str]) -> None:
    numbers, runs = args.out / "stability.json", chosen_runs(args)
    written: list[tuple[int, bool]] = []

    def after_each() -> None:
        save(runs, args)
        written.append((len(json.loads(numbers.read_text())), args.tar.is_file()))

    args.together = 1
    trained(args, after_each)
    assert len(written) == len(SAYS)
    assert all(packed for _, packed in written)
    assert written[-1][0] == 1, "one run has lines"


def test_nothing_is_started_that_cannot_end(args: argparse.Namespace, started: list[str]) -> None:
    batch = Batch(args, lambda: None, longest=61.0)
    batch.train(chosen_runs(args))
    assert started == []


def test_a_machine_without_plotly_still_reports(
    args: argparse.Namespace, started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.setattr(fp16_stability, "parsed_arguments", lambda: args)
    args.variants = "ours"
    fp16_stability.main()
    assert "--report-only" in capsys.readouterr().out
    assert (args.out / "stability.json").is_file()
    args.variants, args.report_only = "ours,bf16", True
    with pytest.raises(StudyError, match=r"no line of bf16_0\.1_11"):
        fp16_stability.main()


def test_the_default_fits_78_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [""])
    assert parsed_arguments().together == 8


def test_ranges_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """Of three seeds one was stopped early and one has no finite loss at its end."""
    ends = [(600, 3.0, 0, 100.0), (600, 3.5, 2, 1000.0), (70, None, 30, None)]
    records = [
        RunRecord("ours", "ours, FP16", 0.1, seed, [LINE | {"iteration": step, "loss": loss, "skipped_steps": skipped,
                                                    "loss_scale": 1.0, "activations": {"layer": peak}}])
        for seed, (step, loss, skipped, peak) in enumerate(ends)
    ]  # fmt: skip
    print_over_seeds(records)
    [row] = [line for line in capsys.readouterr().out.splitlines() if "ours, FP16" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[2:5] == ["2 of 3", "70 to 600", "3.000 to 3.500; 1 without"]
    assert cells[7:10] == ["0 to 30", "0 to 2", "65.5 to 655; 1 without"]
    print_over_seeds([])
    assert not capsys.readouterr().out


def test_the_mean_over_the_seeds_has_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    """+2 % and 0 % to bf16: 1 % on average, and 12.71 (Student, one degree of freedom) x 1 % on both sides."""
    losses = {("ours", 1): 3.06, ("bf16", 1): 3.0, ("ours", 2): 3.0, ("bf16", 2): 3.0}
    records = [
        RunRecord(key, f"{key}, half", 0.1, seed, [LINE | {"iteration": 600, "loss": loss}])
        for (key, seed), loss in losses.items()
    ]
    print_over_seeds(records)
    rows = [line for line in capsys.readouterr().out.splitlines() if "half" in line]
    assert [row.strip("│").split("│")[6].strip() for row in rows] == ["+1.00% ± 12.71%", "-"]


def test_the_large_shape_is_that_of_the_launch_script() -> None:
    """Every flag of it, with the same value, as far as the script has it; what it adds is of this benchmark."""
    script = shlex.split((fp16_stability.ROOT / "examples/pretrain_kaiyuan_2b.sh").read_text(), comments=True)
    # The script derives the rows of the vocabulary from its tokenizer.
    own = {"--micro-batch-size", "--global-batch-size", "--tokenizer-type", "--vocab-size", "--padded-vocab-size"}
    flags = fp16_stability.KAIYUAN_2B
    names = [flag for flag in flags if flag.startswith("--") and flag not in own]
    assert len(names) > 10
    for name in names:
        value = flags[flags.index(name) + 1] if flags.index(name) + 1 < len(flags) else "--"
        assert name in script
        if not value.startswith("--"):
            assert script[script.index(name) + 1] == value, name


def test_runs_are_compared_by_their_flags(args: argparse.Namespace) -> None:
    one, two = (Run(run.variant, run.rate, seed, run.place) for run in chosen_runs(args)[:1] for seed in (11, 12))
    assert one.setting(args) != two.setting(args)
    assert str(args.out) not in " ".join(one.setting(args))
