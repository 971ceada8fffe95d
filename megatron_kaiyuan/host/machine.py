"""What this machine shows of itself, without torch."""

import contextlib
import shutil
import subprocess
from pathlib import Path

__all__ = ["has_gpu"]


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
