"""The environment of every test, set before anything imports torch: here, because each process imports this first.

Without `KAIYUAN_GPU_TESTS` the GPUs are hidden, so that the tests are the same on every machine. The children of a
test, pytest-xdist's workers included, inherit that. `KAIYUAN_GPU_TESTS=cuda` runs the tests marked `gpu` instead, on
the GPUs that are there. `KAIYUAN_GPU_TESTS=cpu` runs the same tests without a GPU, to find ordinary mistakes in them.
"""

import os
import sys
from pathlib import Path

from megatron_kaiyuan.host.machine import hide_packages_of_gpus

__all__ = ["GPU_TESTS", "REPOSITORY"]

REPOSITORY = Path(__file__).resolve().parents[1]
GPU_TESTS = os.environ.get("KAIYUAN_GPU_TESTS", "")
"""`cuda`, `cpu`, or empty: the tests marked `gpu` are left out."""


def _choose_device() -> None:
    if GPU_TESTS not in ("", "cpu", "cuda"):
        raise ValueError(f"KAIYUAN_GPU_TESTS={GPU_TESTS}: give cuda or cpu, or leave it out")
    os.environ["KAIYUAN_DEVICE"] = "cuda" if GPU_TESTS == "cuda" else "cpu"
    if GPU_TESTS != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        hide_packages_of_gpus()


def _put_this_checkout_first() -> None:
    """Let started commands import this checkout, and whatever else this Python found its packages in."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [str(REPOSITORY), *(folder for folder in inherited if folder and folder != str(REPOSITORY))]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)


_put_this_checkout_first()
if "pytest" in sys.modules:  # benchmarks take helpers from here, and they run on the device that they are given
    _choose_device()
