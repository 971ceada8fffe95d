"""Settings of all tests: Triton's interpreter, and which warnings of other packages are no failures, with why."""

import importlib
import importlib.util
import os
import warnings

import pytest
from hypothesis import settings

from tests import GPU_TESTS

# A slow or busy machine is no failure; where CI is set, hypothesis also draws the same examples each time.
settings.register_profile("kaiyuan", settings.get_profile("ci") if "CI" in os.environ else None, deadline=None)
settings.load_profile("kaiyuan")

# Warnings are errors (pyproject.toml). These are said by other packages when they are imported or built, about things
# that are as intended here; each is named by its text so that no other warning hides behind it.
THIRD_PARTY_WARNINGS = (
    # megatron-core 0.19 on a machine without the optional extras: it tells which layers it falls back to.
    "ignore:Transformer Engine and Apex are not installed:UserWarning",
    "ignore:Apex is not installed. Falling back to Torch Norm:UserWarning",
    "ignore:Only transformer-engine>=1.7.0 supports MoE experts:UserWarning",
    # torch 2.11, about modules of its own, when something compiled is defined, as megatron-core does at import.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    # Transformer Engine 2.12, at its import: an error there leaves half a package behind.
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    # megatron-core's own argument parser.
    "ignore:'type' is deprecated as of Python 3.12:DeprecationWarning",
    # megatron-core, about its own imports, and about a model this package does not use.
    "ignore:The following imports from `dynamic_context.py`:DeprecationWarning",
    "ignore:MimoModelConfig is experimental:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Add the exceptions after pyproject's `error`, so that they win."""
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests marked `gpu`, or all others: they never share a process (`tests/__init__.py` says why).

    Tests marked `slow` take minutes: `make check-slow` asks for them by SLOW_TESTS.
    """
    chosen = [item for item in items if (item.get_closest_marker("gpu") is not None) == bool(GPU_TESTS)]
    if not os.environ.get("SLOW_TESTS"):
        chosen = [item for item in chosen if item.get_closest_marker("slow") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _load_kernels_into_the_interpreter() -> None:
    """Import our Triton kernels so that they run on the CPU; `use_triton` decides at each call whether they do.

    Triton reads the variable when it decorates, its own functions included, so it has to be set before the first
    import.
    """
    if GPU_TESTS == "cuda" or importlib.util.find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("qk_norm_rope", "rms_norm", "softmax_loss", "swiglu"):
            importlib.import_module(f"megatron_kaiyuan.kernels.{name}_triton")
    del os.environ["TRITON_INTERPRET"]


# At import, because the conftest of a folder may import Triton before `pytest_configure` is called.
_load_kernels_into_the_interpreter()
