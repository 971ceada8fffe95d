"""Which device a process computes on: decided before any model is built, checked, and said in one line.

`KAIYUAN_DEVICE=cpu` asks for the CPU and `KAIYUAN_DEVICE=cuda` for a GPU. Without it a GPU is used where there is one.
A machine that has a GPU which torch cannot use is refused: a run that was meant for a GPU would take weeks on the CPU.
"""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass

import torch

from megatron_kaiyuan.errors import ConfigError, DeviceError
from megatron_kaiyuan.host import cpu_platform, machine
from megatron_kaiyuan.host.cli import run_tool
from megatron_kaiyuan.host.terminal import agreed, counted

__all__ = ["DEVICE_VARIABLE", "Gpu", "require_memory", "start_device", "visible_gpus"]

DEVICE_VARIABLE = "KAIYUAN_DEVICE"
GIB = 2**30
_REMEDY = f"or set {DEVICE_VARIABLE}=cpu to compute on the CPU"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device that torch sees."""

    name: str
    capability: tuple[int, int]
    total_bytes: int


def start_device() -> str:
    """Choose the device of this process, check it, and install the CPU platform where it is the CPU.

    To be called before Megatron is imported.

    Returns:
        What was chosen and why, in one line: `device: ...`.

    Raises:
        ConfigError: no GPU where one was asked for; a GPU that the installed torch cannot use; fewer GPUs than ranks.
    """
    asked = _asked_device()
    if cpu_platform.is_installed():
        return f"device: CPU ({_why_cpu(asked)})"
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when it starts CUDA, which it has not yet
    elif not torch.cuda.is_available():
        _require_that_there_is_none(asked)
    if cpu_platform.install():
        return f"device: CPU ({_why_cpu(asked)})"
    gpus = visible_gpus()
    _check(gpus)
    own = gpus[int(os.environ.get("LOCAL_RANK", "0")) % len(gpus)]
    return f"device: {len(gpus)} visible GPU{'s' * (len(gpus) > 1)}, {own.name} ({own.total_bytes / GIB:.0f} GiB)"


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that torch sees. This starts CUDA in the process."""
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Gpu(one.name, (one.major, one.minor), one.total_memory) for one in found]


def require_memory(needed_bytes: float, what: str, remedy: str) -> None:
    """Refuse a model that cannot fit this process's GPU.

    Does nothing on the CPU.

    Args:
        needed_bytes: Of what is kept for the whole run, so a lower bound of what the run takes.
        what: Its name, for the message.
        remedy: What to do, for the message.

    Raises:
        ConfigError: the GPU has less.
        DeviceError: other processes have left less.
    """
    if cpu_platform.is_installed():
        return
    free, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if needed_bytes <= free:
        return
    asked = f"{what} take at least {needed_bytes / GIB:.1f} GiB and the GPU has {total / GIB:.1f}"
    if needed_bytes <= total:
        raise DeviceError(
            f"{asked}, of which {free / GIB:.1f} are free on {socket.gethostname()}: end what holds the rest"
        )
    raise ConfigError(f"{asked}: {remedy}")


def _main() -> None:
    """Print what `start_device` says and the GPUs, as JSON, for a process that must not start CUDA itself."""
    said = start_device()
    gpus = [] if cpu_platform.is_installed() else visible_gpus()
    print(json.dumps({"said": said, "gpus": [asdict(gpu) for gpu in gpus]}))


def _asked_device() -> str:
    asked = os.environ.get(DEVICE_VARIABLE, "")
    if asked not in ("", "cpu", "cuda"):
        raise ConfigError(f"{DEVICE_VARIABLE}={asked} is unknown; give cpu or cuda; without it a GPU is used if any")
    return asked


def _why_cpu(asked: str) -> str:
    return f"NO GPU IS USED: {DEVICE_VARIABLE}=cpu asks for that" if asked else "this machine shows no GPU"


def _require_that_there_is_none(asked: str) -> None:
    """Refuse the CPU where torch detects no CUDA but there is a GPU, or one was asked for."""
    if machine.has_gpu():
        raise ConfigError(f"this machine has an NVIDIA GPU that torch cannot use: {_why_no_cuda()}, {_REMEDY}")
    if asked == "cuda":
        raise ConfigError(f"{DEVICE_VARIABLE}=cuda, and this machine shows no NVIDIA GPU: use another, {_REMEDY}")


def _why_no_cuda() -> str:
    """The reason and its remedy."""
    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} was built without CUDA; install a build with it"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and _hides_all(visible):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides it; unset that, ask the scheduler for a GPU"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        said = str(error).split(". ")[0].splitlines()[0]
        return f"{said}; torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}"
    return "CUDA starts and shows no device; look at nvidia-smi"


def _hides_all(visible: str) -> bool:
    """Whether the first entry, as CUDA reads the variable, names no device: empty, -1, NoDevFiles."""
    first = visible.split(",")[0].strip()
    return not (first.isdigit() or first.startswith(("GPU-", "MIG-")))


def _check(gpus: list[Gpu]) -> None:
    """Refuse GPUs that torch was not compiled for, and more ranks than GPUs."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > len(gpus):
        raise ConfigError(
            f"{counted(ranks, 'process', 'processes')} {agreed(ranks, 'was', 'were')} started on this node and "
            f"{counted(len(gpus), 'GPU')} {agreed(len(gpus), 'is', 'are')} "
            f"visible: give torchrun --nproc-per-node {len(gpus)} (the launch script: NPROC_PER_NODE={len(gpus)})"
        )
    compiled = torch.cuda.get_arch_list()
    for number, gpu in enumerate(gpus):
        if compiled and not _runs_on(compiled, gpu.capability):
            raise ConfigError(
                f"GPU {number}, {gpu.name}, has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and torch "
                f"{torch.__version__} was compiled for {', '.join(compiled)}: install another build, "
                f"hide this GPU with CUDA_VISIBLE_DEVICES, {_REMEDY}"
            )


def _runs_on(compiled: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of `sm_90`, `compute_80`, ... runs: the same major version, or PTX of any earlier one."""
    for target in compiled:
        kind, _, digits = target.rstrip("af").partition("_")
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


if __name__ == "__main__":
    sys.exit(run_tool(_main))
