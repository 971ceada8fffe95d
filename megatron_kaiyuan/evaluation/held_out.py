"""Held-out loss of checkpoints, by source and quantile band of a plan, in one process."""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from megatron_kaiyuan.checkpoints.checksums import content_fingerprint
from megatron_kaiyuan.checkpoints.identity import end_of_text
from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.data import NUM_BANDS, HeldOutDataset, Plan
from megatron_kaiyuan.errors import ConfigError, PlanError
from megatron_kaiyuan.evaluation.loading import (
    build_untrained,
    load_weights,
    single_process_arguments,
    start_single_process,
)
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.model.document_attention import document_boundaries
from megatron_kaiyuan.model.samples import SampleOptions, make_sample
from megatron_kaiyuan.shards.manifest import TokenizerRecord

__all__ = [
    "CheckpointLoss",
    "SourceLoss",
    "check_counts",
    "document_options",
    "evaluate_checkpoints",
    "results_as_json",
    "window_losses",
]


_DOCUMENT_FLAGS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")


class Windows(Protocol):
    """Held-out windows of one source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]: ...

    def bands(self, index: int) -> NDArray[np.int8]: ...


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """Loss on the held-out documents of one source."""

    loss: float
    """Mean cross-entropy, nats per token."""
    tokens: int
    """Predicted tokens."""
    bits_per_byte: float | None
    """Comparable between tokenizers; None when the bytes of the tokens are not known."""
    bands: tuple[float | None, ...]
    """Loss by quantile band of the documents, lowest scores first, `[NUM_BANDS]`; None where no token was seen."""


@dataclass(frozen=True, slots=True)
class CheckpointLoss:
    """Losses of one state of the weights."""

    label: str
    """Where the weights are from."""
    iteration: int
    """Training steps; 0 for untrained weights."""
    sources: Mapping[str, SourceLoss]
    """By source name, in the plan's order; empty without a plan."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What `more` measured of them, JSON-ready."""
    checkpoint: str | None = None
    """Fingerprint of the files that hold the weights; None for untrained weights."""


def evaluate_checkpoints(
    checkpoints: Sequence[Checkpoint],
    plan: Plan | None,
    *,
    more: Callable[[Any, int], Mapping[str, Any]] = lambda _model, _positions: {},
    untrained: bool = False,
    max_windows: int | None = None,
    batch_size: int = 8,
    bytes_of_token: NDArray[np.int64] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[CheckpointLoss]:
    """Evaluate checkpoints of one model on the held-out documents of a plan, and on what else the caller measures.

    Documents are kept apart, and what follows their ends counts, as in the run that saved the first checkpoint.

    Args:
        checkpoints: At least one; the model is built from the arguments of the first.
        plan: Names the held-out documents; None: there are none.
        more: Called with the model and its longest context (tokens) for each state of the weights.
        untrained: Begin with untrained weights.
        max_windows: Windows of each source; None: all.
        batch_size: Windows in one forward pass.
        bytes_of_token: Bytes of each token id, int64 `[vocabulary]`, see `token_bytes.py`; None: unknown.
        progress: Called with a line of text as each state of the weights is done.

    Raises:
        PlanError: the plan holds out nothing, or its samples are longer than the model's positions.
        ConfigError: a checkpoint is of another model, or a number is below 1.
    """
    check_counts(max_windows, batch_size)
    start_single_process()
    arguments = single_process_arguments(checkpoints[0].arguments)
    positions = int(arguments.max_position_embeddings)
    held_out: dict[str, HeldOutDataset] = {}
    if plan is not None:
        _check_plan(plan, positions)
        plan.check_vocabulary(arguments.padded_vocab_size)
        held_out = {name: HeldOutDataset(plan, name) for name in plan.validation}
        options = document_options(arguments, plan.tokenizer_record)
    model = build_untrained(arguments)
    results = []
    for label, iteration, checkpoint in _states(checkpoints, untrained=untrained):
        if checkpoint is not None:
            load_weights(model, checkpoint)
        losses = {
            name: _source_loss(model, windows, options, max_windows, batch_size, bytes_of_token)
            for name, windows in held_out.items()
        }
        files = None if checkpoint is None else content_fingerprint(checkpoint.folder)
        results.append(CheckpointLoss(label, iteration, losses, more(model, positions), files))
        progress(f"{label}: " + ", ".join(f"{name} {result.loss:.3f}" for name, result in losses.items()))
    return results


def check_counts(windows: int | None, batch_size: int) -> None:
    """Refuse to evaluate nothing.

    Raises:
        ConfigError: names the flag.
    """
    for flag, value in (("--windows", windows), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")


def _states(checkpoints: Sequence[Checkpoint], *, untrained: bool) -> Iterator[tuple[str, int, Checkpoint | None]]:
    if untrained:
        yield "untrained", 0, None
    for checkpoint in checkpoints:
        yield str(checkpoint.folder), checkpoint.iteration, checkpoint


def _check_plan(plan: Plan, positions: int) -> None:
    if not plan.validation:
        raise PlanError("the plan holds out no documents; add a validation section to it and train with it")
    if plan.seq_length > positions:
        raise PlanError(
            f"the plan cuts samples of seq_length {plan.seq_length}, but the model has "
            f"{counted(positions, 'position')} "
            "(--max-position-embeddings of its run); give the plan of that run"
        )


def _source_loss(
    model: Any,
    windows: Windows,
    options: SampleOptions,
    max_windows: int | None,
    batch_size: int,
    bytes_of_token: NDArray[np.int64] | None,
) -> SourceLoss:
    count = len(windows) if max_windows is None else min(max_windows, len(windows))
    sums = np.zeros((NUM_BANDS + 1, 2))  # loss and tokens by band, and last of what has no band
    text_bytes = 0
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        rows = np.stack([windows[index]["tokens"] for index in numbers])
        losses, counts = window_losses(model, rows, options)
        bands = np.stack([windows.bands(index) for index in numbers]).astype(np.int64)
        cells = np.where(bands < 0, NUM_BANDS, bands).ravel()
        sums[:, 0] += np.bincount(cells, weights=losses.ravel(), minlength=NUM_BANDS + 1)
        sums[:, 1] += np.bincount(cells, weights=counts.ravel(), minlength=NUM_BANDS + 1)
        if bytes_of_token is not None:
            text_bytes += int(bytes_of_token[rows[:, 1:]][counts].sum())
    total, tokens = sums.sum(axis=0).tolist()
    return SourceLoss(
        loss=total / tokens if tokens else math.nan,
        tokens=int(tokens),
        bits_per_byte=total / math.log(2) / text_bytes if text_bytes else None,
        bands=tuple(loss / seen if seen else None for loss, seen in sums[:NUM_BANDS].tolist()),
    )


def document_options(arguments: argparse.Namespace, record: TokenizerRecord | None) -> SampleOptions:
    """Return how a run treats the documents of a window.

    Args:
        arguments: From `single_process_arguments`.
        record: Tokenizer of the shards, if they name one.

    Raises:
        ConfigError: the run kept documents apart, and the id at which they end is not known.
    """
    kept = {name: bool(getattr(arguments, name, False)) for name in _DOCUMENT_FLAGS}
    eod = end_of_text(arguments)
    if eod is None and record is not None:
        eod = record.eod_id
    if eod is None and any(kept.values()):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name, on in kept.items() if on)
        raise ConfigError(
            f"the checkpoint was trained with {flags}, but neither it nor the manifests of the plan's shards tell "
            "the id that ends a document; give a plan of shards that have manifests"
        )
    dense = kept["reset_attention_mask"] and arguments.create_attention_mask_in_dataloader
    return SampleOptions(eod_token=eod, create_attention_mask=dense, **kept)


@torch.no_grad()
def window_losses(
    model: Any, rows: NDArray[np.int64], options: SampleOptions
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the cross-entropy of each predicted token, and which tokens count.

    Args:
        model: In evaluation mode.
        rows: int64 `[b, s + 1]`.
        options: From `document_options`.

    Returns:
        Nats `[b, s]`, 0 where a token does not count, and which do, `[b, s]`.
    """
    batch = default_collate([make_sample(row, options) for row in rows])
    counts = batch.pop("loss_mask").bool().numpy()
    batch = {name: value.cuda() for name, value in batch.items()}
    mask = batch.get("attention_mask")
    if options.reset_attention_mask and mask is None:
        mask = document_boundaries(batch["position_ids"])
    losses = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"]).double().cpu().numpy()
    return np.where(counts, losses, 0.0), counts


def results_as_json(results: Sequence[CheckpointLoss], plan: Plan | None) -> str:
    """Return the results as JSON text, with the fingerprint of their plan.

    What `more` measured stands beside.
    """
    rows = [asdict(result) for result in results]
    content = {
        "plan_fingerprint": None if plan is None else plan.fingerprint,
        "results": [{**row, **row.pop("more")} for row in rows],
    }
    return json.dumps(content, indent=2) + "\n"
