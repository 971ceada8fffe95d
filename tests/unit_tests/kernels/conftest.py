"""Run each test twice: with the plain torch functions, and with the Triton kernels in Triton's interpreter."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture(params=["torch", "triton"])
def implementation(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which of the two the public functions use; the interpreter, loaded in tests/conftest.py, needs no GPU."""
    if request.param == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        yield "torch"
        return
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of the infinities under test
        yield "triton"
