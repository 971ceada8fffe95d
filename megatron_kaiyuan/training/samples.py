"""From the tokens of a window to what Megatron's loop expects of a sample.

The conventions are those of Megatron's GPTDataset, so that its flags keep their meaning: a true entry of the attention
mask hides, and the end-of-document token belongs to the document it ends. Shapes: s = sequence length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SampleOptions", "make_sample"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOptions:
    """How document boundaries inside a window are treated. All off: the window is one stream of text."""

    eod_token: int | None = None
    """Id that ends a document; needed by the three options below."""
    eod_mask_loss: bool = False
    """`--eod-mask-loss`: what follows an end of document is not predicted."""
    reset_position_ids: bool = False
    """`--reset-position-ids`: positions start at 0 in each document."""
    reset_attention_mask: bool = False
    """`--reset-attention-mask`: a token does not see earlier documents; needs the attention mask."""
    create_attention_mask: bool = False
    """The opposite of `--no-create-attention-mask-in-dataloader`; s * s bytes a sample."""


def make_sample(window: NDArray[np.int64], options: SampleOptions) -> dict[str, Tensor]:
    """Split a window into inputs and targets.

    Args:
        window: int64 `[s + 1]`.
        options: Document boundaries.

    Returns:
        `tokens`, `labels`, `position_ids` (int64), `loss_mask` (float32, 1 = counts), each `[s]`, and, if asked for,
        `attention_mask` (bool `[1, s, s]`, true = hidden).
    """
    tokens, labels = window[:-1], window[1:]
    length = len(tokens)
    ends = tokens == options.eod_token if options.eod_token is not None else np.zeros(length, dtype=bool)
    position_ids = np.arange(length, dtype=np.int64)
    starts = _document_starts(ends, position_ids)
    sample = {
        "tokens": torch.from_numpy(tokens.copy()),
        "labels": torch.from_numpy(labels.copy()),
        "loss_mask": torch.from_numpy(np.where(ends & options.eod_mask_loss, 0.0, 1.0).astype(np.float32)),
        "position_ids": torch.from_numpy(position_ids - starts if options.reset_position_ids else position_ids),
    }
    if options.create_attention_mask:
        first_visible = starts if options.reset_attention_mask else np.zeros(length, dtype=np.int64)
        sample["attention_mask"] = torch.from_numpy(_hidden(position_ids, first_visible)[None])
    return sample


def _document_starts(ends: NDArray[np.bool_], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position at which the document of each token starts, `[s]`; the window's first document starts at 0."""
    after_end = np.concatenate([[False], ends[:-1]])
    return np.maximum.accumulate(np.where(after_end, positions, 0))


def _hidden(positions: NDArray[np.int64], first_visible: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Entry [query, key] is true where the key comes later, or before the query's first visible position."""
    later = positions[None, :] > positions[:, None]
    earlier_document = positions[None, :] < first_visible[:, None]
    hidden: NDArray[np.bool_] = later | earlier_document
    return hidden
