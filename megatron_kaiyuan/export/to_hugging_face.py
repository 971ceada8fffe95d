"""Export: a `torch_dist` checkpoint to a folder that `AutoModelForCausalLM.from_pretrained` loads.

One process on the CPU, no process group, memory of one layer's largest matrix, however the run was parallelised.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_kaiyuan.checkpoints.parts import read_rows, row_groups
from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.export.architecture import Architecture, architecture_from_arguments
from megatron_kaiyuan.export.check import Largest, check_folder
from megatron_kaiyuan.export.layouts import Layout, LayoutName, choose_layout
from megatron_kaiyuan.export.tensor_files import Form, TensorWriter
from megatron_kaiyuan.export.tokenizer_files import ExportedTokenizer, prepare_tokenizer
from megatron_kaiyuan.export.weight_names import Weight, parts_of, weights_of
from megatron_kaiyuan.host.atomic import folder_appearing_whole, write_text_atomically

__all__ = ["CONVERSION_NAME", "DEFAULT_FILE_BYTES", "Exported", "export_checkpoint"]

CONVERSION_NAME = "conversion.json"
"""File of an exported model that says which checkpoint it is."""
DEFAULT_FILE_BYTES = 5 * 10**9
_FORMAT = "megatron_kaiyuan.conversion/1"
_AVERAGE_NAME = "average.json"
_CODE = ("configuration_kaiyuan.py", "modeling_kaiyuan.py")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    layout: Layout
    dtype: torch.dtype
    largest: Largest | None
    """Largest activation of the check; None without one."""


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    *,
    tokenizer: Path | None = None,
    layout: LayoutName | Literal["auto"] = "auto",
    dtype: torch.dtype | None = None,
    check: bool = False,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> Exported:
    """Write a model folder: safetensors, config, generation config, its tokenizer and, for our own layout, its code.

    Weights keep their stored dtype and bits, unless `dtype` or the layout asks for others. The folder appears whole or
    not at all.

    Args:
        checkpoint: Of training, or an average of several.
        output: Must not exist.
        tokenizer: As for `named_config`; converted where it is no `tokenizer.json`.
        layout: `auto` chooses the stock layout that computes the model exactly, or else our own.
        dtype: Of the exported weights; None: as stored.
        check: Load the result and run a text through it; needs the memory of the whole model.
        max_file_bytes: Largest safetensors file.
        progress: Called with the bytes that each step wrote.

    Raises:
        ConvertError: the model has no counterpart or not in that layout, a weight leaves the range of `dtype`, the
            output exists, the tokenizer cannot be converted, or the check meets a value that is not finite.
        TokenizerError: the tokenizer is not that of the model.
    """
    if output.exists():
        raise ConvertError(f"--output {output} exists; remove it or name another folder")
    architecture = architecture_from_arguments(checkpoint.arguments)
    weights = list(weights_of(architecture))
    _check_tensors(checkpoint, architecture, weights)
    stored = checkpoint.tensors["embedding.word_embeddings.weight"][1]
    chosen = choose_layout(architecture, layout, dtype or stored)
    fitting = None if tokenizer is None else prepare_tokenizer(tokenizer, checkpoint.arguments)
    with folder_appearing_whole(output) as folder:
        forms = _exported_forms(checkpoint, chosen, weights, dtype)
        with TensorWriter(folder, forms, max_file_bytes) as writer:
            for weight in weights:
                _export_weight(checkpoint, chosen, weight, writer, progress, dtype)
        _write_descriptions(folder, checkpoint, chosen, fitting, dtype or stored)
        num_ids = architecture.padded_vocab_size if fitting is None else fitting.num_ids
        check_text = None if tokenizer is None else folder
        largest = check_folder(folder, chosen, dtype or stored, check_text, num_ids) if check else None
    return Exported(chosen, dtype or stored, largest)


def _stored_names(checkpoint: Checkpoint, architecture: Architecture, weight: Weight) -> list[str]:
    """Names of a weight in the checkpoint: one, or one a layer where they are not stacked."""
    if not weight.stacked or weight.name in checkpoint.tensors:
        return [weight.name]
    return [weight.name_of_layer(layer) for layer in range(architecture.num_layers)]


def _check_tensors(checkpoint: Checkpoint, architecture: Architecture, weights: list[Weight]) -> None:
    """Every weight is there in the right shape, and nothing that the export would leave behind."""
    wanted: dict[str, tuple[int, ...]] = {}
    for weight in weights:
        names = _stored_names(checkpoint, architecture, weight)
        stacked = (architecture.num_layers,) if weight.stacked and names == [weight.name] else ()
        wanted.update(dict.fromkeys(names, (*stacked, *weight.shape)))
    stored = {name: shape for name, (shape, _) in checkpoint.tensors.items()}
    missing = sorted(wanted.keys() - stored.keys())
    unknown = sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        lines = [f"has no {name}" for name in missing[:3]] + [f"has {name} beside" for name in unknown[:3]]
        raise ConvertError(
            f"{checkpoint.folder}: {'; '.join(lines)}: not the weights of the model that its arguments describe "
            f"({len(missing)} missing, {len(unknown)} too many). Was it trained with layers of its own?"
        )
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise ConvertError(f"{checkpoint.folder}: {name} is {stored[name]}, its arguments say {shape}")


def _exported_forms(
    checkpoint: Checkpoint, layout: Layout, weights: list[Weight], dtype: torch.dtype | None
) -> dict[str, Form]:
    """Shape and dtype of every exported tensor, layer by layer, so that a file holds whole layers."""
    architecture = layout.architecture
    first = [weight for weight in weights if not weight.stacked][:1]
    last = [weight for weight in weights if not weight.stacked][1:]
    layered = [(weight, layer) for layer in range(architecture.num_layers) for weight in weights if weight.stacked]
    forms: dict[str, Form] = {}
    for weight, layer in [(weight, 0) for weight in first] + layered + [(weight, 0) for weight in last]:
        written = dtype or checkpoint.tensors[_stored_names(checkpoint, architecture, weight)[0]][1]
        parts = parts_of(weight, torch.empty(weight.shape, device="meta"), architecture)
        for name, part in zip(weight.part_names(layer), parts, strict=True):
            forms[layout.stored_name(name)] = (tuple(part.shape), written)
    return forms


def _export_weight(
    checkpoint: Checkpoint,
    layout: Layout,
    weight: Weight,
    writer: TensorWriter,
    progress: Callable[[int], None],
    dtype: torch.dtype | None,
) -> None:
    architecture = layout.architecture
    for layer, tensor in _layers_of(checkpoint, architecture, weight):
        for name, part in zip(weight.part_names(layer), parts_of(weight, tensor, architecture), strict=True):
            written = layout.stored(name, part, dtype or part.dtype)
            if part.isfinite().all() and not written.isfinite().all():
                raise ConvertError(
                    f"--dtype {dtype}: {name} reaches {part.abs().max():.4g}, beyond its range; give --dtype bfloat16"
                )
            writer.write(layout.stored_name(name), written)
        progress(tensor.nbytes)


def _layers_of(
    checkpoint: Checkpoint, architecture: Architecture, weight: Weight
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each layer's number and tensor.

    A weight outside the layers counts as layer 0.
    """
    names = _stored_names(checkpoint, architecture, weight)
    if not weight.stacked or names != [weight.name]:
        for layer, name in enumerate(names):
            yield layer, read_rows(checkpoint, name, 0, checkpoint.tensors[name][0][0])
        return
    for first, end in row_groups(checkpoint, weight.name):
        yield from enumerate(read_rows(checkpoint, weight.name, first, end), start=first)


def _write_descriptions(
    folder: Path, checkpoint: Checkpoint, layout: Layout, tokenizer: ExportedTokenizer | None, dtype: torch.dtype
) -> None:
    arguments, vocabulary = checkpoint.arguments, layout.architecture.padded_vocab_size
    special = {} if tokenizer is None else tokenizer.special_ids
    _write_json(folder / "config.json", {**layout.config(dtype), **special})
    generation = {} if tokenizer is None else tokenizer.generation_config(vocabulary)
    _write_json(folder / "generation_config.json", generation)
    average = checkpoint.folder / _AVERAGE_NAME
    conversion = {
        "format": _FORMAT,
        "layout": layout.name,
        "iteration": checkpoint.iteration,
        "consumed_train_samples": int(getattr(arguments, "consumed_train_samples", 0)),
        "seed": getattr(arguments, "seed", None),
        "average": json.loads(average.read_text()) if average.is_file() else None,
    }
    _write_json(folder / CONVERSION_NAME, conversion)
    for name in _CODE if layout.has_code else ():
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    if tokenizer is not None:
        tokenizer.write_to(folder)


def _write_json(path: Path, value: object) -> None:
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")
