"""Where the Triton kernels run, and how they are shaped."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

__all__ = ["block_size", "cuda_kernels_available", "num_programs", "use_triton"]


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: Tensor) -> bool:
    """Whether kernels run on this tensor: on CUDA, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""
    return _triton_installed() and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def cuda_kernels_available() -> bool:
    """Whether this process computes on a GPU that Triton compiles for."""
    # The version distinguishes a CUDA build from the stand-ins of the CPU platform.
    return _triton_installed() and torch.version.cuda is not None and torch._C._cuda_getDeviceCount() > 0


def block_size(columns: int) -> int:
    """Return the power of two that holds a row of so many columns.

    A Triton tile has no other sizes.
    """
    return 1 << (columns - 1).bit_length()


def num_programs(rows: int, device: torch.device) -> int:
    """Programs of a kernel that loops over rows and keeps a sum: enough to fill the chip, few enough to add up."""
    return min(rows, 4 * _multiprocessors(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
