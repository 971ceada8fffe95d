"""What a checkpoint is, as plain data: step, samples, layout, model, options, identity, sizes and checksums."""

import argparse
import enum
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from megatron_kaiyuan.checkpoints.checksums import CHECKSUMS_ARGUMENT, read_checksums
from megatron_kaiyuan.checkpoints.identity import (
    AVERAGING,
    COMMAND_LINE_TOKENIZER,
    END_OF_TEXT,
    PLAN_RECORD,
    TOKENIZER,
)
from megatron_kaiyuan.checkpoints.lineage import CODE, COMMAND, COMMANDS, STARTS, commands_of
from megatron_kaiyuan.checkpoints.reading import Checkpoint

__all__ = ["describe"]

_FORMAT = "megatron_kaiyuan.checkpoint/1"
_LAYOUT = {
    "tensor_parallel": "tensor_model_parallel_size",
    "pipeline_parallel": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context_parallel": "context_parallel_size",
    "expert_parallel": "expert_model_parallel_size",
    "data_parallel": "data_parallel_size",
    "ranks": "world_size",
    "distributed_optimizer": "use_distributed_optimizer",
}
_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "seq_length",
    "max_position_embeddings",
    "padded_vocab_size",
    "params_dtype",
)
_NO_OPTIONS = {
    TOKENIZER,
    COMMAND_LINE_TOKENIZER,
    END_OF_TEXT,
    CODE,
    COMMAND,
    COMMANDS,
    STARTS,
    CHECKSUMS_ARGUMENT,
    PLAN_RECORD,
    AVERAGING,
}
"""Arguments that are kept with a run and are no flags."""


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint in values that JSON holds, with None where it does not say.

    Args:
        checkpoint: Opened; its files may have any content that can be read.

    Raises:
        CheckpointError: its small files are damaged.
    """
    args = checkpoint.arguments
    samples, length = getattr(args, "consumed_train_samples", None), getattr(args, "seq_length", None)
    record = getattr(args, PLAN_RECORD, None)
    return {
        "format": _FORMAT,
        "folder": str(checkpoint.folder),
        "iteration": checkpoint.iteration,
        "samples": samples,
        "tokens": samples * length if isinstance(samples, int) and isinstance(length, int) else None,
        "layout": {name: _plain(getattr(args, argument, None)) for name, argument in _LAYOUT.items()},
        "model": {name: _plain(getattr(args, name, None)) for name in _MODEL},
        "options": _options(args),
        "identity": {
            "seed": getattr(args, "seed", None),
            "plan": getattr(args, "plan", None),
            "plan_order": None if record is None else _digest(record),
            "averaging": _plain(getattr(args, AVERAGING, None)),
            "tokenizer": getattr(args, TOKENIZER, None) or getattr(args, COMMAND_LINE_TOKENIZER, None),
            "starts": getattr(args, STARTS, None),
            "code": getattr(args, CODE, None),
            "command": getattr(args, COMMAND, None),
            "commands": commands_of(args),
        },
        "tensors": _tensors(checkpoint),
        "files": _files(checkpoint.folder),
    }


def _digest(record: object) -> str:
    """Equal for equal orders of samples."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Our own arguments that are given, by the name of their flag."""
    found = {name: _plain(value) for name, value in sorted(vars(args).items()) if name.startswith("kaiyuan_")}
    return {f"--{name.replace('_', '-')}": value for name, value in found.items() if name not in _NO_OPTIONS}


def _tensors(checkpoint: Checkpoint) -> dict[str, int]:
    shapes = [shape for shape, _ in checkpoint.tensors.values()]
    return {
        "model_tensors": len(shapes),
        "model_values": sum(torch.Size(shape).numel() for shape in shapes),
        "model_bytes": checkpoint.num_bytes,
    }


def _files(folder: Path) -> list[dict[str, Any]]:
    sums = read_checksums(folder) or {}
    return [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "xxh3_128": sums[path.name].xxh3_128 if path.name in sums else None,
        }
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]


def _plain(value: object) -> Any:
    """Return a value as JSON has it.

    Values of other types become text.
    """
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value).removeprefix("torch.")
