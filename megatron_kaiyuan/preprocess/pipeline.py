"""From documents to shards, on all cores: the main process cuts and writes, workers parse and tokenize.

Nothing gets its final name before all of it is on disk; a run that fails or is killed leaves no shard behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np

from megatron_kaiyuan.errors import ConfigError, PreprocessError, TokenizerError
from megatron_kaiyuan.preprocess.documents import FieldKeys, Reason, parse_block
from megatron_kaiyuan.preprocess.fast_tokenize import choose_backend
from megatron_kaiyuan.preprocess.manifest import InputRecord, Manifest, TokenizerRecord, created_by
from megatron_kaiyuan.preprocess.readers import BLOCK_BYTES, Block, InputFile, expand_inputs, read_blocks
from megatron_kaiyuan.preprocess.tokenize import (
    DocumentTokenizer,
    TokenizerConfig,
    load_reference_tokenizer,
    tokenizer_fingerprint,
)
from megatron_kaiyuan.preprocess.workers import BlockResult, Job, ordered_results
from megatron_kaiyuan.preprocess.writer import ShardWriter, optimal_dtype, refuse_existing

__all__ = ["PreprocessConfig", "Progress", "Reporter", "RunSummary", "preprocess", "shard_prefix"]

_SAMPLE_FILES = 4
_SAMPLE_DOCUMENTS = 64
_SAMPLE_CHARACTERS = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """One run of the shard builder."""

    inputs: tuple[str, ...]
    """Files, globs, directories."""
    output_prefix: str
    """Each text key gives the shard `<output_prefix>_<key>_document`."""
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    score_keys: tuple[str, ...] = ()
    append_eod: bool = False
    workers: int = 1
    """1 works in this process; more start that many others."""
    on_error: Literal["stop", "skip"] = "stop"
    max_document_tokens: int | None = None
    """Longer documents (without the end-of-document id) follow `on_error`; None: no limit."""
    backend: Literal["auto", "reference"] = "auto"
    """auto: gigatoken where it gives the same ids; reference: never."""
    overwrite: bool = False
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        for flag, keys in (("--json-keys", self.json_keys), ("--score-key", self.score_keys)):
            if len(set(keys)) != len(keys):
                raise ConfigError(f"{flag} {' '.join(keys)}: a key is given twice; give each once")
            for key in keys:
                if not key or "/" in key or "\0" in key:
                    raise ConfigError(
                        f"{flag} {key!r}: the key becomes part of a file name and cannot hold '/' or be empty"
                    )
        for flag, value in (("--workers", self.workers), ("--max-document-tokens", self.max_document_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value}: must be at least 1")
        if not self.json_keys:
            raise ConfigError("--json-keys: name at least one field that holds text")


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done so far."""

    documents: int
    tokens: int
    input_bytes: int


class Reporter(Protocol):
    """Hears about a run while it goes on."""

    def start(self, total_bytes: int) -> None:
        """Once, before the first block."""
        ...

    def note(self, message: str) -> None:
        """One line that a user should see."""
        ...

    def update(self, progress: Progress) -> None:
        """After every block."""
        ...


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run did."""

    manifests: dict[str, Manifest]
    """By shard prefix."""
    rows: int
    skipped: dict[str, int]
    """Rows without a document, per reason."""
    examples: dict[str, str]
    """The first row of each reason: `file:row: what is wrong`."""


def shard_prefix(output_prefix: str, json_key: str) -> str:
    """Where the shard of one text key goes, as Megatron's tool names it."""
    return f"{output_prefix}_{json_key}_document"


def preprocess(config: PreprocessConfig, reporter: Reporter) -> RunSummary:
    """Build the shards.

    Raises:
        ConfigError: flags that cannot work, or an output that exists.
        TokenizerError: no such tokenizer, or no end-of-document token where one is asked for.
        PreprocessError: input that cannot be read, a faulty row under `on_error="stop"`, no document left, a full disk.
    """
    prefixes = [shard_prefix(config.output_prefix, key) for key in config.json_keys]
    if not config.overwrite:
        for prefix in prefixes:
            refuse_existing(prefix, config.score_keys)
    inputs = expand_inputs(config.inputs)
    tokenizer = _checked_tokenizer(config)
    job = _plan_job(config, inputs, tokenizer, reporter)
    try:
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    ShardWriter(prefix, np.dtype(job.dtype), config.score_keys, overwrite=config.overwrite)
                )
                for prefix in prefixes
            ]
            reporter.start(sum(file.bytes for file in inputs))
            tally = _Tally(inputs, config.on_error)
            for result in ordered_results(_blocks(config, inputs), job, config.workers):
                tally.add(result)
                for writer, output in zip(writers, result.outputs, strict=True):
                    writer.append(output.tokens, output.lengths, result.scores)
                reporter.update(Progress(writers[0].documents, sum(w.tokens for w in writers), tally.input_bytes))
            if not writers[0].documents:
                raise PreprocessError(f"--input: no document in {tally.rows} rows; {tally.explain()}")
            manifests = _finish(config, tokenizer, writers, tally)
    except OSError as error:
        raise PreprocessError(
            f"output {config.output_prefix}: {error.strerror or error}; free or mend the disk and run again, nothing "
            "was left under a final name"
        ) from error
    return RunSummary(manifests, tally.rows, tally.skipped, tally.examples)


def _checked_tokenizer(config: PreprocessConfig) -> DocumentTokenizer:
    tokenizer = load_reference_tokenizer(config.tokenizer)
    if config.append_eod and tokenizer.eod_id is None:
        raise TokenizerError(
            f"--append-eod: {config.tokenizer.model} declares no end-of-document token and has none of the usual "
            "names; name one with --eod-token"
        )
    return tokenizer


def _plan_job(
    config: PreprocessConfig, inputs: Sequence[InputFile], tokenizer: DocumentTokenizer, reporter: Reporter
) -> Job:
    keys = FieldKeys(config.json_keys, config.score_keys)
    fast = False
    if config.backend == "auto":
        choice = choose_backend(config.tokenizer, _sample_texts(config, inputs, keys))
        fast = choice.fast
        reporter.note(f"tokenizer: {'gigatoken' if fast else 'reference'}; {choice.reason}")
    return Job(
        keys=keys,
        tokenizer=config.tokenizer,
        fast=fast,
        append_eod=config.append_eod,
        max_tokens=config.max_document_tokens,
        dtype=optimal_dtype(tokenizer.vocab_size).name,
    )


def _sample_texts(config: PreprocessConfig, inputs: Sequence[InputFile], keys: FieldKeys) -> list[str]:
    """Starts of documents from the first block of up to `_SAMPLE_FILES` files that lie far apart in the list."""
    chosen = inputs[:: max(len(inputs) // _SAMPLE_FILES, 1)][:_SAMPLE_FILES]
    share = _SAMPLE_DOCUMENTS // len(chosen)
    texts: list[str] = []
    for file in chosen:
        for block in islice(read_blocks([file], (*keys.text, *keys.scores), config.block_bytes), 1):
            found = [text for row in parse_block(block, keys).texts for text in row]
            texts += [text[:_SAMPLE_CHARACTERS] for text in found[:: max(len(found) // share, 1)][:share]]
    return texts


def _blocks(config: PreprocessConfig, inputs: Sequence[InputFile]) -> Iterator[Block]:
    return read_blocks(inputs, (*config.json_keys, *config.score_keys), config.block_bytes)


class _Tally:
    """Counts rows per file and faults per reason; under `stop` the first fault ends the run."""

    def __init__(self, inputs: Sequence[InputFile], on_error: Literal["stop", "skip"]) -> None:
        self.input_bytes = 0
        self.skipped: dict[str, int] = {}
        self.examples: dict[str, str] = {}
        self._inputs = inputs
        self._rows = [0] * len(inputs)
        self._stop = on_error == "stop"

    @property
    def rows(self) -> int:
        return sum(self._rows)

    def add(self, result: BlockResult) -> None:
        name, base = self._inputs[result.source].name, self._rows[result.source]
        for fault in sorted(result.first_faults, key=lambda fault: fault.row):
            place = name if fault.reason is Reason.UNREADABLE_FILE else f"{name}:{base + fault.row + 1}"
            if self._stop and fault.reason.is_error:
                raise PreprocessError(
                    f"{place}: {fault.detail}; mend it, or give --on-error skip to leave such rows out"
                )
            self.examples.setdefault(fault.reason.value, f"{place}: {fault.detail}")
        for reason, count in result.skipped.items():
            self.skipped[reason.value] = self.skipped.get(reason.value, 0) + count
        self._rows[result.source] += result.rows
        self.input_bytes += result.input_bytes

    def explain(self) -> str:
        reasons = ", ".join(f"{count} x {reason} ({self.examples[reason]})" for reason, count in self.skipped.items())
        return f"skipped: {reasons}" if reasons else "the input is empty"

    def input_records(self) -> list[InputRecord]:
        return [
            InputRecord(name=file.name, bytes=file.bytes, rows=rows)
            for file, rows in zip(self._inputs, self._rows, strict=True)
        ]


def _finish(
    config: PreprocessConfig, tokenizer: DocumentTokenizer, writers: Sequence[ShardWriter], tally: _Tally
) -> dict[str, Manifest]:
    """Put every shard on disk in full before the first of them gets its final name."""
    record = TokenizerRecord(
        type=config.tokenizer.type,
        model=config.tokenizer.model,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        fingerprint=tokenizer_fingerprint(config.tokenizer),
    )
    composed = [writer.compose() for writer in writers]
    manifests = {}
    for key, writer, (files, scores) in zip(config.json_keys, writers, composed, strict=True):
        manifests[writer.prefix] = Manifest(
            documents=writer.documents,
            tokens=writer.tokens,
            dtype="uint16" if writer.dtype == np.uint16 else "int32",
            max_token_id=writer.max_token_id,
            append_eod=config.append_eod,
            files=files,
            scores=scores,
            tokenizer=record,
            inputs=tally.input_records(),
            skipped=dict(sorted(tally.skipped.items())),
            json_key=key,
            created_by=created_by(),
        )
    for writer in writers:
        writer.publish(manifests[writer.prefix])
    return manifests
