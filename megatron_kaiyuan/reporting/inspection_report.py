"""One inspection from flags to output: describe, verify, draw documents, print, write the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_kaiyuan.data import CurriculumDataset, Plan, open_source
from megatron_kaiyuan.data.plan_schema import load_plan_spec
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.terminal import counted, shell_command
from megatron_kaiyuan.inspection.describe import describe_source
from megatron_kaiyuan.inspection.verify import verify_shards
from megatron_kaiyuan.reporting.decoding import TextDecoder, choose_decoder
from megatron_kaiyuan.reporting.progress import ConsoleMeter
from megatron_kaiyuan.reporting.sample_text import (
    describe_sample,
    parse_sample_numbers,
    print_documents,
    print_sample,
    sample_documents,
)
from megatron_kaiyuan.reporting.shards_page import write_shards_page
from megatron_kaiyuan.reporting.shards_table import format_bytes, print_findings, print_source, report_console
from megatron_kaiyuan.shards.manifest import TokenizerRecord, load_manifest, manifest_path
from megatron_kaiyuan.shards.shard import resolve_prefixes
from megatron_kaiyuan.shards.shard_files import list_shard_files

__all__ = ["InspectionOptions", "inspect_samples", "inspect_sources"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectionOptions:
    """What to look at and how to report it."""

    scores: Sequence[str] | None = None
    """Score sidecars to describe; None: all there are."""
    verify: bool = False
    """Read every byte."""
    vocab_size: int | None = None
    documents: int = 0
    """Decoded documents to draw from each source."""
    seed: int = 0
    characters: int = 400
    """Of each text; 0: all."""
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    quiet: bool = False
    """Return the result without printing it."""
    page: Path | None = None
    """HTML file to write."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A source to inspect."""

    name: str
    shards: list[str]
    scores: Sequence[str] | None
    rank_indexes: Mapping[str, Path]
    tokenizer: tuple[str | None, str | None]


def inspect_sources(target: Path | Sequence[str], options: InspectionOptions) -> dict[str, Any]:
    """Describe the shards named, or every source of a plan file.

    Args:
        target: a plan file, or prefixes, directories and globs that make up one source.
        options: what to do.

    Returns:
        JSON-able: `sources`, each what `describe_source` returns, with the findings and the unchecked parts of the
        full check under `findings` and `unchecked`, and decoded documents under `document_samples`.

    Raises:
        ShardError: a source has no shard at all.
        PlanError, ScoreError, TokenizerError: the plan, the score or the tokenizer asked for does not exist.
    """
    console = report_console()
    sources = []
    for one in _targets(target, options):
        with ConsoleMeter() as meter:
            told = describe_source(one.name, one.shards, scores=one.scores, rank_indexes=one.rank_indexes, meter=meter)
            if options.verify:
                _verify(told, one, options, meter)
        _draw_documents(told, one, options)
        if not options.quiet:
            _print(told, options, console)
        sources.append(told)
    if options.page:
        write_shards_page(sources, options.page)
        SafeConsole(stderr=True, highlight=False).print(f"wrote {options.page}", markup=False)
    return {"sources": sources}


def inspect_samples(path: Path, samples: Sequence[str], options: InspectionOptions) -> dict[str, Any]:
    """Show samples of a plan: where each comes from, and its text.

    Returns:
        JSON-able: `samples`, each what `describe_sample` returns, and `decoder`, which tokenizer made the text.

    Raises:
        ConfigError: a sample the plan does not have.
        PlanError, ShardError, ScoreError, RankIndexError, TokenizerError: the plan or its sources cannot be opened.
    """
    plan = Plan.load(path)
    order = CurriculumDataset(plan, parts=True)
    recorded = next(
        (found for source in plan.opened.values() if (found := _recorded(source.source.shards[0].prefix))), None
    )
    named = (plan.tokenizer.type, plan.tokenizer.model) if plan.tokenizer else (None, None)
    decoder = _decoder(options, named, recorded)
    numbers = list(parse_sample_numbers(samples, plan.num_samples))
    console = report_console()
    if not options.quiet:
        console.print(f"plan {path}, fingerprint {plan.fingerprint}; {decoder.note}", markup=False)
    told = []
    for sample in numbers:
        told.append(describe_sample(order, sample, decoder, options.characters))
        if not options.quiet:
            print_sample(told[-1], console)
    return {"plan": str(path), "fingerprint": plan.fingerprint, "decoder": decoder.note, "samples": told}


def _targets(target: Path | Sequence[str], options: InspectionOptions) -> list[_Target]:
    if not isinstance(target, Path):
        _refuse_nothing(target)
        return [_Target(" ".join(target), list(target), options.scores, {}, (None, None))]
    plan = load_plan_spec(target)
    tokenizer = (plan.tokenizer.type, plan.tokenizer.model) if plan.tokenizer else (None, None)
    return [
        _Target(
            name,
            [source.shards] if isinstance(source.shards, str) else list(source.shards),
            options.scores,
            {source.score: Path(source.rank_index)} if source.score and source.rank_index else {},
            tokenizer,
        )
        for name, source in plan.sources.items()
    ]


def _refuse_nothing(named: Sequence[str]) -> None:
    """Refuse names that no file stands behind: a table of one shard without documents would hide a wrong path.

    A shard of which a part is there is described, with a finding for what is missing.
    """
    files = list_shard_files(resolve_prefixes(list(named)))
    if not any(path.exists() for entry in files for path in (entry.idx, entry.bin)):
        names = shell_command(*named)
        raise ShardError(
            f"{names}: no such directory or shard (looked in {Path.cwd()}); give a directory, a glob, or the path of a "
            ".bin/.idx pair without its suffix"
        )


def _verify(told: dict[str, Any], one: _Target, options: InspectionOptions, meter: ConsoleMeter) -> None:
    found = verify_shards(one.shards, vocab_size=options.vocab_size, rank_indexes=one.rank_indexes, meter=meter)
    told["findings"] = [{"kind": item.kind, "file": item.file, "message": item.message} for item in found.findings]
    told["unchecked"] = found.unchecked
    told["verified_bytes"] = found.bytes


def _draw_documents(told: dict[str, Any], one: _Target, options: InspectionOptions) -> None:
    if not options.documents or any(row["kind"] == "unreadable" for row in told["findings"]):
        return
    try:
        source = open_source(one.name, one.shards)
    except ShardError:  # reported among the findings
        return
    decoder = _decoder(options, one.tokenizer, _recorded(source.shards[0].prefix))
    told["decoder"] = decoder.note
    told["document_samples"] = sample_documents(
        source, options.documents, decoder, options.characters, told["scores"], options.seed
    )


def _decoder(
    options: InspectionOptions, named: tuple[str | None, str | None], recorded: TokenizerRecord | None
) -> TextDecoder:
    kind, model = (options.tokenizer_type, options.tokenizer_model) if options.tokenizer_type else named
    return choose_decoder(kind, model, recorded)


def _recorded(prefix: str) -> TokenizerRecord | None:
    if not manifest_path(prefix).is_file():
        return None
    try:
        return load_manifest(prefix).tokenizer
    except ShardError:  # reported among the findings
        return None


def _print(told: Mapping[str, Any], options: InspectionOptions, console: Console) -> None:
    print_source(told, console)
    if "document_samples" in told:
        print_documents(told["document_samples"], told["decoder"], console)
    if options.verify:
        read = f"verified {counted(told['shards'], 'shard')}, read {format_bytes(told['verified_bytes'])}"
        console.print(f"{read}: {'nothing is wrong' if not told['findings'] else 'see the findings'}", markup=False)
        for line in told["unchecked"]:
            console.print(f"not checked: {line}", markup=False)
    if told["findings"]:
        print_findings(told["findings"], console)
