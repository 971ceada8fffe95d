"""What this machine shows of itself, without torch."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["has_gpu", "hide_packages_of_gpus"]

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


def hide_packages_of_gpus() -> None:
    """Let this process compute as if packages whose code runs on GPUs alone were not installed.

    Megatron takes layers, norms and optimizers from them wherever they import, with the local spec too.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES_OF_GPUS]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(_PACKAGES_OF_GPUS))  # type: ignore[arg-type]
