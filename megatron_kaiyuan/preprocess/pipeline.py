"""From documents to shards, on all cores and, where asked, as one task of many.

A folder of shards is built shard by shard, a process each, from reading to writing; nothing grows with the
input, and there is no file that two processes write. A single shard, or fewer shards than processes, is cut into blocks
that workers turn into ids and the main process writes in order. Either way the bytes are the same.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from megatron_kaiyuan.errors import ConfigError, TokenizerError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.preprocess.build_folder import (
    ShardTask,
    changed_inputs,
    check_claim,
    claim_folder,
    plan_build,
    shard_tasks,
)
from megatron_kaiyuan.preprocess.config import PreprocessConfig
from megatron_kaiyuan.preprocess.documents import parse_block
from megatron_kaiyuan.preprocess.fast_tokenize import (
    FastShards,
    TokenizersDiffer,
    choose_backend,
    gigatoken_name,
    named,
)
from megatron_kaiyuan.preprocess.fields import FieldKeys
from megatron_kaiyuan.preprocess.input_search import Search
from megatron_kaiyuan.preprocess.inputs import (
    STDIN,
    InputFile,
    Part,
    describe_left_out,
    find_inputs,
    part_bytes,
    refuse_output_among_inputs,
)
from megatron_kaiyuan.preprocess.partial import is_complete, is_of_build, refuse_existing
from megatron_kaiyuan.preprocess.readers import read_blocks
from megatron_kaiyuan.preprocess.shard_build import BuildJob, Progress, ShardOutcome, build_shard
from megatron_kaiyuan.preprocess.workers import Job, pool_context, start_pool, warm_up, worker_died
from megatron_kaiyuan.preprocess.writer import optimal_dtype
from megatron_kaiyuan.shards.build_record import BuildRecord, load_build
from megatron_kaiyuan.shards.manifest import LeftOutRecord, Manifest, TokenizerRecord, load_manifest
from megatron_kaiyuan.shards.tokenizer import DocumentTokenizer, load_reference_tokenizer, tokenizer_fingerprint

__all__ = ["Progress", "Reporter", "RunSummary", "preprocess"]

_SAMPLE_FILES = 4
_SAMPLE_DOCUMENTS = 64
_SAMPLE_CHARACTERS = 4000
_SECONDS_BETWEEN_UPDATES = 0.2
_MOST_RECORDED = 20
"""Entries that manifests name of each reason for leaving them out."""


class Reporter(Protocol):
    """Hears about a run while it goes on."""

    def start(self, total_bytes: int) -> None:
        """Report the start once, before the first block, with 0 bytes where the input's size is unknown."""
        ...

    def note(self, message: str) -> None:
        """One line that a user should see."""
        ...

    def update(self, progress: Progress) -> None:
        """Now and then, with the totals so far."""
        ...


@dataclass(slots=True)
class RunSummary:
    """What a run did."""

    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Of the shards of this task, by prefix; those that were complete before the run included."""
    shards_built: int = 0
    shards_kept: int = 0
    """Shards of this task that an earlier run of the same command had finished."""
    shards_of_others: int = 0
    """Shards that belong to other tasks."""
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows without a document, per reason, in all shards of this task."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of each reason in this run: `file:row: what is wrong`."""

    def add(self, outcome: ShardOutcome) -> None:
        """Count a shard that was just built."""
        self.shards_built += 1
        self.manifests |= outcome.manifests
        self._count(outcome.rows, outcome.skipped)
        for reason, example in outcome.examples.items():
            self.examples.setdefault(reason, example)

    def keep(self, prefixes: Sequence[str]) -> None:
        """Count a shard that was there."""
        self.shards_kept += 1
        found = {prefix: load_manifest(prefix) for prefix in prefixes}
        self.manifests |= found
        first = found[prefixes[0]]
        self._count(sum(record.rows for record in first.inputs), first.skipped)

    def _count(self, rows: int, skipped: dict[str, int]) -> None:
        self.rows += rows
        for reason, count in skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count


@dataclass(frozen=True, slots=True)
class Start:
    """What a run knows before its first shard."""

    inputs: list[InputFile]
    search: Search
    """How the files were collected."""
    tokenizer: DocumentTokenizer
    described: TokenizerRecord


def prepare(config: PreprocessConfig, reporter: Reporter) -> Start:
    """List the input and open the tokenizer, without changing anything on disk.

    Raises:
        ConfigError, TokenizerError, PreprocessError: as `preprocess`.
    """
    inputs, search = find_inputs(config.inputs)
    refuse_output_among_inputs(search, Path(config.output_dir or Path(config.output_prefix or "").parent))
    if told := describe_left_out(search):
        reporter.note(f"--input: {told.removeprefix(', ')}; docs/shards.md says what is read")
    tokenizer = _checked_tokenizer(config)
    if config.append_eod and tokenizer.special.ends_itself:
        reporter.note(
            f"warning: the tokenizer's post-processor ends each text with id {tokenizer.eod_id} itself; --append-eod "
            "adds a second one: leave it out, or give --tokenizer-hf-no-include-special-tokens"
        )
    return Start(inputs, search, tokenizer, _describe(config, tokenizer))


def preprocess(config: PreprocessConfig, reporter: Reporter) -> RunSummary:
    """Build the shards, or those of them that this task has to build and that are not there yet.

    Raises:
        ConfigError: flags that cannot work, or an output that exists and is not of this command.
        TokenizerError: no such tokenizer, or no end-of-document token where one is asked for.
        PreprocessError: input that cannot be read, a faulty row under `on_error="stop"`, no document left, a full disk.
    """
    start = prepare(config, reporter)
    record = _claimed(config, start, reporter)
    fast_shards = FastShards(output_folder(config), record, start.described)
    if fast_shards.known_difference():
        fast_shards.withdraw()  # again: whoever detected it may have been killed before the end
    tasks = shard_tasks(config, record, start.inputs)
    mine = [task for task in tasks if task.number % config.num_tasks == config.task_id]
    summary = RunSummary(shards_of_others=len(tasks) - len(mine))
    todo = list(unfinished(mine, config, summary))
    if config.output_dir is None and not config.overwrite:
        refuse_other_output(config, todo)
    if todo:
        if config.workers > 1:
            warm_up()
        parts = [part for task in todo for part in task.parts]
        fast = _choose_fast(config, parts, fast_shards, reporter)
        if fast is None:  # finished shards were removed, so there is more to do
            return preprocess(config, reporter)
        reporter.start(sum(part_bytes(part) for part in parts))
        build = _build_job(config, start, fast=fast)
        for outcome in _checked(_build_all(todo, build, config.workers, Totals(reporter)), config, record, fast_shards):
            summary.add(outcome)
    return summary


def output_folder(config: PreprocessConfig) -> Path | None:
    """Return the folder of shards, None for a single one."""
    return None if config.output_dir is None else Path(config.output_dir)


def _checked(
    outcomes: Iterator[ShardOutcome], config: PreprocessConfig, record: BuildRecord, fast_shards: FastShards
) -> Iterator[ShardOutcome]:
    """The outcomes, none of a shard that must not stay."""
    try:
        for outcome in outcomes:
            if config.output_dir is not None:
                check_claim(Path(config.output_dir), record, outcome.manifests)
            if any(manifest.tokenized_by for manifest in outcome.manifests.values()):
                fast_shards.check()
            yield outcome
    except TokenizersDiffer as difference:
        raise fast_shards.stopped_by(difference) from difference


def _claimed(config: PreprocessConfig, start: Start, reporter: Reporter) -> BuildRecord:
    """Claim the folder for this build and return its record."""
    folder = output_folder(config)
    if folder is None:
        return plan_build(config, start.inputs, start.described)
    found = load_build(folder)
    record = plan_build(config, start.inputs, start.described, found)
    gone = claim_folder(folder, found, record, overwrite=config.overwrite)
    if found is not None and not config.overwrite and (changed := changed_inputs(found, record)):
        more = f" and {counted(len(changed) - 1, 'other')}" if len(changed) > 1 else ""
        reporter.note(f"{changed[0]}{more} since the build began; {gone} finished shards of it are built again")
    return record


def _describe(config: PreprocessConfig, tokenizer: DocumentTokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        type=config.tokenizer.type,
        model=config.tokenizer.model,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        fingerprint=tokenizer_fingerprint(config.tokenizer),
    )


def unfinished(tasks: Sequence[ShardTask], config: PreprocessConfig, summary: RunSummary) -> Iterator[ShardTask]:
    """Yield the shards that are still to be built.

    What was read from a pipe cannot be known to be the same again.
    """
    for task in tasks:
        if STDIN not in config.inputs and all(is_complete(prefix, task.build) for prefix in task.prefixes):
            summary.keep(task.prefixes)
        else:
            yield task


def refuse_other_output(config: PreprocessConfig, todo: Sequence[ShardTask]) -> None:
    """Refuse, before any work, an output that would be refused at the end.

    For a folder `claim_folder` does so.
    """
    for task in todo:
        for prefix in task.prefixes:
            if STDIN in config.inputs and is_complete(prefix, task.build):
                raise ConfigError(
                    f"--output-prefix: {prefix} is there already, and whether standard input is the same again "
                    "cannot be known; give --overwrite to replace it, or another prefix"
                )
            if not is_of_build(prefix, task.build):
                refuse_existing(prefix, config.score_keys)


def _checked_tokenizer(config: PreprocessConfig) -> DocumentTokenizer:
    tokenizer = load_reference_tokenizer(config.tokenizer)
    if config.append_eod and tokenizer.eod_id is None:
        raise TokenizerError(
            f"--append-eod: {config.tokenizer.model} declares no end-of-document token and has none of the usual "
            "names; name one with --eod-token"
        )
    return tokenizer


def _choose_fast(
    config: PreprocessConfig, parts: Sequence[Part], fast_shards: FastShards, reporter: Reporter
) -> bool | None:
    """Return whether gigatoken makes the ids, None if its ids were wrong and its shards were removed."""
    if config.backend == "reference":
        return False
    if known := fast_shards.known_difference():
        reporter.note(f"tokenizer: reference; {known}, as an earlier start found")
        return False
    choice = choose_backend(config.tokenizer, sample_texts(parts, field_keys(config), config.block_bytes))
    reporter.note(f"tokenizer: {'gigatoken' if choice.fast else 'reference'}; {choice.reason}")
    if choice.differs and (gone := fast_shards.condemn(choice.reason)):
        reporter.note(f"{named(gone)} taken away, because gigatoken had made them in an earlier start")
        return None
    return choice.fast


def block_job(config: PreprocessConfig, tokenizer: DocumentTokenizer, *, fast: bool) -> Job:
    """Return what workers do with each block."""
    return Job(
        keys=field_keys(config),
        tokenizer=config.tokenizer,
        fast=fast,
        append_eod=config.append_eod,
        max_tokens=config.max_document_tokens,
        dtype=optimal_dtype(tokenizer.vocab_size).name,
    )


def _build_job(config: PreprocessConfig, start: Start, *, fast: bool) -> BuildJob:
    left_out = {
        reason: LeftOutRecord(count=len(names), names=sorted(names)[:_MOST_RECORDED])
        for reason, names in sorted(start.search.left_out.items())
    }
    return BuildJob(
        job=block_job(config, start.tokenizer, fast=fast),
        tokenizer=start.described,
        tokenized_by=gigatoken_name() if fast else None,
        on_error=config.on_error,
        overwrite=config.overwrite or config.output_dir is not None,
        block_bytes=config.block_bytes,
        empty_allowed=config.output_dir is not None,
        left_out=left_out,
    )


def field_keys(config: PreprocessConfig) -> FieldKeys:
    """Return the fields that are read."""
    return FieldKeys(config.json_keys, config.score_keys, config.id_key)


def sample_texts(parts: Sequence[Part], keys: FieldKeys, block_bytes: int) -> list[str]:
    """Starts of documents from the first block of up to `_SAMPLE_FILES` parts that lie far apart in the list."""
    chosen = parts[:: max(len(parts) // _SAMPLE_FILES, 1)][:_SAMPLE_FILES]
    share = _SAMPLE_DOCUMENTS // len(chosen)
    texts: list[str] = []
    for part in chosen:
        if part.file.kind == "stdin":  # can be read once only
            continue
        for block in islice(read_blocks([part], keys.all, block_bytes), 1):
            found = [text for row in parse_block(block, keys).texts for text in row]
            texts += [text[:_SAMPLE_CHARACTERS] for text in found[:: max(len(found) // share, 1)][:share]]
    return texts


class Totals:
    """Adds up what the shards report."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._done = Progress(0, 0, 0)

    def add(self, more: Progress) -> None:
        """Count what one shard has done since its last report."""
        done = self._done
        self.set(done.documents + more.documents, done.tokens + more.tokens, done.input_bytes + more.input_bytes)

    def set(self, documents: int, tokens: int, input_bytes: int) -> None:
        """Set the totals."""
        self._done = Progress(documents, tokens, input_bytes)
        self._reporter.update(self._done)


def _build_all(tasks: Sequence[ShardTask], build: BuildJob, workers: int, totals: Totals) -> Iterator[ShardOutcome]:
    if workers == 1 or len(tasks) < workers:
        for task in tasks:
            yield build_shard(task, build, workers, totals.add)
    else:
        yield from _build_side_by_side(tasks, build, workers, totals)


def _build_side_by_side(
    tasks: Sequence[ShardTask], build: BuildJob, workers: int, totals: Totals
) -> Iterator[ShardOutcome]:
    """Build a whole shard in each process.

    After a failure no further shard is begun, and those that run are finished.
    """
    counters = pool_context().Array("q", 3)
    pool = start_pool(workers, _keep_counters, (counters,))
    waiting = iter(tasks)
    running: set[Future[ShardOutcome]] = {
        pool.submit(_build_in_worker, task, build) for task in islice(waiting, workers)
    }
    try:
        while running:
            done, running = wait(running, timeout=_SECONDS_BETWEEN_UPDATES, return_when=FIRST_COMPLETED)
            totals.set(*counters[:])
            for future in done:
                yield future.result()
                running |= {pool.submit(_build_in_worker, task, build) for task in islice(waiting, 1)}
        totals.set(*counters[:])
    except BrokenProcessPool as error:
        raise worker_died() from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_counters: Any = None
"""In a worker: documents, tokens and input bytes of all workers, shared with the main process."""


def _keep_counters(counters: Any) -> None:
    global _counters
    _counters = counters


def _build_in_worker(task: ShardTask, build: BuildJob) -> ShardOutcome:
    return build_shard(task, build, 1, _count)


def _count(progress: Progress) -> None:
    with _counters.get_lock():
        for place, amount in enumerate((progress.documents, progress.tokens, progress.input_bytes)):
            _counters[place] += amount
