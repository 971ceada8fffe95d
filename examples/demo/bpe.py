"""The demo's tokenizer: byte-level BPE trained on the demo's own corpus."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["END_OF_TEXT", "corpus_texts", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
"""Separates documents; the only special token."""


def corpus_texts(files: Sequence[Path]) -> Iterator[str]:
    """Column `text` of JSONL and Parquet files, one document at a time."""
    for path in files:
        if path.suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=["text"]):
                yield from batch.column(0).to_pylist()
        else:
            with path.open(encoding="utf-8") as stream:
                for line in stream:
                    yield json.loads(line)["text"]


def train_tokenizer(texts: Iterator[str], output: Path, vocab_size: int) -> int:
    """Train and write a folder that `--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER` reads.

    Args:
        texts: Documents to train on.
        output: Folder of `tokenizer.json` and `tokenizer_config.json`.
        vocab_size: Entries including the 256 bytes and the end-of-text token.

    Returns:
        Entries of the vocabulary; fewer than asked when the text is too small for as many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": 1_000_000_000,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    unfinished = output / "tokenizer.json.tmp"
    tokenizer.save(os.fspath(unfinished))
    unfinished.replace(output / "tokenizer.json")
    return int(tokenizer.get_vocab_size())
