"""Megatron's layout of a tiktoken vocabulary: special tokens take the first ids, the ranks of its JSON file follow."""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kaiyuan.errors import TokenizerError
from megatron_kaiyuan.host.terminal import counted

if TYPE_CHECKING:
    import tiktoken

__all__ = ["TIKTOKEN_VOCABULARY", "tiktoken_encoding"]

TIKTOKEN_VOCABULARY = 1 << 17
"""Ids where no `--vocab-size` is given, special ones included."""
_SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": "|".join(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
}


def tiktoken_encoding(
    model: str | None, content: bytes, *, pattern: str, num_special_tokens: int, vocab_size: int | None
) -> "tiktoken.Encoding":
    """Return the encoding of a vocabulary.

    Args:
        model: Names the file, for messages.
        content: Of the file.
        pattern: `--tiktoken-pattern`, v1 or v2.
        num_special_tokens: Ids below it are reserved for special tokens.
        vocab_size: Ids in all; None: `TIKTOKEN_VOCABULARY`.

    Raises:
        TokenizerError: the file is no such vocabulary, or the numbers do not fit it.
    """
    import tiktoken

    size, reserved = vocab_size or TIKTOKEN_VOCABULARY, num_special_tokens
    if not len(_SPECIALS) <= reserved < size:
        raise TokenizerError(
            f"--tiktoken-num-special-tokens {reserved}: must lie between {len(_SPECIALS)} and the vocabulary of {size}"
        )
    names = [*_SPECIALS, *(f"<SPECIAL_{number}>" for number in range(len(_SPECIALS), reserved))]
    return tiktoken.Encoding(
        name=Path(model or "").stem,
        pat_str=_PATTERNS[pattern],
        mergeable_ranks=_ranks(model, content, size - reserved, reserved),
        special_tokens={name: number for number, name in enumerate(names)},
    )


def _ranks(model: str | None, content: bytes, count: int, offset: int) -> dict[bytes, int]:
    entries = json.loads(content)
    if not isinstance(entries, list) or not entries or not {"rank", "token_bytes"} <= set(entries[0]):
        raise TokenizerError(
            f"--tokenizer-model {model}: a TikTokenizer vocabulary is a JSON list of objects with rank, token_bytes "
            "(base64) and token_str, as Megatron reads it; convert the file"
        )
    if len(entries) < count:
        raise TokenizerError(
            f"--tokenizer-model {model}: {counted(len(entries), 'rank')}, but a vocabulary of {count + offset} with "
            f"{offset} "
            f"special tokens needs {count}; give --vocab-size {len(entries) + offset}"
        )
    return {base64.b64decode(entry["token_bytes"]): entry["rank"] + offset for entry in entries[:count]}
