"""What a plan and the manifests of its shards know of the data: origin, licence, sizes, hashes, what was removed."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.manifest import Manifest, load_manifest

__all__ = ["source_facts"]


def source_facts(plan: Plan, described: Mapping[str, Any], unknown: list[str]) -> dict[str, dict[str, Any]]:
    """Return the facts of each source, JSON-ready, with None for what is not known.

    Args:
        plan: Opened.
        described: Its sources, as `Plan.describe` returns them.
        unknown: Is added to.
    """
    return {name: _source(plan, name, described[name], unknown) for name in plan.sources}


def _source(plan: Plan, name: str, described: dict[str, Any], unknown: list[str]) -> dict[str, Any]:
    spec = plan.sources[name]
    unknown += [
        f"{field} of {name}: write `{field}:` at sources.{name} of the plan"
        for field, value in (("origin", spec.origin), ("licence", spec.licence))
        if value is None
    ]
    shards = [shard.prefix for shard in plan.opened[name].source.shards]
    manifests = _manifests(shards)
    if len(manifests) < len(shards):
        unknown.append(
            f"hashes, input and what was removed of {name}: no manifest of "
            f"{len(shards) - len(manifests):,} of {counted(len(shards), 'shard')}"
        )
    return {
        "origin": spec.origin,
        "licence": spec.licence,
        "domain": spec.domain,
        "score": spec.score,
        "shards": len(shards),
        **{field: described[field] for field in ("documents", "tokens", "tokens_seen", "epochs", "bands")},
        "held_out_documents": described["held_out_documents"],
        "denied_documents": described["denied_documents"],
        "removed": _removed(manifests) if manifests else None,
        "inputs": sorted({record.name for manifest in manifests for record in manifest.inputs}),
        "created_by": sorted({manifest.created_by for manifest in manifests}),
        "json_keys": sorted({manifest.json_key for manifest in manifests}),
        "append_eod": sorted({manifest.append_eod for manifest in manifests}),
        "tokenizer": manifests[0].tokenizer.model_dump() if manifests else None,
        "sha256": _digest(manifests) if len(manifests) == len(shards) else None,
    }


def _manifests(prefixes: Sequence[str]) -> list[Manifest]:
    found = []
    for prefix in prefixes:
        try:
            found.append(load_manifest(str(prefix)))
        except ShardError:  # of another tool, or damaged: named as lacking
            continue
    return found


def _removed(manifests: Sequence[Manifest]) -> dict[str, int]:
    """Rows that gave no document, by reason."""
    found: Counter[str] = Counter()
    for manifest in manifests:
        found.update(manifest.skipped)
    return {why: count for why, count in found.items() if count}


def _digest(manifests: Sequence[Manifest]) -> str | None:
    """sha256 over the sha256 of each shard's `.bin` and `.idx`, in their order, a line each."""
    lines = [manifest.files[role].sha256 for manifest in manifests for role in ("bin", "idx") if role in manifest.files]
    if len(lines) < 2 * len(manifests):
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
