"""One shard from its parts: count, write, and publish when everything is on disk."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_kaiyuan.errors import PreprocessError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.preprocess.build_folder import ShardTask
from megatron_kaiyuan.preprocess.document_table import Origins
from megatron_kaiyuan.preprocess.documents import Fault
from megatron_kaiyuan.preprocess.fields import Reason
from megatron_kaiyuan.preprocess.inputs import Part, first_row, part_bytes
from megatron_kaiyuan.preprocess.readers import read_blocks
from megatron_kaiyuan.preprocess.workers import BlockResult, Job, ordered_results
from megatron_kaiyuan.preprocess.writer import ShardWriter
from megatron_kaiyuan.shards.manifest import (
    InputRecord,
    LeftOutRecord,
    Manifest,
    SpecialTokenRecord,
    TokenizerRecord,
    created_by,
)
from megatron_kaiyuan.shards.special_tokens import SpecialCounts

__all__ = ["BuildJob", "Progress", "ShardOutcome", "Tally", "build_shard", "special_record"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done so far, or since the last report."""

    documents: int
    tokens: int
    input_bytes: int


@dataclass(frozen=True, slots=True)
class BuildJob:
    """What all shards of a build have in common."""

    job: Job
    tokenizer: TokenizerRecord
    tokenized_by: str | None
    """See `Manifest`."""
    on_error: Literal["stop", "skip"]
    overwrite: bool
    block_bytes: int
    empty_allowed: bool
    """Whether a shard without documents is written; one of many may be, the only one not."""
    left_out: dict[str, LeftOutRecord]
    """Entries of the searched folders that are no part of the input."""


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """What building one shard gave."""

    manifests: dict[str, Manifest]
    """By prefix."""
    rows: int
    skipped: dict[str, int]
    examples: dict[str, str]


class Tally:
    """Counts of rows per part and of faults per reason.

    Under `stop` the first fault ends the run.
    """

    def __init__(self, parts: Sequence[Part], on_error: Literal["stop", "skip"], text_keys: int) -> None:
        self.special = [SpecialCounts() for _ in range(text_keys)]
        """Special tokens inside the texts, for each text key."""
        self.skipped: dict[str, int] = {}
        self.examples: dict[str, str] = {}
        self._parts = parts
        self._rows = [0] * len(parts)
        self._first_rows = [first_row(part) for part in parts]
        self._stop = on_error == "stop"

    @property
    def rows(self) -> int:
        """Rows read so far."""
        return sum(self._rows)

    def origins(self, result: BlockResult) -> Origins:
        """Return where the documents of the next block come from.

        To be called before the block is added.
        """
        first, before = self._first_rows[result.source], self._rows[result.source]
        file = self._parts[result.source].file.name
        rows = None if first is None else result.row_numbers + first + before
        return Origins(file, rows, result.offsets, result.ids)

    def add(self, result: BlockResult) -> None:
        """Count the next block.

        Raises:
            PreprocessError: it has a fault, and `on_error` is `stop`.
        """
        for fault in sorted(result.first_faults, key=lambda fault: fault.row):
            place = self._place(result.source, fault)
            if self._stop and fault.reason.is_error:
                raise PreprocessError(
                    f"{place}: {fault.detail}; mend it, or give --on-error skip to leave such rows out (--dry-run "
                    "counts all of them first)"
                )
            self.examples.setdefault(fault.reason.value, f"{place}: {fault.detail}")
        for reason, count in result.skipped.items():
            self.skipped[reason.value] = self.skipped.get(reason.value, 0) + count
        self._rows[result.source] += result.rows
        for counts, more in zip(self.special, result.special, strict=True):
            counts.add(more)

    def _place(self, source: int, fault: Fault) -> str:
        file, first = self._parts[source].file.name, self._first_rows[source]
        if fault.reason is Reason.UNREADABLE_FILE:
            return file
        if first is None:
            return f"{file}, the line at byte {fault.byte}"
        return f"{file}:{first + self._rows[source] + fault.row + 1}"

    def explain(self) -> str:
        """Why there may be no document."""
        reasons = ", ".join(f"{count} x {reason} ({self.examples[reason]})" for reason, count in self.skipped.items())
        return f"skipped: {reasons}" if reasons else "the input is empty"

    def input_records(self) -> list[InputRecord]:
        """The parts, for the manifest."""
        return [
            InputRecord(name=part.file.name, bytes=part.file.bytes, rows=rows, start=part.start, stop=part.stop)
            for part, rows in zip(self._parts, self._rows, strict=True)
        ]


def build_shard(task: ShardTask, build: BuildJob, workers: int, report: Callable[[Progress], None]) -> ShardOutcome:
    """Build one shard for each text key, with this process or several.

    Raises:
        PreprocessError: a faulty row under `stop`, no document where one is needed, a full disk.
        ConfigError: the shard exists already, or is being written.
    """
    blocks = read_blocks(task.parts, build.job.keys.all, build.block_bytes)
    try:
        return _write_shard(task, build, ordered_results(blocks, build.job, workers), report)
    except OSError as error:
        raise PreprocessError(
            f"output {task.prefixes[0]}: {error.strerror or error}; free or mend the disk and run the same command "
            "again: what is finished stays, nothing torn has a final name"
        ) from error


def _write_shard(
    task: ShardTask, build: BuildJob, results: Iterable[BlockResult], report: Callable[[Progress], None]
) -> ShardOutcome:
    tally = Tally(task.parts, build.on_error, len(build.job.keys.text))
    left = sum(part_bytes(part) for part in task.parts)
    with ExitStack() as stack:
        writers = [stack.enter_context(_open_writer(prefix, build, task.build)) for prefix in task.prefixes]
        for result in results:
            origins = tally.origins(result)
            tally.add(result)
            for writer, output in zip(writers, result.outputs, strict=True):
                writer.append(output.tokens, output.lengths, result.scores, origins)
            tokens = sum(len(output.tokens) for output in result.outputs)
            report(Progress(len(result.row_numbers), tokens, result.input_bytes))
            left -= result.input_bytes
        report(Progress(0, 0, max(left, 0)))  # files without a row; of standard input nothing is expected
        if not writers[0].documents and not build.empty_allowed:
            raise PreprocessError(f"--input: no document in {counted(tally.rows, 'row')}; {tally.explain()}")
        manifests = dict(_finish(build, task.build, writers, tally))
    return ShardOutcome(manifests, tally.rows, tally.skipped, tally.examples)


def special_record(counts: SpecialCounts) -> SpecialTokenRecord:
    """Return what a manifest says of the special tokens inside the texts."""
    return SpecialTokenRecord(
        occurrences=dict(sorted(counts.occurrences.items())),
        documents_with_eod=counts.with_eod,
        documents_ending_twice=counts.ending_twice,
    )


def _open_writer(prefix: str, build: BuildJob, fingerprint: str) -> ShardWriter:
    keys = build.job.keys
    return ShardWriter(
        prefix,
        np.dtype(build.job.dtype),
        keys.scores,
        with_ids=keys.id is not None,
        overwrite=build.overwrite,
        build=fingerprint,
    )


def _finish(
    build: BuildJob, fingerprint: str, writers: Sequence[ShardWriter], tally: Tally
) -> Iterator[tuple[str, Manifest]]:
    """Put every text key on disk in full before the first of them gets its final name."""
    composed = [writer.compose() for writer in writers]
    for key, writer, (files, scores), special in zip(
        build.job.keys.text, writers, composed, tally.special, strict=True
    ):
        manifest = Manifest(
            documents=writer.documents,
            tokens=writer.tokens,
            dtype="uint16" if writer.dtype == np.uint16 else "int32",
            max_token_id=writer.max_token_id,
            append_eod=build.job.append_eod,
            files=files,
            scores=scores,
            tokenizer=build.tokenizer,
            inputs=tally.input_records(),
            skipped=dict(sorted(tally.skipped.items())),
            left_out=build.left_out,
            special_tokens=special_record(special),
            json_key=key,
            created_by=created_by(),
            build=fingerprint,
            tokenized_by=build.tokenized_by,
        )
        writer.publish(manifest)
        yield writer.prefix, manifest
