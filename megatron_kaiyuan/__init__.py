"""Pretraining of small language models on Megatron-Core: FP16-stable model, quality curricula, selective repetition.

Nothing is imported here: each room says in its own `__init__` what it offers.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
