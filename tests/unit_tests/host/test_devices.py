"""Which device is chosen and said, and which machines are refused in one sentence before any model is built."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_kaiyuan.errors import ConfigError, DeviceError
from megatron_kaiyuan.host import devices, machine

H200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
HAS, HAS_NOT = True, False


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing asked for, no CPU platform (none is installed either), one rank, and a torch with CUDA."""
    for name in ("KAIYUAN_DEVICE", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices.cpu_platform, "is_installed", lambda: False)
    monkeypatch.setattr(devices.cpu_platform, "install", lambda: not torch.cuda.is_available())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)
    monkeypatch.setattr(devices.machine, "has_gpu", lambda: HAS_NOT)
    return monkeypatch


def give_gpus(host: pytest.MonkeyPatch, *gpus: SimpleNamespace) -> None:
    host.setattr(torch.cuda, "is_available", lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != "")
    host.setattr(torch.cuda, "device_count", lambda: len(gpus))
    host.setattr(torch.cuda, "get_device_properties", lambda number: gpus[number])


def test_a_machine_without_a_gpu_computes_on_the_cpu_and_says_so(host: pytest.MonkeyPatch) -> None:
    assert devices.start_device() == "device: CPU (this machine shows no GPU)"


def test_a_gpu_is_used_where_there_is_one(host: pytest.MonkeyPatch) -> None:
    give_gpus(host, H200)
    assert devices.start_device() == "device: 1 visible GPU, NVIDIA H200 (139 GiB)"
    give_gpus(host, H200, SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30))
    host.setenv("LOCAL_WORLD_SIZE", "2")
    host.setenv("LOCAL_RANK", "1")
    assert devices.start_device() == "device: 2 visible GPUs, NVIDIA H100 (80 GiB)"


def test_the_cpu_that_is_asked_for_is_used_and_said_aloud_where_there_is_a_gpu(host: pytest.MonkeyPatch) -> None:
    give_gpus(host, H200)
    host.setattr(devices.machine, "has_gpu", lambda: HAS)
    host.setenv("KAIYUAN_DEVICE", "cpu")
    assert devices.start_device() == "device: CPU (NO GPU IS USED: KAIYUAN_DEVICE=cpu asks for that)"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_an_unknown_device_is_refused(host: pytest.MonkeyPatch) -> None:
    host.setenv("KAIYUAN_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="KAIYUAN_DEVICE=gpu is unknown; give cpu or cuda"):
        devices.start_device()


def test_a_gpu_that_was_asked_for_and_is_not_there_is_refused(host: pytest.MonkeyPatch) -> None:
    host.setenv("KAIYUAN_DEVICE", "cuda")
    with pytest.raises(ConfigError, match="KAIYUAN_DEVICE=cuda, and this machine shows no NVIDIA GPU"):
        devices.start_device()


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", " "])
def test_a_gpu_that_is_hidden_is_not_replaced_by_the_cpu(host: pytest.MonkeyPatch, visible: str) -> None:
    host.setattr(devices.machine, "has_gpu", lambda: HAS)
    host.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=f"cannot use: CUDA_VISIBLE_DEVICES='{visible}' hides it; unset that") as told:
        devices.start_device()
    assert str(told.value).endswith("or set KAIYUAN_DEVICE=cpu to compute on the CPU")


@pytest.mark.parametrize("visible", [None, "0", "1,0", "GPU-3f2a", "MIG-77aa"])
def test_a_gpu_whose_driver_does_not_start_is_told_with_the_drivers_reason(
    host: pytest.MonkeyPatch, visible: str | None
) -> None:
    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by "
            "downloading and installing a new version from the URL: ..."
        )

    host.setattr(devices.machine, "has_gpu", lambda: HAS)
    host.setattr(torch.cuda, "init", init)
    if visible is not None:
        host.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError) as told:
        devices.start_device()
    assert str(told.value) == (
        "this machine has an NVIDIA GPU that torch cannot use: The NVIDIA driver on your system is too old (found "
        f"version 12020); torch {torch.__version__} needs a driver for CUDA 13.0, or set KAIYUAN_DEVICE=cpu to compute "
        "on the CPU"
    )


def test_a_torch_without_cuda_on_a_machine_with_a_gpu_is_refused(host: pytest.MonkeyPatch) -> None:
    host.setattr(devices.machine, "has_gpu", lambda: HAS)
    host.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="was built without CUDA; install a build with it, or set KAIYUAN_DEVICE=cpu"):
        devices.start_device()


def test_more_ranks_than_gpus_are_refused_on_every_rank(host: pytest.MonkeyPatch) -> None:
    give_gpus(host, H200)
    host.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in "01":
        host.setenv("LOCAL_RANK", rank)
        with pytest.raises(ConfigError, match=r"2 processes .* 1 GPU is visible: give torchrun --nproc-per-node 1"):
            devices.start_device()


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((9, 0), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # machine code for 8.6 runs on 8.9
        ((7, 0), CUDA_13, False),  # a V100 is older than all of them
        ((6, 1), ["sm_50", "sm_60", "sm_70"], True),
        ((10, 3), ["sm_90", "sm_100a", "compute_90"], True),
        ((12, 1), ["sm_90", "compute_90"], True),  # PTX is compiled for what comes later
        ((12, 1), ["sm_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),  # a build that does not say
    ],
)
def test_a_gpu_that_torch_was_not_compiled_for_is_refused(
    host: pytest.MonkeyPatch, capability: tuple[int, int], compiled: list[str], runs: bool  # noqa: FBT001
) -> None:  # fmt: skip
    major, minor = capability
    give_gpus(host, SimpleNamespace(name="NVIDIA Model", major=major, minor=minor, total_memory=16 * 2**30))
    host.setattr(torch.cuda, "get_arch_list", lambda: compiled)
    if runs:
        assert "NVIDIA Model" in devices.start_device()
        return
    with pytest.raises(ConfigError, match=f"GPU 0, NVIDIA Model, has compute capability {major}.{minor}, and torch"):
        devices.start_device()


def test_a_model_that_cannot_fit_is_refused_with_what_is_there(host: pytest.MonkeyPatch) -> None:
    give_gpus(host, H200)
    host.setattr(torch.cuda, "mem_get_info", lambda _device: (10 * 2**30, 24 * 2**30))
    devices.require_memory(10 * 2**30, "weights", "use more GPUs")
    with pytest.raises(ConfigError, match=r"^weights take at least 36.0 GiB and the GPU has 24.0: use more GPUs$"):
        devices.require_memory(36 * 2**30, "weights", "use more GPUs")
    with pytest.raises(DeviceError, match=r"the GPU has 24.0, of which 10.0 are free on .*: end what holds the rest"):
        devices.require_memory(20 * 2**30, "weights", "use more GPUs")
    host.setattr(devices.cpu_platform, "is_installed", lambda: True)
    devices.require_memory(36 * 2**30, "weights", "use more GPUs")


def test_a_gpu_is_seen_by_its_device_file_or_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert not machine.has_gpu(tmp_path / "dev")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvidia-smi"
    for text, found in (("echo No devices were found; exit 6", False), ("echo 'GPU 0: NVIDIA H200 (UUID: x)'", True)):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        assert machine.has_gpu(tmp_path / "dev") is found
    program.unlink()
    (tmp_path / "dev" / "nvidia0").touch()
    assert machine.has_gpu(tmp_path / "dev")


def test_a_run_says_its_device_first_and_a_refused_one_says_why_in_one_line(tmp_path: Path) -> None:
    """The real entry point, which refuses before anything of Megatron is imported."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: x)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = []
    for more in ({"PATH": f"{tmp_path}:{os.environ['PATH']}", "KAIYUAN_DEVICE": ""}, {"KAIYUAN_DEVICE": "cpu"}):
        command = [sys.executable, "-m", "megatron_kaiyuan.pretrain", "--num-layers", "none"]
        found.append(subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False))
    refused, chosen = found
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("ConfigError: this machine has an NVIDIA GPU that torch cannot use: ")
    assert refused.stderr.count("\n") == 1
    assert chosen.stdout.splitlines()[0] == "> device: CPU (NO GPU IS USED: KAIYUAN_DEVICE=cpu asks for that)"


def test_whatever_computes_on_a_device_chooses_it_here() -> None:
    """`install()` alone takes the CPU without a word; these others compute nothing on a device."""
    root = Path(__file__).resolve().parents[3]
    rooms = ("megatron_kaiyuan", "benchmarks", "studies", "tools", "examples")
    calling = {
        str(path.relative_to(root))
        for room in rooms
        for path in (root / room).rglob("*.py")
        if re.search(r"^\s*(if )?cpu_platform\.install\(\)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert calling == {
        "megatron_kaiyuan/host/devices.py",
        "megatron_kaiyuan/commands/average.py",  # sums on the CPU
        "megatron_kaiyuan/commands/convert.py",  # copies tensors
        "megatron_kaiyuan/commands/inspect_checkpoint.py",  # reads
        "megatron_kaiyuan/commands/release.py",  # copies tensors
        "megatron_kaiyuan/checkpoints/save_helper.py",  # writes for a rank that has chosen
        "tools/dev/flag_page.py",  # writes a page
        "benchmarks/training_throughput.py",  # asks Megatron for the class of its optimizer
    }
