"""Settings of all tests: which warnings of other packages do not count as failures, each with its reason."""

import pytest

# Warnings are errors (pyproject.toml). These are said by other packages when they are imported or built, about things
# that are as intended here; each is named by its text so that no other warning hides behind it.
THIRD_PARTY_WARNINGS = (
    # megatron-core 0.19 on a machine without the optional extras: it tells which layers it falls back to.
    "ignore:Transformer Engine and Apex are not installed:UserWarning",
    "ignore:Apex is not installed. Falling back to Torch Norm:UserWarning",
    "ignore:Only transformer-engine>=1.7.0 supports MoE experts:UserWarning",
    # torch 2.11, about modules of its own, when something compiled is defined, as megatron-core does at import.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
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
