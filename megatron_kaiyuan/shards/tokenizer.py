"""Tokenizers by Megatron's `--tokenizer-type` names, giving the ids that Megatron's own wrappers give.

Nothing here imports torch, Megatron or transformers: the libraries below those wrappers (tokenizers, sentencepiece,
tiktoken) are called directly, and only the one that is asked for is imported.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import TokenizerError
from megatron_kaiyuan.host.files import read_regular
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.special_tokens import SpecialIds
from megatron_kaiyuan.shards.tiktoken_layout import TIKTOKEN_VOCABULARY, tiktoken_encoding

__all__ = [
    "TOKENIZER_TYPES",
    "DocumentTokenizer",
    "TextTokenizer",
    "TokenBatch",
    "TokenizerConfig",
    "load_reference_tokenizer",
    "model_file",
    "tokenizer_fingerprint",
]

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = ("HuggingFaceTokenizer", *SENTENCEPIECE_TYPES, "TikTokenizer", "NullTokenizer")
_KNOWN_EOD_TOKENS = ("<|endoftext|>", "</s>", "<eod>", "<|end_of_text|>")
_MOST_MISSING = 8
_MOST_SHOWN = 40
"""Characters of a document in a message about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """What decides the ids.

    Hashable, so that each process builds a tokenizer once.
    """

    type: str
    """One of `TOKENIZER_TYPES`."""
    model: str | None = None
    """Directory or tokenizer.json (HuggingFaceTokenizer), .model (SentencePiece), vocabulary .json (TikTokenizer)."""
    vocab_size: int | None = None
    """Needed by NullTokenizer; caps TikTokenizer (131072 when left out); elsewhere the model decides."""
    eod_token: str | None = None
    """Token that ends a document; None: what the tokenizer declares, else a well-known name in its vocabulary."""
    include_special_tokens: bool = True
    """HuggingFaceTokenizer: add what its post-processor adds (such as a leading <s>), as Megatron does by default."""
    split_special_tokens: bool = False
    """Encode a special token that stands in a text, such as `<|endoftext|>`, as the characters it is written with."""
    tiktoken_pattern: Literal["v1", "v2"] = "v2"
    tiktoken_num_special_tokens: int = 1000
    """TikTokenizer: ids below this number are reserved for special tokens."""

    def __post_init__(self) -> None:
        if self.type not in TOKENIZER_TYPES:
            raise TokenizerError(f"--tokenizer-type {self.type}: not known; choose one of {', '.join(TOKENIZER_TYPES)}")
        if self.type == "NullTokenizer":
            if self.split_special_tokens:
                raise TokenizerError("--split-special-tokens: the text of a NullTokenizer is ids; leave the flag out")
            if self.vocab_size is None or self.vocab_size < 1:
                raise TokenizerError(f"--vocab-size {self.vocab_size}: NullTokenizer needs a positive --vocab-size")
        elif self.model is None:
            raise TokenizerError(f"--tokenizer-model is missing: {self.type} is read from a file")
        elif self.vocab_size is not None and self.type != "TikTokenizer":
            raise TokenizerError(f"--vocab-size {self.vocab_size}: {self.type} brings its own; leave the flag out")


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Ids of several documents, one after another."""

    tokens: NDArray[np.integer]
    """`[sum(lengths)]`."""
    lengths: NDArray[np.int64]
    """`[documents]`."""
    faults: dict[int, str] = field(default_factory=dict)
    """Documents that cannot be tokenized, with the reason; their length is 0."""


class DocumentTokenizer(Protocol):
    """What the pipeline needs of a tokenizer."""

    vocab_size: int
    """Entries, added tokens included, as Megatron counts them for the type of the ids on disk."""
    eod_id: int | None
    special: SpecialIds
    """Its special tokens, the end-of-document id among them."""

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Ids of each text, without an end-of-document id."""
        ...


class TextTokenizer(DocumentTokenizer, Protocol):
    """One that also knows the way back."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names."""
        ...


def tokenizer_fingerprint(config: TokenizerConfig) -> str:
    """Sha256 of what decides the ids: the content of the tokenizer's file, and options that are not at their default.

    The path, the `--tokenizer-type` alias and the end-of-document token are no part of it.

    Raises:
        TokenizerError: the file is missing or cannot be read.
    """
    options: dict[str, object] = {}
    if config.type == "HuggingFaceTokenizer" and not config.include_special_tokens:
        options["include_special_tokens"] = False
    if config.type == "TikTokenizer":
        vocab_size = config.vocab_size or TIKTOKEN_VOCABULARY
        options["layout"] = [config.tiktoken_pattern, config.tiktoken_num_special_tokens, vocab_size]
    if config.split_special_tokens and config.type not in SENTENCEPIECE_TYPES:  # which splits them in any case
        options["split_special_tokens"] = True
    content = b"NullTokenizer %d" % (config.vocab_size or 0) if config.type == "NullTokenizer" else _read_model(config)
    suffix = json.dumps(options, sort_keys=True).encode() if options else b""
    return hashlib.sha256(content + suffix).hexdigest()


def model_file(config: TokenizerConfig) -> Path:
    """The file that holds the tokenizer's content."""
    path = Path(config.model or "")
    if config.type == "HuggingFaceTokenizer" and path.is_dir():
        path /= "tokenizer.json"
        if not path.exists():
            raise TokenizerError(
                f"--tokenizer-model {config.model}: the directory has no tokenizer.json; write one with "
                "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
    return path


def _read_model(config: TokenizerConfig) -> bytes:
    try:
        return read_regular(model_file(config))
    except OSError as error:
        raise TokenizerError(
            f"--tokenizer-model {config.model}: {error.strerror} (looked in {Path.cwd()}); give the path of the "
            f"{config.type}'s file"
        ) from error


@functools.lru_cache(maxsize=4)
def load_reference_tokenizer(config: TokenizerConfig) -> TextTokenizer:
    """Return the tokenizer on the library that Megatron uses for this type.

    It is built once per process and config.

    Raises:
        TokenizerError: the library or the file is missing, the file is damaged, or `eod_token` is not in it.
    """
    if config.type == "NullTokenizer":
        return _NullTokenizer(config)
    content = _read_model(config)
    builders: dict[str, Callable[[TokenizerConfig, bytes], TextTokenizer]] = {
        "HuggingFaceTokenizer": _HuggingFace,
        "TikTokenizer": _TikToken,
    }
    try:
        return builders.get(config.type, _SentencePiece)(config, content)
    except TokenizerError:
        raise
    except ModuleNotFoundError as error:
        raise TokenizerError(f"--tokenizer-type {config.type}: needs the package {error.name}; install it") from error
    except Exception as error:  # the libraries raise bare Exception, RuntimeError, or what their Rust side panics with
        raise TokenizerError(
            f"--tokenizer-model {model_file(config)}: cannot be loaded as {config.type}: {error}; check the file and "
            "the type"
        ) from error


def _joined(rows: Sequence[Sequence[int]], faults: dict[int, str] | None = None) -> TokenBatch:
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    tokens = np.fromiter((token for row in rows for token in row), dtype=np.int64, count=int(lengths.sum()))
    return TokenBatch(tokens, lengths, faults or {})


class _NullTokenizer:
    """Text that already is ids, separated by single spaces."""

    def __init__(self, config: TokenizerConfig) -> None:
        assert config.vocab_size is not None
        self.vocab_size = config.vocab_size
        self.eod_id: int | None = self.vocab_size - 1
        if config.eod_token is not None:
            if not config.eod_token.isdecimal() or int(config.eod_token) >= self.vocab_size:
                raise TokenizerError(f"--eod-token {config.eod_token}: not an id below {self.vocab_size}")
            self.eod_id = int(config.eod_token)
        self.special = SpecialIds({self.eod_id: str(self.eod_id)}, self.eod_id)

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        rows: list[list[int]] = []
        faults = {}
        for number, text in enumerate(texts):
            row: list[int] = []
            try:
                row = [int(word) for word in text.split(" ")] if text else []
            except ValueError:
                faults[number] = f"{_shown(text)} is not a list of ids with single spaces between them"
            if row and not 0 <= min(row) <= max(row) < self.vocab_size:
                ids = f"ids from {_shown(min(row))} to {_shown(max(row))}"
                faults[number] = f"{ids}, the vocabulary has {self.vocab_size}"
                row = []
            rows.append(row)
        return _joined(rows, faults)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:_MOST_SHOWN]}{'...' if len(text) > _MOST_SHOWN else ''}"


class _HuggingFace:
    def __init__(self, config: TokenizerConfig, content: bytes) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        self._tokenizer.no_truncation()  # some files carry the limits of a model; a document is never cut
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = config.split_special_tokens
        self._special = config.include_special_tokens
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        _refuse_gaps(config, self._tokenizer.get_vocab(with_added_tokens=True).values())
        declared = _declared_by_transformers(model_file(config).parent, self._tokenizer.token_to_id)
        self.eod_id = _find_eod(config, declared, self._tokenizer.token_to_id)
        added = self._tokenizer.get_added_tokens_decoder().items()
        names = {number: token.content for number, token in added if token.special}
        self.special = SpecialIds(self._with_eod(names), self.eod_id, *self._around())

    def _with_eod(self, names: dict[int, str]) -> dict[int, str]:
        return names if self.eod_id is None else {self.eod_id: self._tokenizer.id_to_token(self.eod_id) or "", **names}

    def _around(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        if not self._special:
            return [], []
        bare, full = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        return split_around(bare, full)

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        # one text a call: a longer batch would start as many threads as the machine has cores in every worker
        encode = self._tokenizer.encode_batch_fast
        return _joined([encode([text], add_special_tokens=self._special)[0].ids for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class _SentencePiece:
    def __init__(self, config: TokenizerConfig, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_proto=content)
        self.vocab_size = int(self._processor.get_piece_size())
        eos = int(self._processor.eos_id())
        declared = self._processor.id_to_piece(eos) if eos >= 0 else None
        self.eod_id = _find_eod(config, declared, self._piece_to_id)
        names = {} if self.eod_id is None else {self.eod_id: str(self._processor.id_to_piece(self.eod_id))}
        self.special = SpecialIds(names, self.eod_id)

    def _piece_to_id(self, piece: str) -> int | None:
        number = int(self._processor.piece_to_id(piece))
        return number if self._processor.id_to_piece(number) == piece else None

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        return _joined([self._processor.encode(text, out_type=int) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))


class _TikToken:
    def __init__(self, config: TokenizerConfig, content: bytes) -> None:
        self._encoding = tiktoken_encoding(
            config.model,
            content,
            pattern=config.tiktoken_pattern,
            num_special_tokens=config.tiktoken_num_special_tokens,
            vocab_size=config.vocab_size,
        )
        self.vocab_size = config.vocab_size or TIKTOKEN_VOCABULARY
        specials: dict[str, int] = self._encoding._special_tokens
        self.eod_id = _find_eod(config, "</s>", specials.get)
        self.special = SpecialIds({number: name for name, number in specials.items()}, self.eod_id)
        self._split = config.split_special_tokens

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        if self._split:
            return _joined([self._encoding.encode_ordinary(text) for text in texts])
        return _joined([self._encoding.encode(text, allowed_special="all") for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._encoding.decode(list(ids)))


def _refuse_gaps(config: TokenizerConfig, ids: Iterable[int]) -> None:
    """Refuse ids beyond the number of entries: Megatron sizes the vocabulary, and the embedding, by that number."""
    present = set(ids)
    largest = max(present, default=-1)
    if largest < len(present):
        return
    missing = sorted(set(range(largest + 1)) - present)
    named = ", ".join(map(str, missing[:_MOST_MISSING])) + (", ..." if len(missing) > _MOST_MISSING else "")
    raise TokenizerError(
        f"--tokenizer-model {config.model}: the vocabulary has gaps: {counted(len(present), 'entry', 'entries')} with "
        f"ids up to {largest}, "
        f"no entry for {len(missing)} of them ({named}); Megatron makes {counted(len(present), 'row')}. Renumber it, "
        "or add an "
        'entry such as "<unused>" with a name of its own for each missing id to model.vocab in tokenizer.json'
    )


def split_around(bare: Sequence[int], full: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return what stands before and after `bare` in `full`, nothing where `bare` is not in it."""
    for start in range(len(full) - len(bare) + 1):
        if list(full[start : start + len(bare)]) == list(bare):
            return list(full[:start]), list(full[start + len(bare) :])
    return [], []


def _declared_by_transformers(folder: Path, token_to_id: Callable[[str], int | None]) -> str | None:
    """End token of a tokenizer_config.json beside the file, after checking that both describe the same vocabulary."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    settings = json.loads(read_regular(path))
    for number, token in settings.get("added_tokens_decoder", {}).items():
        if token_to_id(token["content"]) != int(number):
            raise TokenizerError(
                f"{path}: token {token['content']!r} has id {number} there and {token_to_id(token['content'])} in "
                "tokenizer.json; save both again with transformers' save_pretrained"
            )
    declared = settings.get("eos_token") or settings.get("sep_token")
    content = declared["content"] if isinstance(declared, dict) else declared
    return None if content is None else str(content)


def _find_eod(config: TokenizerConfig, declared: str | None, token_to_id: Callable[[str], int | None]) -> int | None:
    wanted = config.eod_token or declared
    if wanted is None:
        known = (token_to_id(name) for name in _KNOWN_EOD_TOKENS)
        return next((number for number in known if number is not None), None)
    number = token_to_id(wanted)
    if number is None:
        flag = "--eod-token" if config.eod_token else "the end token of tokenizer_config.json,"
        raise TokenizerError(f"{flag} {wanted!r}: not in the vocabulary of {config.model}; name a token that is")
    return int(number)
