"""Tiny inputs, tokenizers and an index reader written from the byte table of docs/shards.md alone."""

import gzip
import importlib.util
import json
import struct
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_kaiyuan.preprocess import PreprocessConfig, RunSummary, TokenizerConfig, preprocess, shard_prefix
from megatron_kaiyuan.preprocess.fast_tokenize import difficult_texts
from megatron_kaiyuan.preprocess.pipeline import Progress

REPOSITORY = Path(__file__).parents[3]
NULL_VOCABULARY = 1000


@dataclass
class SilentReporter:
    notes: list[str]
    total_bytes: int = 0
    last: Progress | None = None

    def start(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes

    def note(self, message: str) -> None:
        self.notes.append(message)

    def update(self, progress: Progress) -> None:
        self.last = progress


def null_config(inputs: Sequence[Path], prefix: Path, **settings: Any) -> PreprocessConfig:
    settings.setdefault("tokenizer", TokenizerConfig(type="NullTokenizer", vocab_size=NULL_VOCABULARY))
    return PreprocessConfig(inputs=tuple(map(str, inputs)), output_prefix=str(prefix), **settings)


def folder_config(inputs: Sequence[Path], folder: Path, **settings: Any) -> PreprocessConfig:
    settings.setdefault("tokenizer", TokenizerConfig(type="NullTokenizer", vocab_size=NULL_VOCABULARY))
    return PreprocessConfig(inputs=tuple(map(str, inputs)), output_dir=str(folder), **settings)


def build_folder(inputs: Sequence[Path], folder: Path, **settings: Any) -> RunSummary:
    return preprocess(folder_config(inputs, folder, **settings), SilentReporter([]))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


needs_gigatoken = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gigatoken", "awkward"))),
    reason="no gigatoken, or not its awkward",
)


def build(inputs: Sequence[Path], prefix: Path, **settings: Any) -> RunSummary:
    return preprocess(null_config(inputs, prefix, **settings), SilentReporter([]))


def number_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents for the NullTokenizer: 1 to 30 ids each, with a score and a nested one."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = random.integers(0, NULL_VOCABULARY - 1, size=random.integers(1, 31))
        scores = {"score": float(random.random()), "metadata": {"quality": number}}
        rows.append({"text": " ".join(map(str, ids)), **scores})
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.Codec("zstd").compress(data, asbytes=True)
    path.write_bytes(data)
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group_size: int = 7) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    return path


def output_bytes(prefix: Path | str, key: str = "text") -> dict[str, bytes]:
    """Content of all files of a shard but the manifest, by the part of the name after the prefix."""
    whole = Path(shard_prefix(str(prefix), key))
    files = whole.parent.glob(f"{whole.name}.*")
    return {
        path.name[len(whole.name) :]: path.read_bytes() for path in files if not path.name.endswith("manifest.json")
    }


def read_shard_by_hand(prefix: Path | str) -> list[list[int]]:
    """Documents of a shard, checking every byte of the index on the way."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    assert boundaries == sequences + 1
    assert len(index) == 34 + 12 * sequences + 8 * boundaries
    size, letter = {4: (4, "i"), 8: (2, "H")}[code]
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    assert struct.unpack_from(f"<{boundaries}q", index, 34 + 12 * sequences) == tuple(range(boundaries))
    documents, at = [], 0
    for length, pointer in zip(lengths, pointers, strict=True):
        assert pointer == at
        documents.append(list(struct.unpack_from(f"<{length}{letter}", data, pointer)))
        at += length * size
    assert at == len(data)
    return documents


def training_texts() -> list[str]:
    return [*difficult_texts(), *(f"the quick brown fox number {n} jumps over the lazy dog\n" for n in range(300))]


def save_bpe(folder: Path, *, with_bos: bool = False, eos: str | None = "<|endoftext|>") -> Path:
    """A byte-level BPE as transformers saves it: tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <|endoftext|>", special_tokens=[("<s>", 1), ("<|endoftext|>", 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": eos} if eos else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save_tiktoken(path: Path) -> Path:
    """A vocabulary file as Megatron's TikTokenizer reads it: all bytes, then some words."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" t", b" th", b" the", b"qu", b"\xe4\xb8"]
    entries = [
        {"rank": rank, "token_bytes": b64encode(piece).decode(), "token_str": piece.decode("utf-8", "replace")}
        for rank, piece in enumerate(pieces)
    ]
    path.write_text(json.dumps(entries))
    return path
