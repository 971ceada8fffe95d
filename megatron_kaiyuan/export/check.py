"""Run an exported folder once: are its logits finite in its own dtype, and how large do its activations become?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.export.layouts import Layout
from megatron_kaiyuan.export.tokenizer_files import open_exported

__all__ = ["Largest", "check_folder"]

_TEXT = (
    "The export is run once on this text. A model is worth little if it prints nonsense at the place where it is used, "
    "so the largest activation is reported beside the range of its numbers: 3.14159, 65,504, def f(x): return x + 1."
)
_IDS = 64


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest absolute value that any module of the model put out."""

    value: float
    module: str


def check_folder(folder: Path, layout: Layout, dtype: torch.dtype, tokenizer: Path | None, num_ids: int) -> Largest:
    """Return the largest activation of a short text, or of random ids where there is no tokenizer.

    Args:
        folder: The exported model; it is loaded whole, on the CPU.
        layout: That of the folder.
        dtype: Of its weights, which is also that of the run.
        tokenizer: Folder with `tokenizer.json`.
        num_ids: Ids to draw from.

    Raises:
        ConvertError: an activation or a logit is not finite; names the first module.
    """
    model = _load(folder, layout, dtype)
    largest, unbounded = Largest(0.0, ""), ""

    def watch(name: str) -> Callable[..., None]:
        def look(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal largest, unbounded
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            value = float(output.abs().max())
            if not output.isfinite().all():
                unbounded = unbounded or name
            elif value > largest.value:
                largest = Largest(value, name)

        return look

    for name, module in model.named_modules():
        module.register_forward_hook(watch(name))
    with torch.no_grad():
        logits = model(_ids(tokenizer, num_ids)).logits
    if unbounded or not logits.isfinite().all():
        raise ConvertError(
            f"the exported model is not finite in {str(dtype).removeprefix('torch.')}: {unbounded or 'its logits'} "
            f"overflowed on a text of {_IDS} ids; give --dtype bfloat16 or float32"
        )
    return largest


def _load(folder: Path, layout: Layout, dtype: torch.dtype) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if layout.has_code:
        from megatron_kaiyuan.export.modeling_kaiyuan import KaiyuanForCausalLM

        loader: Any = KaiyuanForCausalLM
    else:
        from transformers import AutoModelForCausalLM

        loader = AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=dtype).eval()


def _ids(tokenizer: Path | None, num_ids: int) -> Tensor:
    """`[1, _IDS]`, int64."""
    if tokenizer is None:
        return torch.randint(num_ids, (1, _IDS), generator=torch.Generator().manual_seed(1))
    ids: list[int] = open_exported(tokenizer)(_TEXT)["input_ids"]
    return torch.tensor((ids * _IDS)[:_IDS])[None]
