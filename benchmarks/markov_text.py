"""Invented text for trying a benchmark where there is no corpus: something to learn, and quick to make."""

from pathlib import Path

import numpy as np

from tests.unit_tests.data.tiny import write_shard

__all__ = ["write_markov_text"]


def write_markov_text(prefix: Path, *, vocabulary: int, documents: int) -> None:
    """Write documents of a Markov chain in which each token has four successors, at 60, 25, 10 and 5 percent.

    A model that has learnt it reaches a loss of 1.04 nats a token, the chain's entropy; guessing costs ln(vocabulary).

    Args:
        prefix: Of the shard; its folder is made.
        vocabulary: Number of token ids.
        documents: Of 50 to 400 tokens each.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    successors = rng.integers(0, vocabulary, size=(vocabulary, 4))
    texts = []
    for length in rng.integers(50, 400, size=documents):
        choices = rng.choice(4, size=int(length), p=(0.6, 0.25, 0.1, 0.05))
        token, text = int(rng.integers(vocabulary)), []
        for choice in choices:
            text.append(token)
            token = int(successors[token, choice])
        texts.append(text)
    write_shard(prefix, texts)
