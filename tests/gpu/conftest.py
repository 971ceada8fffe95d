"""The device under test, and what keeps a test from running on it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests import GPU_TESTS
from tests.gpu.machine import gpu_count

GIB = 2**30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here, and list warnings instead of failing on them: drivers and GPUs have their own."""
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`cuda`, or `cpu` with Triton's interpreter for the twins."""
    if GPU_TESTS == "cuda":
        yield "cuda"
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of the infinities under test
        yield "cpu"


@pytest.fixture
def two_gpus() -> None:
    """Skip where there is one."""
    if GPU_TESTS == "cuda" and (found := gpu_count()) < 2:
        pytest.skip(f"needs 2 GPUs, here is {found}")


def require_memory(gibibytes: float) -> None:
    """Skip where the GPU has less free memory."""
    if GPU_TESTS == "cuda" and (free := torch.cuda.mem_get_info()[0] / GIB) < gibibytes:
        pytest.skip(f"needs {gibibytes:.0f} GiB of GPU memory, {free:.0f} GiB are free")
