"""Importing Megatron without what it says about optional packages that are not installed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_megatron_import"]


@contextmanager
def quiet_megatron_import() -> Iterator[None]:
    """For tools that compute no faster with these packages: their output is the result, not a list of fallbacks."""
    with warnings.catch_warnings():
        for message in (
            "Transformer Engine and Apex are not installed",
            "Apex is not installed",
            "Only transformer-engine>=",
        ):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield
