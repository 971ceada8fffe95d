"""What a fork server imports before it forks (`tests/warm.py`); imported by nothing else."""

import importlib
import os

from megatron_kaiyuan.host.devices import start_device
from megatron_kaiyuan.host.quiet import quiet_megatron_import

__all__ = ["ADDED"]

_given = dict(os.environ)
start_device()
with quiet_megatron_import():
    # Megatron imports the others late: for its tokenizers, at the first step, and with the first logged event.
    for _name in (
        "megatron_kaiyuan.training.launch",
        "megatron.core.tokenizers.text",
        "torch._dynamo",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(_name)

ADDED = {name: value for name, value in os.environ.items() if name not in _given}
"""Environment variables that the imports have set."""
