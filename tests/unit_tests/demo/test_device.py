"""How many processes the demo starts where, and what it says when a stage fails."""

import sys
from pathlib import Path

import device
import pytest
from commands import CommandFailed, baseline_command, run_command, training_command
from settings import FULL, QUICK

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAIYUAN_DEVICE", "")  # so that what the demo sets is undone
    monkeypatch.delenv("KAIYUAN_DEVICE")


def place(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: gpus > 0)
    monkeypatch.setattr(device, "_ask", lambda _root: device._Found(f"device: {gpus} visible GPUs, NVIDIA H200", gpus))


@pytest.mark.parametrize(
    ("gpus", "processes", "micro_batch"), [(1, 1, 8), (2, 2, 8), (3, 2, 8), (4, 4, 4), (8, 8, 2), (12, 8, 2)]
)
def test_each_process_has_a_gpu_and_an_equal_part_of_the_batch(
    gpus: int, processes: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, gpus)
    settings, said = device.placed(FULL, None, ROOT)
    assert (settings.device, settings.processes, settings.micro_batch) == ("cuda", processes, micro_batch)
    assert FULL.global_batch % (processes * micro_batch) == 0
    assert said.startswith(f"device: {gpus} visible GPUs, NVIDIA H200: ")
    assert ("one process" in said) == (processes == 1)
    assert ("cannot be shared among more" in said) == (processes < gpus)
    paths = {name: Path(name) for name in ("plan", "checkpoints", "tensorboard")}
    for command in (training_command(settings, **paths, save_interval=1), baseline_command(settings, 256)):
        assert command[command.index("--nproc-per-node") + 1] == str(processes)


def test_without_a_gpu_two_processes_share_the_cpu_and_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(device, "_ask", lambda _root: pytest.fail("torch takes seconds"))
    assert device.placed(QUICK, None, ROOT) == (QUICK, "device: CPU (this machine shows no GPU): 2 processes")


def test_the_cpu_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real child process, on this machine."""
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    settings, said = device.placed(QUICK, "cpu", ROOT)
    assert settings == QUICK
    assert said == "device: CPU (NO GPU IS USED: KAIYUAN_DEVICE=cpu asks for that): 2 processes"


def test_a_gpu_that_cannot_be_used_ends_the_demo_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"error: (KAIYUAN_DEVICE=cuda, and this machine shows no|this machine has an) NVIDIA GPU"  # it is hidden
    with pytest.raises(device.DeviceRefused, match=said):
        device.placed(QUICK, "cuda", ROOT)


def test_a_stage_that_fails_shows_the_line_that_matters_and_its_log(tmp_path: Path) -> None:
    code = "for number in range(999): print(number)\nraise ValueError('the reason')"
    with pytest.raises(CommandFailed) as told:
        run_command([sys.executable, "-c", code], ROOT, tmp_path / "stage.log")
    assert str(told.value).splitlines() == [
        "ValueError: the reason",
        f"command failed (exit code 1); all of its output is in {tmp_path / 'stage.log'}",
    ]
    with pytest.raises(CommandFailed, match="40\n41\ncommand failed"):
        run_command([sys.executable, "-c", "[print(n) for n in range(42)]; exit(3)"], ROOT, tmp_path / "other.log")
