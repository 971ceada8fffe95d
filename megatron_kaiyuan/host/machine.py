"""What this machine shows of itself, without torch."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_kaiyuan.errors import DeviceError

__all__ = ["ask_torch", "has_gpu", "hide_packages_of_gpus"]

_PACKAGES_OF_GPUS = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "flash_attn", "flash_attn_3")


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether the driver shows an NVIDIA GPU to this machine or container, usable or not."""
    if any(devices.glob("nvidia[0-9]*")):
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
        return done.returncode == 0 and "GPU 0" in done.stdout
    return False


def ask_torch(environment: Mapping[str, str] | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Return what `host.devices` says of this machine, and the GPUs that torch sees.

    Another process is asked, so that this one imports no torch and starts no CUDA.

    Args:
        environment: Of that process; None: that of this one.

    Raises:
        DeviceError: a GPU that was asked for or is there cannot be used; the last line that the process wrote.
    """
    command = [sys.executable, "-m", "megatron_kaiyuan.host.devices"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "torch does not start")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["said"], answer["gpus"]


def hide_packages_of_gpus() -> None:
    """Let this process compute as if packages whose code runs on GPUs alone were not installed.

    Megatron takes layers, norms and optimizers from them wherever they import, with the local spec too.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES_OF_GPUS]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(_PACKAGES_OF_GPUS))  # type: ignore[arg-type]  # None: an import of it fails
