"""The tokenizer that travels with an exported model, and the generation config that follows from it."""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kaiyuan.checkpoints.tokenizer import CheckpointTokenizer, tokenizer_of_checkpoint
from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.export.tokenizer_conversion import converted, require_same_ids
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.shards.tokenizer import model_file

__all__ = ["ExportedTokenizer", "open_exported", "prepare_tokenizer"]

_CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_FILES = (
    "tokenizer.json",
    _CONFIG,
    _MAP,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class ExportedTokenizer:
    """The tokenizer of the checkpoint, as transformers reads it."""

    of_model: CheckpointTokenizer
    conversion: Any
    """`tokenizers.Tokenizer`; None where the tokenizer is a `tokenizer.json` already."""
    special_ids: dict[str, int]
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, those that it has."""

    @property
    def num_ids(self) -> int:
        """Return the number of ids, special ones included.

        The model's further rows are padding.
        """
        return self.of_model.tokenizer.vocab_size

    def write_to(self, folder: Path) -> None:
        """Write its files, and compare what transformers makes of them with the ids of training.

        Raises:
            ConvertError: transformers cannot open them, or gives other ids.
        """
        _write_files(folder, self.of_model, self.conversion)
        opened = open_exported(folder)
        special = self.of_model.config.include_special_tokens
        require_same_ids(
            self.of_model.tokenizer,
            lambda text: opened(text, add_special_tokens=special)["input_ids"],
            f"--tokenizer {self.of_model.config.model}: as transformers opens it, it",
        )

    def generation_config(self, vocabulary: int) -> dict[str, object]:
        """What `generate` should do by itself: end at the end of the text, and never draw padding of the vocabulary."""
        padding = list(range(self.num_ids, vocabulary))
        return {**self.special_ids, **({"suppress_tokens": padding} if padding else {})}


def prepare_tokenizer(path: Path, saved: argparse.Namespace) -> ExportedTokenizer:
    """Open a tokenizer and convert it where that is needed.

    Args:
        path: As for `named_config`.
        saved: Arguments in the checkpoint.

    Raises:
        TokenizerError: it is not the tokenizer of the checkpoint.
        ConvertError: it cannot be converted.
    """
    of_model = tokenizer_of_checkpoint(path, saved)
    if of_model.config.type == "HuggingFaceTokenizer":
        return ExportedTokenizer(of_model, None, _special_ids(of_model))
    conversion = converted(of_model.config)
    require_same_ids(
        of_model.tokenizer,
        lambda text: conversion.encode(text, add_special_tokens=False).ids,
        f"--tokenizer {path}: the tokenizer.json made of it",
    )
    return ExportedTokenizer(of_model, conversion, _special_ids(of_model))


def _special_ids(of_model: CheckpointTokenizer) -> dict[str, int]:
    """Return the ids of the tokenizer's own files, but for the end of text, which is that of training."""
    source = Path(of_model.config.model or "")
    found = {}
    if of_model.config.type == "HuggingFaceTokenizer" and (source / _CONFIG).is_file():
        opened = _opened(source)
        found = {name: getattr(opened, name) for name in _SPECIAL}
    if of_model.end is not None:
        found["eos_token_id"] = of_model.end
    return {name: number for name, number in found.items() if number is not None}


def open_exported(folder: Path) -> Any:
    """Return the tokenizer of an exported folder as transformers opens it, without the code of the model beside it.

    With no configuration transformers reads the model's, and asks on the terminal whether it may run its code.
    """
    from transformers import PreTrainedConfig

    return _opened(folder, config=PreTrainedConfig())


def _opened(folder: Path, **more: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **more)
    except (OSError, ValueError, KeyError) as error:
        raise ConvertError(f"--tokenizer {folder}: transformers cannot open it ({error})") from error


def _write_files(folder: Path, of_model: CheckpointTokenizer, conversion: Any) -> None:
    source = model_file(of_model.config)
    if conversion is not None:
        conversion.save(str(folder / "tokenizer.json"))
    elif source.name != "tokenizer.json" or Path(of_model.config.model or "").is_file():
        shutil.copyfile(source, folder / "tokenizer.json")
    else:
        for path in (source.with_name(name) for name in _FILES):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    _declare_end(folder, of_model)


def _declare_end(folder: Path, of_model: CheckpointTokenizer) -> None:
    """Name the end of text, as training had it, where transformers and the engines look for it."""
    from tokenizers import Tokenizer

    name = None
    if of_model.end is not None:
        name = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(of_model.end)
    for path, initial in ((folder / _CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"}), (folder / _MAP, {})):
        if path.name == _MAP and not path.is_file():
            continue
        settings = {**initial, **(json.loads(path.read_text()) if path.is_file() else {})}
        declared = settings.get("eos_token")
        if name is not None and (declared["content"] if isinstance(declared, dict) else declared) != name:
            settings["eos_token"] = name
        write_text_atomically(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
