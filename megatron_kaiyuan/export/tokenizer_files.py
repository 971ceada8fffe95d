"""The tokenizer that travels with an exported model, and the generation config that follows from it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_kaiyuan.errors import ConvertError

__all__ = ["ExportedTokenizer", "open_tokenizer"]

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class ExportedTokenizer:
    """A Hugging Face tokenizer folder that fits the model."""

    files: tuple[Path, ...]
    num_ids: int
    """Ids 0 to here, special ones included; the model's further rows are padding."""
    special_ids: dict[str, int]
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, those that it has."""

    def copy_to(self, folder: Path) -> None:
        """Copy its files."""
        for path in self.files:
            shutil.copyfile(path, folder / path.name)

    def generation_config(self, vocabulary: int) -> dict[str, object]:
        """What `generate` should do by itself: end at the end of the text, and never draw padding of the vocabulary."""
        padding = list(range(self.num_ids, vocabulary))
        return {**self.special_ids, **({"suppress_tokens": padding} if padding else {})}


def open_tokenizer(folder: Path, vocabulary: int) -> ExportedTokenizer:
    """Look at a tokenizer folder.

    Args:
        folder: Holds `tokenizer.json`.
        vocabulary: Rows of the model's embedding.

    Raises:
        ConvertError: it is no tokenizer, or has ids that the model has no row for.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ConvertError(f"--tokenizer {folder}: no tokenizer.json there; give the folder that holds it")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConvertError(f"--tokenizer {folder}: transformers cannot open it ({error})") from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise ConvertError(
            f"--tokenizer {folder}: its ids go up to {largest}, the model has {vocabulary} rows; give the tokenizer "
            "that the model was trained with"
        )
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    return ExportedTokenizer(
        files=tuple(folder / name for name in _FILES if (folder / name).is_file()),
        num_ids=largest + 1,
        special_ids={name: value for name, value in special.items() if value is not None},
    )
