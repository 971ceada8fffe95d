"""The dry run of a build: read and tokenize everything, count every reason for leaving rows out, write nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_kaiyuan.preprocess.build_folder import ShardTask, plan_build, refuse_other_content, shard_tasks
from megatron_kaiyuan.preprocess.config import PreprocessConfig
from megatron_kaiyuan.preprocess.fast_tokenize import choose_backend
from megatron_kaiyuan.preprocess.fields import Reason
from megatron_kaiyuan.preprocess.inputs import Part, part_bytes
from megatron_kaiyuan.preprocess.pipeline import (
    Reporter,
    RunSummary,
    Start,
    Totals,
    block_job,
    field_keys,
    output_folder,
    prepare,
    refuse_other_output,
    sample_texts,
    unfinished,
)
from megatron_kaiyuan.preprocess.readers import read_blocks
from megatron_kaiyuan.preprocess.shard_build import Progress, Tally, special_record
from megatron_kaiyuan.preprocess.workers import ordered_results
from megatron_kaiyuan.shards.build_record import load_build
from megatron_kaiyuan.shards.manifest import SpecialTokenRecord

__all__ = ["DryRun", "dry_run"]


@dataclass(slots=True)
class DryRun:
    """What a run would do."""

    shards: int = 0
    """Shards that it would build."""
    rows: int = 0
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """By text key, end-of-document ids included."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows without a document, per reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of each reason."""
    special_tokens: dict[str, SpecialTokenRecord] = field(default_factory=dict)
    """By text key."""

    @property
    def faulty_rows(self) -> int:
        """Rows at which `--on-error stop` would end the run."""
        return sum(count for reason, count in self.skipped.items() if Reason(reason).is_error)


def dry_run(config: PreprocessConfig, reporter: Reporter) -> DryRun:
    """Read and tokenize what a run would, and count every reason in one pass, whatever `on_error` says.

    Raises:
        ConfigError, TokenizerError, PreprocessError: as `preprocess`, but for faulty rows.
    """
    start = prepare(config, reporter)
    todo = _todo(config, start)
    parts = [part for task in todo for part in task.parts]
    tally = Tally(parts, "skip", len(config.json_keys))
    told = DryRun(shards=len(todo) * len(config.json_keys), tokens=dict.fromkeys(config.json_keys, 0))
    reporter.start(sum(part_bytes(part) for part in parts))
    totals = Totals(reporter)
    job = block_job(config, start.tokenizer, fast=_is_fast(config, parts))
    for result in ordered_results(read_blocks(parts, job.keys.all, config.block_bytes), job, config.workers):
        tally.add(result)
        for key, output in zip(config.json_keys, result.outputs, strict=True):
            told.tokens[key] += len(output.tokens)
        told.documents += len(result.row_numbers)
        totals.add(Progress(len(result.row_numbers), len(result.outputs[0].tokens), result.input_bytes))
    told.rows, told.skipped, told.examples = tally.rows, tally.skipped, tally.examples
    told.special_tokens = dict(zip(config.json_keys, map(special_record, tally.special), strict=True))
    return told


def _todo(config: PreprocessConfig, start: Start) -> list[ShardTask]:
    """Return the shards that a run would build, or refuse what the run would refuse."""
    folder = output_folder(config)
    found = None if folder is None else load_build(folder)
    record = plan_build(config, start.inputs, start.described, found)
    if folder is not None and not config.overwrite:
        refuse_other_content(folder, found, record)
    tasks = shard_tasks(config, record, start.inputs)
    mine = [task for task in tasks if task.number % config.num_tasks == config.task_id]
    todo = list(unfinished(mine, config, RunSummary()))
    if folder is None and not config.overwrite:
        refuse_other_output(config, todo)
    return todo


def _is_fast(config: PreprocessConfig, parts: Sequence[Part]) -> bool:
    if config.backend == "reference":
        return False
    return choose_backend(config.tokenizer, sample_texts(parts, field_keys(config), config.block_bytes)).fast
