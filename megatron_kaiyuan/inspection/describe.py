"""What a source holds, as plain data: counts, lengths, scores, manifests, rank indexes.

Memory is bounded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.documents.rank_index import index_path, open_rank_index
from megatron_kaiyuan.errors import RankIndexError, ScoreError, ShardError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.inspection.distribution import Distribution
from megatron_kaiyuan.inspection.shard_check import Finding, without_file
from megatron_kaiyuan.inspection.verify import compare_shards, folder_findings
from megatron_kaiyuan.shards.manifest import Manifest, load_manifest, merged_special_tokens
from megatron_kaiyuan.shards.shard import Shard, open_shard, resolve_prefixes
from megatron_kaiyuan.shards.shard_files import (
    Meter,
    ShardFiles,
    SilentMeter,
    find_leftovers,
    list_shard_files,
    read_lengths,
    read_scores_in_chunks,
)
from megatron_kaiyuan.shards.source import Source

__all__ = ["BANDS", "QUANTILES", "NoSuchScoreError", "describe_source"]

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
BANDS = 10
"""Bands of equally many documents, by score, whose tokens are reported."""
_BINS = 40
_SCORE_VALUES = 48  # so many different scores or fewer are grades: one bar each


class NoSuchScoreError(ScoreError):
    """A score was asked for that no shard has."""


def describe_source(
    name: str,
    shards: str | Sequence[str],
    *,
    scores: Sequence[str] | None = None,
    rank_indexes: Mapping[str, Path] | None = None,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Read all lengths and scores of a source once and describe them.

    Args:
        name: what to call the source.
        shards: prefix, directory, glob, or a list of these.
        scores: names of the score sidecars to describe; None: all there are.
        rank_indexes: rank index by score, where it is not beside the shards.
        meter: hears how many documents have been read.

    Returns:
        JSON-able. Shards and scores that cannot be read are left out of the counts and named under `findings`.

    Raises:
        ShardError: there is no shard at all, or one is named twice.
        NoSuchScoreError: no shard has a score that `scores` names.
    """
    meter = meter or SilentMeter()
    named = [shards] if isinstance(shards, str) else list(shards)
    files = list_shard_files(resolve_prefixes(named))
    keys = _score_keys(files, scores)
    opened, findings = _open(files)
    manifests = _manifests(files, findings)
    findings += compare_shards(files, manifests, list(opened.values()))
    findings += folder_findings(named)
    lengths, by_score = _measure(files, opened, keys, findings, meter)
    whole = tuple(shard for shard in opened.values() if shard.documents)
    source = Source(name, whole, tuple(named))
    paths = rank_indexes or {}
    described = {score: _describe_score(score, by_score[score], files, source, paths.get(score)) for score in keys}
    stale = [told["rank_index"] for told in described.values() if told["rank_index"]["state"] == "stale"]
    findings += [Finding("rank index", told["path"], told["message"]) for told in stale]
    leftovers = find_leftovers(named, files)
    findings += [Finding("leftover", str(path), "an interrupted build, or one that runs now") for path in leftovers]
    return {
        "name": name,
        "named": named,
        "shards": len(files),
        "documents": source.num_documents,
        "index_documents": sum(shard.boundaries - 1 for shard in opened.values()),
        "tokens": source.num_tokens,
        "bytes": sum(shard.tokens * shard.dtype.itemsize for shard in opened.values()),
        "dtypes": dict(Counter(shard.dtype.name for shard in opened.values())),
        "manifests": _describe_manifests(files, manifests),
        "lengths": _describe(lengths, _length_edges(lengths)),
        "scores": described,
        "findings": [{"kind": item.kind, "file": item.file, "message": item.message} for item in findings],
    }


def _score_keys(files: Sequence[ShardFiles], scores: Sequence[str] | None) -> list[str]:
    present = sorted({score for entry in files for score in entry.sidecars})
    for score in scores or ():
        if score not in present:
            raise NoSuchScoreError(
                f"--score {score}: no shard has these scores (there: {', '.join(present) or 'none'}); build the shards "
                f"with --score-key {score}, or give the scores with {tool('rank')} --scores"
            )
    return present if scores is None else list(scores)


def _open(files: Sequence[ShardFiles]) -> tuple[dict[str, Shard], list[Finding]]:
    opened: dict[str, Shard] = {}
    findings = []

    def attempt(entry: ShardFiles) -> Shard | Finding:
        try:
            return open_shard(entry.prefix)
        except (ShardError, OSError) as error:
            return Finding("unreadable", str(entry.idx), without_file(str(error), entry.idx))

    for entry, result in zip(files, side_by_side(attempt, files), strict=True):
        if isinstance(result, Shard):
            opened[entry.prefix] = result
        else:
            findings.append(result)
    return opened, findings


def _manifests(files: Sequence[ShardFiles], findings: list[Finding]) -> dict[str, Manifest]:
    def attempt(entry: ShardFiles) -> Manifest | Finding:
        try:
            return load_manifest(entry.prefix)
        except (ShardError, OSError) as error:
            return Finding("manifest", str(entry.manifest), without_file(str(error), entry.manifest))

    present = [entry for entry in files if entry.has_manifest]
    read = side_by_side(attempt, present)
    findings += [result for result in read if isinstance(result, Finding)]
    return {entry.prefix: result for entry, result in zip(present, read, strict=True) if isinstance(result, Manifest)}


def _describe_manifests(files: Sequence[ShardFiles], manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    tokenizers = Counter(
        (
            manifest.tokenizer.type,
            manifest.tokenizer.model,
            manifest.tokenizer.vocab_size,
            manifest.tokenizer.fingerprint,
            manifest.tokenizer.eod_id if manifest.append_eod else None,
        )
        for manifest in manifests.values()
    )
    names = ("type", "model", "vocab_size", "fingerprint", "appended_eod_id")
    skipped: Counter[str] = Counter()
    for manifest in manifests.values():
        skipped.update(manifest.skipped)
    special = merged_special_tokens(manifest.special_tokens for manifest in manifests.values())
    parts = {(record.name, record.start): record for manifest in manifests.values() for record in manifest.inputs}
    inputs = {record.name: record for record in parts.values()}
    return {
        "present": len(manifests),
        "missing": sum(not entry.has_manifest for entry in files),
        "unreadable": sum(entry.has_manifest for entry in files) - len(manifests),
        "max_token_id": max((manifest.max_token_id for manifest in manifests.values()), default=None),
        "tokenizers": [dict(zip(names, key, strict=True)) | {"shards": n} for key, n in tokenizers.most_common()],
        "input_files": len(inputs),
        "input_rows": sum(record.rows for record in parts.values()),
        "input_bytes": sum(record.bytes for record in inputs.values()),
        "skipped": dict(skipped.most_common()),
        "left_out": dict(_left_out(manifests).most_common()),
        "special_tokens": None if special is None else special.model_dump(),
    }


def _left_out(manifests: Mapping[str, Manifest]) -> Counter[str]:
    """Return the entries of searched folders that were no input, by reason.

    All shards of a build name the same ones.
    """
    records = {
        (reason, record.count, tuple(record.names))
        for manifest in manifests.values()
        for reason, record in manifest.left_out.items()
    }
    total: Counter[str] = Counter()
    for reason, count, _ in records:
        total[reason] += count
    return total


def _measure(
    files: Sequence[ShardFiles],
    opened: Mapping[str, Shard],
    keys: Sequence[str],
    findings: list[Finding],
    meter: Meter,
) -> tuple[Distribution, dict[str, Distribution]]:
    """One pass over all lengths and scores."""
    lengths = Distribution()
    by_score = {score: Distribution() for score in keys}
    meter.start("reading lengths and scores", sum(shard.documents for shard in opened.values()))
    for entry in files:
        shard = opened.get(entry.prefix)
        if shard is None:
            continue
        sidecars = {score: _readable_scores(entry, shard, score, findings) for score in keys}
        for chunk in read_lengths(shard):
            lengths.add(chunk, chunk)
            for score, column in sidecars.items():
                if column is not None:
                    by_score[score].add(next(column), chunk)
            meter.advance(len(chunk))
    return lengths, by_score


def _readable_scores(
    entry: ShardFiles, shard: Shard, score: str, findings: list[Finding]
) -> Iterator[NDArray[np.floating]] | None:
    path = entry.sidecars.get(score)
    if path is None:
        return None
    try:
        return read_scores_in_chunks(path, shard.documents)
    except (ScoreError, OSError) as error:
        findings.append(Finding("scores", str(path), without_file(str(error), path)))
        return None


def _describe(found: Distribution, edges: NDArray[np.float64]) -> dict[str, Any]:
    """Return the numbers of documents by length or score.

    Where there are no documents it is their number alone.
    """
    if not found.count:
        return {"count": 0, "nan": found.nan}
    bins = found.histogram(edges)
    return {
        "count": found.count,
        "nan": found.nan,
        "exact": found.exact,
        "mean": found.mean,
        "quantiles": {f"{fraction:g}": found.quantile(fraction) for fraction in QUANTILES},
        "bins": [
            {"low": low, "high": high, "documents": count, "tokens": round(weight)}
            for low, high, count, weight in zip(
                edges[:-1].tolist(), edges[1:].tolist(), bins.counts.tolist(), bins.weights.tolist(), strict=True
            )
        ],
    }


def _describe_score(
    score: str, found: Distribution, files: Sequence[ShardFiles], source: Source, rank_index: Path | None
) -> dict[str, Any]:
    grades = found.distinct(_SCORE_VALUES)
    edges = _score_edges(found) if grades is None else _grade_edges(grades)
    bands = found.weight_by_band(BANDS)
    return _describe(found, edges) | {
        "grades": None if grades is None else grades.tolist(),
        "band_tokens": [round(tokens) for tokens in bands.tolist()],
        "sidecars": sum(score in entry.sidecars for entry in files),
        "rank_index": _describe_rank_index(source, score, rank_index),
    }


def _describe_rank_index(source: Source, score: str, path: Path | None) -> dict[str, Any]:
    if not source.shards:
        return {"state": "missing", "path": None, "message": "no shard can be opened"}
    path = path or index_path(source, score)
    try:
        index = open_rank_index(path, source, score)
    except (RankIndexError, OSError) as error:
        state = "stale" if path.is_file() else "missing"
        return {"state": state, "path": str(path), "message": without_file(str(error), path)}
    return {"state": "present", "path": str(path), "seed": index.seed}


def _length_edges(found: Distribution) -> NDArray[np.float64]:
    """Return edges that grow by a constant factor.

    Every length is whole, so edges are too.
    """
    if not found.count:
        return np.array([0.0, 1.0])
    first = max(1.0, found.quantile(0.001))
    edges = np.unique(np.rint(np.geomspace(first, max(first, found.maximum) + 1, _BINS + 1)))
    return np.unique(np.concatenate([[min(found.minimum, edges[0])], edges]))


def _score_edges(found: Distribution) -> NDArray[np.float64]:
    """Return edges at equal steps over the finite scores.

    Far outliers (beyond ten times the inner range) get the outermost bins.
    """
    low, high = found.quantile(0.01), found.quantile(0.99)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        finite = [value for value in (found.minimum, found.maximum, 0.0, 1.0) if np.isfinite(value)]
        low, high = min(finite), max(finite)
    reach = 10 * (high - low)
    low = found.minimum if found.minimum > low - reach else low
    high = found.maximum if found.maximum < high + reach else high
    edges = np.linspace(low, high, _BINS + 1)
    return np.unique(np.concatenate([[found.minimum], edges[1:-1], [found.maximum]]))


def _grade_edges(grades: NDArray[np.float64]) -> NDArray[np.float64]:
    """One bin for each score that occurs."""
    if not len(grades):
        return np.array([0.0, 1.0])
    return np.append(grades, np.nextafter(grades[-1], np.inf))
