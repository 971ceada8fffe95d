"""gigatoken in place of the reference tokenizer, where it is installed and proves to give the same ids.

Proof, in this order: before the run, on a sample of the actual input and on a list of difficult strings; during the
run, on an excerpt of one document in every block. Any difference before the run means that the reference is used; one
during the run stops it, and gigatoken's finished shards are withdrawn (`FastShards`). Cost of the check in the run: an
excerpt of 1000 characters per 2 MiB block, about 1 ms.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import TokenizerError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import agreed, counted
from megatron_kaiyuan.preprocess.partial import retire
from megatron_kaiyuan.shards.build_record import BuildRecord
from megatron_kaiyuan.shards.manifest import TokenizerRecord
from megatron_kaiyuan.shards.tokenizer import (
    DocumentTokenizer,
    TokenBatch,
    TokenizerConfig,
    load_reference_tokenizer,
    model_file,
    split_around,
)

__all__ = [
    "DIFFERENCE_FILE",
    "Choice",
    "FastShards",
    "TokenizersDiffer",
    "choose_backend",
    "difficult_texts",
    "gigatoken_name",
    "load_tokenizer",
    "named",
]

_EXCERPT = 1000
DIFFERENCE_FILE = "gigatoken_differs.json"
_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """Which implementation makes the ids, and why."""

    fast: bool
    reason: str
    differs: bool = False
    """gigatoken was tried, and gave other ids."""


class TokenizersDiffer(TokenizerError):
    """gigatoken gave other ids than the reference, in the middle of a run."""


def load_tokenizer(config: TokenizerConfig, *, fast: bool) -> DocumentTokenizer:
    """Return the tokenizer of this process, gigatoken's if `fast`.

    It is built once per process and config.
    """
    return _load_gigatoken(config) if fast else load_reference_tokenizer(config)


def choose_backend(config: TokenizerConfig, sample: Sequence[str]) -> Choice:
    """Use gigatoken if it is installed, knows this tokenizer, and agrees with the reference on every sample.

    Args:
        config: which tokenizer.
        sample: documents of the input.
    """
    if config.type != "HuggingFaceTokenizer":
        # gigatoken also reads SentencePiece models, but takes "</s>" in a text for the token; sentencepiece does not
        return Choice(fast=False, reason=f"{config.type} has no faster implementation with the same ids")
    if config.split_special_tokens:
        return Choice(fast=False, reason="gigatoken has no --split-special-tokens")
    if importlib.util.find_spec("gigatoken") is None:
        return Choice(fast=False, reason="gigatoken is not installed")
    texts = [*sample, *difficult_texts()]
    try:
        difference = _first_difference(load_reference_tokenizer(config), _load_gigatoken(config), texts)
    except Exception as error:  # whatever it raises, it cannot do this tokenizer; the reference can
        first_line = (str(error).splitlines() or [repr(error)])[0]
        return Choice(fast=False, reason=f"gigatoken cannot be used: {first_line}")
    if difference is not None:
        return Choice(fast=False, reason=f"gigatoken gives other ids for {difference!r}", differs=True)
    return Choice(
        fast=True,
        reason=f"it gives the ids of the reference on {counted(len(sample), 'document')} of the input and "
        f"{len(texts) - len(sample)} difficult strings",
    )


def _first_difference(reference: DocumentTokenizer, fast: DocumentTokenizer, texts: Sequence[str]) -> str | None:
    expected, got = reference.encode(texts), fast.encode(texts)
    if np.array_equal(expected.lengths, got.lengths) and np.array_equal(expected.tokens, got.tokens):
        return None
    ends = np.cumsum(expected.lengths)
    if not np.array_equal(expected.lengths, got.lengths):
        first = int(np.flatnonzero(expected.lengths != got.lengths)[0])
    else:
        first = int(np.searchsorted(ends, np.flatnonzero(expected.tokens != got.tokens)[0], side="right"))
    return texts[first][:60]


@functools.lru_cache(maxsize=4)
def _load_gigatoken(config: TokenizerConfig) -> "_Gigatoken":
    return _Gigatoken(config)


class _Gigatoken:
    def __init__(self, config: TokenizerConfig) -> None:
        from gigatoken import Tokenizer

        self._tokenizer = Tokenizer.from_json(model_file(config).read_bytes())
        self._awkward = importlib.import_module("awkward")  # what gigatoken returns; it has no type stubs
        self._reference = load_reference_tokenizer(config)
        self.vocab_size = self._reference.vocab_size
        self.eod_id = self._reference.eod_id
        self.special = self._reference.special
        # of another tokenizer neither is right; the comparison on the sample will say where it differs
        full = self._reference.encode(["a"]).tokens.tolist()
        self._prefix, self._suffix = split_around(self._tokenizer.encode("a").tolist(), full)

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        if not texts:
            return TokenBatch(np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64))
        # one thread here: the worker processes already fill the machine
        rows = self._tokenizer.encode_batch(list(texts), parallel=False)
        lengths = self._awkward.num(rows).to_numpy().astype(np.int64)
        tokens = self._awkward.flatten(rows).to_numpy()
        batch = self._with_added(tokens, lengths)
        self._check_excerpt(texts[len(texts) // 2][:_EXCERPT])
        return batch

    def _with_added(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> TokenBatch:
        if not (self._prefix or self._suffix):
            return TokenBatch(tokens, lengths)
        longer = lengths + len(self._prefix) + len(self._suffix)
        starts = np.cumsum(longer) - longer
        before = starts[:, None] + np.arange(len(self._prefix))
        after = (starts + len(self._prefix) + lengths)[:, None] + np.arange(len(self._suffix))
        whole = np.empty(int(longer.sum()), dtype=tokens.dtype)
        body = np.ones(len(whole), dtype=np.bool_)
        body[before] = body[after] = False
        whole[before], whole[after], whole[body] = self._prefix, self._suffix, tokens
        return TokenBatch(whole, longer)

    def _check_excerpt(self, excerpt: str) -> None:
        expected = self._reference.encode([excerpt]).tokens.tolist()
        got = [*self._prefix, *self._tokenizer.encode(excerpt).tolist(), *self._suffix]
        if expected != got:
            raise TokenizersDiffer(f"gigatoken gives other ids than the reference for {excerpt[:60]!r}")


def difficult_texts() -> list[str]:
    """Strings on which two implementations tend to differ: scripts, joiners, controls, spaces, digits, specials."""
    joined = [
        "e\u0301\u0323",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\U0001f1e9\U0001f1ea",
        "\ufe0f\u20e3",
        "\u0915\u094d\u0937",
    ]
    blanks = [
        " ",
        "  ",
        "\n\n \t\r\n",
        "\u00a0\u2003\u3000",
        "\u200b\ufeff",
        "a  b   c    ",
        " \n lead",
        "\x00\x01\x7f\x85\u2028\u2029",
    ]
    words = [
        "don't I'LL we've O'Neil 'S",
        "fi\ufb01 \u2126 \uff21\uff22 \u00bd \u2460",
        "\u0130\u0131 \u1e9e \u00df SS",
        "x" * 300,
    ]
    numbers = ["3.14159 1,000,000 0x1F 1e-9", "\u0661\u0662\u0663 \u09e7\u09e8 \u4e00\u4e8c\u4e09 \u2167", "1" * 70]
    scripts = [
        "".join(chr(first + step) for step in range(40))
        for first in (
            0xA0,
            0x370,
            0x410,
            0x5D0,
            0x620,
            0x905,
            0xE01,
            0x10A0,
            0x1100,
            0x3041,
            0x4E00,
            0xAC00,
            0x1D400,
            0x1F600,
        )
    ]
    specials = [
        "<|endoftext|>",
        "a<|endoftext|>b </s><s> <unk> <pad>",
        "<|im_start|>user\n<|im_end|>",
        "\u2581a \u2581\u2581b",
    ]
    rare = ["\ufffd", "\ue000", "\U0010fffd", "\u0378", "\U000e0041"]
    texts = ["", *joined, *blanks, *words, *numbers, *scripts, *specials, *rare]
    return [*texts, *(f"{left}{right}" for left, right in zip(texts, reversed(texts), strict=True)), "".join(texts)]


def gigatoken_name() -> str:
    """`gigatoken <version>`, as manifests have it."""
    return f"gigatoken {importlib.metadata.version('gigatoken')}"


class FastShards:
    """The shards of one build that gigatoken made.

    Args:
        folder: Of the shards; None for a single one, which gets its final name only when all of it was checked.
        record: The build.
        tokenizer: Its tokenizer.
    """

    def __init__(self, folder: Path | None, record: BuildRecord, tokenizer: TokenizerRecord) -> None:
        self._folder = folder
        self._record = record
        self._fingerprint = tokenizer.fingerprint

    def known_difference(self) -> str | None:
        """Return the difference that some task detected, None where there is none or for another tokenizer."""
        if self._folder is None:
            return None
        try:
            told = json.loads((self._folder / DIFFERENCE_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return str(told["found"]) if told["tokenizer"] == self._fingerprint else None

    def check(self) -> None:
        """Raise TokenizersDiffer if another task has detected a difference meanwhile.

        To be called after a shard has its name.
        """
        if found := self.known_difference():
            raise TokenizersDiffer(found)

    def withdraw(self) -> list[str]:
        """Remove the shards and return their names."""
        if self._folder is None:
            return []
        prefixes = self._record.builds(self._folder)
        return [Path(prefix).name for prefix in prefixes if retire(prefix, lambda made: made.tokenized_by is None)]

    def condemn(self, found: str) -> list[str]:
        """Record the difference, then remove the shards and return their names.

        In this order no shard that is finished later is missed.
        """
        if self._folder is not None:
            told = {"found": found, "tokenizer": self._fingerprint}
            write_text_atomically(self._folder / DIFFERENCE_FILE, json.dumps(told) + "\n")
        return self.withdraw()

    def stopped_by(self, difference: TokenizersDiffer) -> TokenizerError:
        """Return the error for a run that a detected difference stopped."""
        gone = self.condemn(str(difference))
        if self._folder is None:
            return TokenizerError(f"{difference}; run again with --tokenizer-backend reference")
        return TokenizerError(
            f"{difference}; {named(gone)} taken away, because gigatoken had made them; run the same command again, "
            f"every task of it: it uses the reference now ({self._folder / DIFFERENCE_FILE} says why)"
        )


def named(shards: list[str]) -> str:
    """`2 shards (a, b) were`."""
    if not shards:
        return "no shards were"
    more = f", and {len(shards) - _MOST_NAMED} more" if len(shards) > _MOST_NAMED else ""
    names = f"{', '.join(shards[:_MOST_NAMED])}{more}"
    return f"{counted(len(shards), 'shard')} ({names}) {agreed(len(shards), 'was', 'were')}"
