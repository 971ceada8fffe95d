"""What the machine under test has, for marks and sizes; asked without starting CUDA in this process."""

import importlib.util

import torch

from tests import GPU_TESTS

__all__ = ["ENGINE", "engine_missing", "gpu_count"]


def gpu_count() -> int:
    """Visible GPUs; 0 in the twins without one."""
    return torch.cuda.device_count() if GPU_TESTS == "cuda" else 0


def engine_missing() -> str:
    """Why Transformer Engine cannot be tested here, or nothing."""
    if GPU_TESTS != "cuda":
        return "Transformer Engine computes on GPUs only"
    return "" if importlib.util.find_spec("transformer_engine") else "Transformer Engine is not installed"


ENGINE = engine_missing()
