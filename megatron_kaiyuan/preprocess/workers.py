"""What the worker processes do: parse a block, tokenize it, and send back ids in the type they have on disk.

Blocks come back in the order they were cut, so the output does not depend on the number of workers. At most
`_BLOCKS_PER_WORKER` blocks a worker are in flight, which bounds memory whatever the input.
"""

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import compress
from multiprocessing import forkserver
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import PreprocessError, TokenizerError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.preprocess.documents import DocumentBatch, Fault, parse_block
from megatron_kaiyuan.preprocess.fast_tokenize import load_tokenizer
from megatron_kaiyuan.preprocess.fields import FieldKeys, Reason
from megatron_kaiyuan.preprocess.readers import Block
from megatron_kaiyuan.shards.special_tokens import SpecialCounts
from megatron_kaiyuan.shards.tokenizer import TokenBatch, TokenizerConfig

__all__ = [
    "BlockResult",
    "Job",
    "ordered_results",
    "pool_context",
    "process_block",
    "start_pool",
    "warm_up",
    "worker_died",
]

_BLOCKS_PER_WORKER = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs beside the block."""

    keys: FieldKeys
    tokenizer: TokenizerConfig
    fast: bool
    append_eod: bool
    max_tokens: int | None
    dtype: str


@dataclass(frozen=True, slots=True)
class BlockResult:
    """A block turned into ids."""

    source: int
    input_bytes: int
    rows: int
    outputs: tuple[TokenBatch, ...]
    """One per text key, of the shard's dtype."""
    special: tuple[SpecialCounts, ...]
    """Special tokens inside the texts, one per text key."""
    scores: NDArray[np.float64]
    row_numbers: NDArray[np.int64]
    """Row of each document in the block."""
    offsets: NDArray[np.int64] | None
    """Byte of each document's line in its file."""
    ids: list[str] | None
    skipped: dict[Reason, int]
    first_faults: tuple[Fault, ...]
    """The first of each reason."""


def ordered_results(blocks: Iterable[Block], job: Job, workers: int) -> Iterator[BlockResult]:
    """Yield the results of all blocks in their order.

    One worker works in this process.

    Raises:
        PreprocessError: a worker process died.
    """
    if workers == 1:
        for block in blocks:
            yield process_block(block, job)
        return
    pending: deque[Future[BlockResult]] = deque()
    pool = start_pool(workers)
    try:
        for block in blocks:
            pending.append(pool.submit(process_block, block, job))
            if len(pending) >= workers * _BLOCKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise worker_died() from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def worker_died() -> PreprocessError:
    """Return the error for a process of the pool that is gone."""
    return PreprocessError(
        "a worker process died, most likely for want of memory; run the same command again with fewer --workers: what "
        "is finished stays, nothing torn has a final name"
    )


def start_pool(
    workers: int, prepare: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """Return a pool of worker processes that share the imports of one server process.

    `prepare(*arguments)` runs first in each.
    """
    context = pool_context()
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(prepare, arguments))


def warm_up() -> None:
    """Start the process that workers are forked from.

    It imports what they need while the caller goes on.
    """
    pool_context()
    forkserver.ensure_running()


def pool_context() -> multiprocessing.context.ForkServerContext:
    """The context of `start_pool`, for values that its processes share."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Prepare a worker: one thread, deaf to Ctrl-C (the main process ends it), and gone when the main process is."""
    if prepare is not None:
        prepare(*arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when the main process ends in any way, SIGKILL included
        os._exit(1)


def process_block(block: Block, job: Job) -> BlockResult:
    """Parse and tokenize one block.

    A row that is faulty under any text key is left out under all of them.
    """
    batch = parse_block(block, job.keys)
    tokenizer = load_tokenizer(job.tokenizer, fast=job.fast)
    encoded = [tokenizer.encode([texts[column] for texts in batch.texts]) for column in range(len(job.keys.text))]
    kept = _kept_documents(batch, encoded, job)
    eod_id = tokenizer.eod_id if job.append_eod else None
    kept_ids = [_selected(tokens, kept, eod_id, np.dtype(job.dtype)) for tokens in encoded]
    special = [
        SpecialCounts.of(ids.tokens, ids.lengths, tokenizer.special, appended=eod_id is not None) for ids in kept_ids
    ]
    first: dict[Reason, Fault] = {}
    for fault in sorted(batch.faults, key=lambda fault: fault.row):
        byte = None if batch.offsets is None else int(batch.offsets[fault.row])
        first.setdefault(fault.reason, replace(fault, byte=byte))
    return BlockResult(
        source=block.source,
        input_bytes=block.input_bytes,
        rows=batch.rows,
        outputs=tuple(ids if eod_id is None else _ended(ids, eod_id) for ids in kept_ids),
        special=tuple(special),
        scores=batch.score_matrix(len(job.keys.scores))[kept],
        row_numbers=(numbers := np.array(batch.row_numbers, dtype=np.int64)[kept]),
        offsets=None if batch.offsets is None else batch.offsets[numbers],
        ids=None if job.keys.id is None else list(compress(batch.ids, kept.tolist())),
        skipped=dict(Counter(fault.reason for fault in batch.faults)),
        first_faults=tuple(first.values()),
    )


def _kept_documents(batch: DocumentBatch, encoded: Sequence[TokenBatch], job: Job) -> NDArray[np.bool_]:
    """Mark documents to keep, bool `[documents]`, and note a fault for each of the others."""
    kept = np.ones(len(batch.texts), dtype=np.bool_)
    for column, (key, tokens) in enumerate(zip(job.keys.text, encoded, strict=True)):
        # a tokenizer may put <s> even before nothing
        empty = (tokens.lengths == 0) | np.array([not texts[column] for texts in batch.texts], dtype=np.bool_)
        limit = job.max_tokens if job.max_tokens is not None else np.iinfo(np.int32).max - 1
        for document in np.flatnonzero(kept & (empty | (tokens.lengths > limit))).tolist():
            kept[document] = False
            reason, detail = (
                Reason.TOO_LONG,
                f"field {key!r} has {counted(tokens.lengths[document], 'token')}, the limit is {limit}",
            )
            if document in tokens.faults:
                reason, detail = Reason.NOT_TOKENIZABLE, f"field {key!r}: {tokens.faults[document]}"
            elif empty[document]:
                reason, detail = Reason.EMPTY_DOCUMENT, f"field {key!r} has no tokens"
            batch.faults.append(Fault(batch.row_numbers[document], reason, detail))
    return kept


def _selected(
    batch: TokenBatch, kept: NDArray[np.bool_], eod_id: int | None, dtype: np.dtype[np.generic]
) -> TokenBatch:
    tokens, lengths = batch.tokens, batch.lengths
    if not kept.all():
        tokens, lengths = tokens[np.repeat(kept, lengths)], lengths[kept]
    highest = max(int(tokens.max(initial=0)), eod_id or 0)
    if highest > np.iinfo(dtype.name).max:
        raise TokenizerError(
            f"token id {highest} does not fit {dtype}, the type Megatron chooses for this vocabulary size; the "
            "vocabulary has gaps: renumber it"
        )
    return TokenBatch(tokens.astype(dtype), lengths)


def _ended(batch: TokenBatch, eod_id: int) -> TokenBatch:
    """The documents with the end-of-document id behind each."""
    tokens = np.insert(batch.tokens, np.cumsum(batch.lengths), batch.tokens.dtype.type(eod_id))
    return TokenBatch(tokens, batch.lengths + 1)
