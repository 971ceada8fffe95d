"""The full check of a source: every byte of every shard against its index, its manifest and the other shards.

Opening a shard compares sizes only, so that a job starts at once. What that cannot see is detected here: flipped bits,
files of one shard under the name of another, stale scores and rank indexes, ids outside the vocabulary, and what an
interrupted build left. All that is wrong is collected; nothing is changed.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_kaiyuan.documents.rank_index import index_path, open_rank_index, verify_rank_index
from megatron_kaiyuan.errors import RankIndexError, ScoreError, ShardError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.inspection.shard_check import Finding, ShardCheck, without_file
from megatron_kaiyuan.shards.build_check import BUILD_FILE, folder_state, mixed_keys, named_folders
from megatron_kaiyuan.shards.manifest import Manifest, load_manifest
from megatron_kaiyuan.shards.shard import Shard, resolve_item, resolve_prefixes
from megatron_kaiyuan.shards.shard_files import Meter, ShardFiles, SilentMeter, find_leftovers, list_shard_files
from megatron_kaiyuan.shards.source import Source

__all__ = ["Finding", "Verification", "compare_shards", "folder_findings", "verify_shards"]

_MOST_THREADS = 8
_RANKED_AFRESH = 1 << 27  # documents; ranking more would need more than 2 GiB


@dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of a full check."""

    findings: list[Finding]
    shards: int
    bytes: int
    """Size of everything that was read."""
    unchecked: list[str]
    """What could not be checked, and why."""


def verify_shards(
    shards: str | Sequence[str],
    *,
    vocab_size: int | None = None,
    rank_indexes: Mapping[str, Path] | None = None,
    meter: Meter | None = None,
) -> Verification:
    """Check all shards of a source, several at a time.

    Args:
        shards: prefix, directory, glob, or a list of these.
        vocab_size: ids must be below it; None: what each manifest says.
        rank_indexes: rank index by score, where it is not beside the shards.
        meter: hears how many bytes have been read.

    Raises:
        ShardError: there is no shard at all, or one is named twice.
    """
    meter = meter or SilentMeter()
    named = [shards] if isinstance(shards, str) else list(shards)
    files = list_shard_files(resolve_prefixes(named))
    leftovers = find_leftovers(named, files)
    manifests, findings = _load_manifests(files)
    size = sum(
        _size(path) for entry in files for path in (entry.bin, entry.idx, entry.documents, *entry.sidecars.values())
    )
    meter.start("verifying", size)
    owners = _owners(files, manifests)
    checks = [ShardCheck(entry, manifests.get(entry.prefix), owners, vocab_size, meter.advance) for entry in files]
    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for found in pool.map(lambda check: check.run(), checks):
            findings += found
    opened = [check.shard for check in checks if check.shard is not None]
    findings += compare_shards(files, manifests, opened)
    findings += folder_findings(named)
    unchecked = _unchecked(files, manifests, vocab_size)
    if len(opened) == len(files) and any(shard.documents for shard in opened):
        source = Source("source", tuple(shard for shard in opened if shard.documents), tuple(named))
        findings += _check_rank_indexes(source, files, rank_indexes or {}, unchecked)
    findings += [Finding("leftover", str(path), _LEFTOVER) for path in leftovers]
    return Verification(findings, len(files), size, unchecked)


_LEFTOVER = "a build was interrupted here, or is still running; run it again to its end, or delete the file"


def compare_shards(
    files: Sequence[ShardFiles], manifests: Mapping[str, Manifest], opened: Sequence[Shard]
) -> Iterator[Finding]:
    """What only shows among several shards: other tokenizers or dtypes, and files that only some of them have."""
    dtypes = {shard.prefix: shard.dtype.name for shard in opened}
    for prefix, dtype, usual in _unusual(dtypes):
        yield Finding("dtype", f"{prefix}.idx", f"ids are {dtype}, most shards hold {usual}; build with one tokenizer")
    prints = {prefix: manifest.tokenizer.fingerprint for prefix, manifest in manifests.items()}
    for prefix, fingerprint, usual in _unusual(prints):
        message = f"tokenizer {fingerprint[:16]}..., most shards have {usual[:16]}...; build all with one tokenizer"
        yield Finding("tokenizer", f"{prefix}.manifest.json", message)
    yield from _mixed_ends(manifests)
    scores = sorted({score for entry in files for score in entry.sidecars})
    for entry in files:
        if not entry.has_manifest and any(other.has_manifest for other in files):
            message = "other shards have a manifest, this one has none: it is incomplete or was made by another tool"
            yield Finding("missing", str(entry.manifest), message)
        for score in scores:
            if score not in entry.sidecars:
                message = "other shards have these scores; a source is ranked by scores of all its documents"
                yield Finding("missing", f"{entry.prefix}.scores.{score}.npy", message)
    yield from _duplicates(manifests)


def _mixed_ends(manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
    """Shards whose documents end otherwise than those of the most shards."""
    ends = {prefix: "with" if manifest.append_eod else "without" for prefix, manifest in manifests.items()}
    for prefix, end, usual in _unusual(ends):
        message = (
            f"documents {end} the end-of-document id at their end, other shards {usual}; build all with --append-eod, "
            "or all without"
        )
        yield Finding("eod", f"{prefix}.manifest.json", message)


def folder_findings(named: Sequence[str]) -> Iterator[Finding]:
    """What is wrong with directories and globs as such: shards that are missing, and rows under several keys."""
    yield from _missing_from_builds(named)
    yield from _several_keys(named)


def _missing_from_builds(named: Sequence[str]) -> Iterator[Finding]:
    """Yield one finding for each folder whose `build.json` lists shards that are missing."""
    for folder, pattern in (found for item in named for found in named_folders(item)):
        path = folder / BUILD_FILE
        try:
            state = folder_state(folder, pattern)
        except (ShardError, OSError) as error:
            yield Finding("missing", str(path), without_file(str(error), path))
            continue
        if state is not None and state.missing:
            numbers = ", ".join(map(str, state.missing))
            message = (
                f"{len(state.missing):,} of {counted(state.shards, 'shard')} are missing ({numbers}); {state.remedy}"
            )
            yield Finding("missing", str(path), message)


def _several_keys(named: Sequence[str]) -> Iterator[Finding]:
    """Directories and globs that name the same rows under several text keys."""
    for item in named:
        try:
            problem = mixed_keys(item, resolve_item(item))
        except ShardError:  # a damaged build record is a finding of its own
            continue
        if problem:
            yield Finding("keys", item, without_file(problem, Path(item)))


def _unusual(values: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Shards whose value is not the most frequent one: prefix, value, the most frequent value."""
    if values:
        usual = Counter(values.values()).most_common(1)[0][0]
        for prefix, value in values.items():
            if value != usual:
                yield prefix, value, usual


def _duplicates(manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for prefix, manifest in manifests.items():
        record = manifest.files.get("bin")
        if record is None or manifest.tokens == 0:
            continue
        if record.sha256 in first:
            message = f"the same documents as {first[record.sha256]}.bin: a plan would see them twice; remove one"
            yield Finding("duplicate", f"{prefix}.bin", message)
        first.setdefault(record.sha256, prefix)


def _load_manifests(files: Sequence[ShardFiles]) -> tuple[dict[str, Manifest], list[Finding]]:
    manifests, findings = {}, []
    for entry in files:
        if entry.has_manifest:
            try:
                manifests[entry.prefix] = load_manifest(entry.prefix)
            except (ShardError, OSError) as error:
                findings.append(Finding("manifest", str(entry.manifest), without_file(str(error), entry.manifest)))
    return manifests, findings


def _owners(files: Sequence[ShardFiles], manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """Which file should have a checksum, by checksum."""
    owners: dict[str, str] = {}
    for entry in files:
        manifest = manifests.get(entry.prefix)
        for record in manifest.files.values() if manifest else ():
            owners.setdefault(record.sha256, str(entry.manifest.with_name(record.name)))
    return owners


def _unchecked(files: Sequence[ShardFiles], manifests: Mapping[str, Manifest], vocab_size: int | None) -> list[str]:
    without = len(files) - len(manifests)
    if not without:
        return []
    told = [
        f"{without:,} of {counted(len(files), 'shard')} have no readable manifest: flipped bits cannot be seen in them"
    ]
    if vocab_size is None:
        told.append("their vocabulary is unknown, only negative ids were looked for: give --vocab-size")
    return told


def _check_rank_indexes(
    source: Source, files: Sequence[ShardFiles], paths: Mapping[str, Path], unchecked: list[str]
) -> Iterator[Finding]:
    scores = sorted({score for entry in files for score in entry.sidecars})
    for score in scores:
        path = paths.get(score) or index_path(source, score)
        if not path.is_file():
            continue
        try:
            if source.num_documents <= _RANKED_AFRESH:
                verify_rank_index(path, source, score)
            else:
                open_rank_index(path, source, score)
                unchecked.append(f"{path}: compared by probes; {tool('rank')} --verify compares every document")
        except (RankIndexError, OSError) as error:
            yield Finding("rank index", str(path), without_file(str(error), path))
        except ScoreError:
            continue  # already reported, with the sidecar's name


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
