"""Import: a model folder in Hugging Face's layout to a `torch_dist` checkpoint that Megatron loads with `--finetune`.

One process on the CPU, no process group, memory of one layer's largest matrix. Import this after
`cpu_platform.install()`: the arguments of the checkpoint are made by Megatron's own parser.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kaiyuan.checkpoints.parts import LazyTensor, write_parts
from megatron_kaiyuan.checkpoints.reading import (
    TRACKER_NAME,
    iteration_folder,
    new_checkpoint_folder,
    output_conflict,
)
from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.export.architecture import Architecture
from megatron_kaiyuan.export.layouts import architecture_from_config
from megatron_kaiyuan.export.tensor_files import TensorFolder
from megatron_kaiyuan.export.to_hugging_face import CONVERSION_NAME
from megatron_kaiyuan.export.weight_names import Weight, joined, parts_of, weights_of
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.quiet import quiet_megatron_import
from megatron_kaiyuan.host.terminal import counted

__all__ = ["import_model", "untrained_state"]

_COMMON_STATE = "common_state/shard_0_1"
_TIED_COPY = "lm_head.weight"


def import_model(
    source: Path,
    output: Path,
    *,
    iteration: int | None = None,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> Architecture:
    """Write a checkpoint with the weights of a model, for any parallel layout.

    Weights keep their dtype and bits. There is no optimizer state, so training starts anew from them.

    Args:
        source: Folder with `config.json` and safetensors.
        output: Save directory of the result, for `--load`.
        iteration: Number in the folder's name; None: that of the exported checkpoint, or else 1.
        progress: Called with the bytes that each step wrote.

    Raises:
        ConvertError: another architecture, files that do not fit it, or an output that holds a checkpoint.
    """
    config = _read_json(source / "config.json", "give a model folder of Hugging Face's layout")
    architecture = architecture_from_config(config, str(source / "config.json"))
    conversion = _read_json(source / CONVERSION_NAME, "") if (source / CONVERSION_NAME).is_file() else {}
    number = conversion.get("iteration", 1) if iteration is None else iteration
    if type(number) is not int or number < 1:
        raise ConvertError(f"iteration {number!r}: Megatron loads iterations from 1 on; give --iteration N")
    folder = iteration_folder(output, number)
    conflict = output_conflict(output, number)
    if conflict is not None:
        raise ConvertError(f"--output {output}: {conflict}")
    files = TensorFolder(source)
    tensors = _lazy_tensors(files, architecture, source, progress)
    objects = untrained_state(architecture, number, tensors["embedding.word_embeddings.weight"].dtype)
    with new_checkpoint_folder(folder, {}) as unfinished:
        write_parts(unfinished, tensors, objects)
    write_text_atomically(output / TRACKER_NAME, str(number))
    return architecture


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path}: cannot be read ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: is no JSON object; {remedy}")
    return value


def _lazy_tensors(
    files: TensorFolder, architecture: Architecture, source: Path, progress: Callable[[int], None]
) -> dict[str, LazyTensor]:
    """The checkpoint's tensors, each layer of which is read when it is written."""
    found: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for weight in weights_of(architecture):
        layers = range(architecture.num_layers) if weight.stacked else range(1)
        dtypes = set()
        for layer in layers:
            dtypes |= _checked_dtypes(files, architecture, weight, layer, source)
            used.update(weight.part_names(layer))
        if len(dtypes) > 1:
            raise ConvertError(
                f"{source}: {weight.parts[0]} is of {counted(len(dtypes), 'dtype')}; cast the model to one of them"
            )
        make = [partial(_join_layer, files, architecture, weight, layer, progress) for layer in layers]
        shape = (len(layers), *weight.shape) if weight.stacked else weight.shape
        found[weight.name] = LazyTensor(shape, dtypes.pop(), make)
    unknown = sorted(files.forms.keys() - used - ({_TIED_COPY} if architecture.tied_embeddings else set()))
    if unknown:
        raise ConvertError(
            f"{source}: has {', '.join(unknown[:3])}, which the model of its config.json has not; "
            "is config.json that of these weights?"
        )
    return found


def _checked_dtypes(
    files: TensorFolder, architecture: Architecture, weight: Weight, layer: int, source: Path
) -> set[torch.dtype]:
    """Dtypes of a layer's parts, which are there and in the right shape."""
    expected = parts_of(weight, torch.empty(weight.shape, device="meta"), architecture)
    dtypes = set()
    for name, part in zip(weight.part_names(layer), expected, strict=True):
        if name not in files.forms:
            raise ConvertError(f"{source}: has no {name}, which its config.json asks for")
        shape, dtype = files.forms[name]
        if shape != tuple(part.shape):
            raise ConvertError(f"{source}: {name} is {shape}, its config.json asks for {tuple(part.shape)}")
        dtypes.add(dtype)
    return dtypes


def _join_layer(
    files: TensorFolder, architecture: Architecture, weight: Weight, layer: int, progress: Callable[[int], None]
) -> Tensor:
    tensor = joined(weight, [files.read(name) for name in weight.part_names(layer)], architecture)
    progress(tensor.nbytes)
    return tensor.unsqueeze(0) if weight.stacked else tensor


def untrained_state(architecture: Architecture, iteration: int, dtype: torch.dtype) -> dict[str, io.BytesIO]:
    """Return what Megatron stores beside the tensors, as bytes keyed with names.

    These are arguments and counters of a run that has not begun. Each module also asks for an extra state, which holds
    FP8 scales where FP8 is used and is None otherwise.

    Args:
        architecture: Of the model.
        iteration: Number of the checkpoint.
        dtype: Of the weights; decides between `--fp16`, `--bf16` and neither.
    """
    arguments = _default_arguments()
    values = architecture.to_arguments() | {
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        # The layout knows no dropout; Megatron's own default is 0.1.
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "seq_length": architecture.max_position_embeddings,
        "vocab_size": architecture.padded_vocab_size,
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
    }
    for name, value in values.items():
        setattr(arguments, name, value)
    content = {"args": arguments, "checkpoint_version": 3.0, "iteration": iteration}
    extra = dict.fromkeys(_extra_state_names(architecture), None)
    return {name: _stored(value) for name, value in {_COMMON_STATE: content, **extra}.items()}


def _stored(value: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream


def _extra_state_names(architecture: Architecture) -> Iterator[str]:
    """Yield the names of the extra states of every module that may have one, with Transformer Engine or without.

    One that nobody asks for does no harm.
    """
    modules = [(weight.name.rpartition(".")[0], weight.stacked) for weight in weights_of(architecture)]
    modules.append(("decoder.layers.self_attention.core_attention", True))
    for module, stacked in dict.fromkeys(modules):
        count = architecture.num_layers if stacked else 1
        for number in range(count):
            yield f"{module}._extra_state/shard_{number}_{count}"


def _default_arguments() -> argparse.Namespace:
    """All arguments of a run, as Megatron's parser and ours set them for an empty command line."""
    from megatron_kaiyuan.arguments import add_kaiyuan_arguments

    with quiet_megatron_import():
        from megatron.training.arguments import add_megatron_arguments

    parser = add_kaiyuan_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return parser.parse_args([])
