"""From the tokens of a window to what Megatron's loop expects of a sample.

The conventions are those of Megatron's GPTDataset, so that its flags keep their meaning: a true entry of the attention
mask hides, and the end-of-document token belongs to the document it ends. Shapes: s = sequence length.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.cli import tool_command
from megatron_kaiyuan.host.terminal import counted, shell_command

__all__ = ["SampleOptions", "first_outside", "make_sample", "outside_vocabulary", "part_of_sample"]


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
    vocabulary: int | None = None
    """Token ids have to be below it; None: nobody looks."""


def make_sample(window: NDArray[np.int64], options: SampleOptions, padding: int = 0) -> dict[str, Tensor]:
    """Split a window into inputs and targets.

    Args:
        window: int64 `[s + 1]`.
        options: Document boundaries.
        padding: Tokens at the window's end that are no text; they are not predicted.

    Returns:
        `tokens`, `labels`, `position_ids` (int64), `loss_mask` (float32, 1 = counts), each `[s]`, and, if asked for,
        `attention_mask` (bool `[1, s, s]`, true = hidden). Mask and positions of windows whose documents are not kept
        apart are the same tensors for all samples, as in Megatron's dataset: collating copies them.
    """
    tokens, labels = window[:-1], window[1:]
    length = len(tokens)
    # Most runs keep no documents apart: what only these options need is half the work of a sample.
    ends = tokens == options.eod_token if _needs_ends(options) else None
    loss_mask, positions = _constants(length)
    starts = None if ends is None else torch.from_numpy(_document_starts(ends))
    if ends is not None and options.eod_mask_loss:
        loss_mask = torch.from_numpy((~ends).astype(np.float32))
    if padding:
        loss_mask = loss_mask.clone()
        loss_mask[length - min(padding, length) :] = 0
    sample = {
        "tokens": torch.from_numpy(tokens.copy()),
        "labels": torch.from_numpy(labels.copy()),
        "loss_mask": loss_mask,
        "position_ids": positions - starts if options.reset_position_ids and starts is not None else positions,
    }
    if options.create_attention_mask:
        first_visible = starts if options.reset_attention_mask and starts is not None else torch.zeros_like(positions)
        sample["attention_mask"] = _hidden(positions, first_visible)[None]
    return sample


def part_of_sample(sample: dict[str, Tensor], start: int, stop: int, padding: int) -> dict[str, Tensor]:
    """Some of a sample's tokens, `[stop - start]`, at the positions that they have in the whole.

    Args:
        sample: of `make_sample`, without a mask of attention.
        start: first of the tokens.
        stop: end of them.
        padding: Tokens at their end that are no text; they are not predicted.
    """
    part = {name: values[start:stop] for name, values in sample.items()}
    if padding:
        part["loss_mask"] = part["loss_mask"].clone()
        part["loss_mask"][stop - start - padding :] = 0
    return part


def first_outside(tokens: NDArray[np.int64], vocabulary: int | None) -> int | None:
    """Return the place of the first id that is no token of the model.

    None where all are, or nobody looks.

    On a GPU such an id ends in an assertion of the embedding that names neither the id nor where it comes from.
    """
    if vocabulary is None or (tokens.min() >= 0 and tokens.max() < vocabulary):
        return None
    return int(np.flatnonzero((tokens < 0) | (tokens >= vocabulary))[0])


def outside_vocabulary(sample: str, shard: str, document: int, token: int, vocabulary: int) -> ShardError:
    """Return the error of a sample with an id that is no token of the model.

    Args:
        sample: Names the sample and its source.
        shard: Prefix of the shard that holds the id.
        document: Its number in the shard.
        token: The id.
        vocabulary: Ids have to be below it.
    """
    command = f"{tool_command('inspect')} {shell_command(shard)} --verify --vocab-size {vocabulary}"
    return ShardError(
        f"{sample}: token id {token} in document {document} of {shard}.bin, but the vocabulary has "
        f"{counted(vocabulary, 'id')}: "
        "the shard was built with another tokenizer, or has been damaged since the run began. Build it again, or copy "
        f"it again, and go on from the last checkpoint. All such ids:\n  {command}"
    )


@lru_cache(maxsize=4)
def _constants(length: int) -> tuple[Tensor, Tensor]:
    """Loss mask and positions of a window whose documents are not kept apart."""
    return torch.ones(length), torch.arange(length)


def _needs_ends(options: SampleOptions) -> bool:
    resets = options.reset_position_ids or options.reset_attention_mask
    return options.eod_token is not None and (options.eod_mask_loss or resets)


def _document_starts(ends: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the position at which the document of each token starts, `[s]`.

    The window's first document starts at 0.
    """
    starts = np.zeros(len(ends), dtype=np.int64)
    after_end = np.flatnonzero(ends[:-1]) + 1
    starts[after_end] = after_end
    return np.maximum.accumulate(starts)


def _hidden(positions: Tensor, first_visible: Tensor) -> Tensor:
    """Entry [query, key] is true where the key comes later, or before the query's first visible position."""
    later = positions[None, :] > positions[:, None]
    earlier_document = positions[None, :] < first_visible[:, None]
    return later | earlier_document
