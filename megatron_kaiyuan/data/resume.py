"""What the order of samples depends on, as data, and whether a changed plan leaves consumed samples as they were."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from megatron_kaiyuan.data.amended import AmendedPhase
from megatron_kaiyuan.data.interleave import prefix_counts
from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.phase import Phase
from megatron_kaiyuan.data.plan_schema import PlanSpec
from megatron_kaiyuan.data.stream import Stream
from megatron_kaiyuan.errors import ResumeError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.source import sources_at_once

__all__ = ["check_resume", "order_record", "version_of_record"]

_FORMATS = {1: "megatron_kaiyuan.order/1", 2: "megatron_kaiyuan.order/2"}
"""By the version of the plan."""
_OPTIONAL = {
    "held_out_elsewhere",
    "held_out_groups",
    "seen",
    "except",
    "denied",
    "thin",
    "shuffle",
    "packing",
}  # only records of parts that have it


def order_record(spec: PlanSpec, opened: Mapping[str, OpenedSource], phases: Sequence[Phase]) -> dict[str, Any]:
    """Plain data that two plans share exactly when they show the same samples in the same order."""
    used = dict.fromkeys(name for phase in phases for name in phase.streams)
    most = sources_at_once(opened[name].source for name in used)
    side_by_side(lambda name: opened[name].content, list(used), most)  # and kept there: each one probes its files
    return {
        "format": _FORMATS[spec.order_version],
        "seq_length": spec.seq_length,
        "seed": spec.seed,
        "phases": [_phase_record(phase, opened, spec.order_version) for phase in phases],
    }


def _phase_record(phase: Phase, opened: Mapping[str, OpenedSource], version: int) -> dict[str, Any]:
    """The phase as it was planned, and the lengths that it got after it had begun."""
    planned, samples = phase, phase.num_samples
    amended: dict[str, Any] = {}
    if isinstance(phase, AmendedPhase):
        planned, samples = phase.stretches[0], phase.planned_samples
        length = planned.stream_list[0].seq_length
        starts = [stretch.first_sample - phase.first_sample for stretch in phase.stretches[1:]]
        lengths = [amendment.tokens // length for amendment in phase.spec.amended]
        amended = {"amended": [list(pair) for pair in zip(starts, lengths, strict=True)]}
    longer = {"samples_per_window": phase.samples_per_window} if phase.samples_per_window > 1 else {}
    return (
        amended
        | longer
        | {
            "name": phase.name,
            "order": phase.order,
            "samples": samples,
            "merge_order": list(phase.streams),  # ties between streams go by their number
            "sources": {
                name: _stream_record(planned, name, stream, rate, int(used), opened[name])
                | (_second_record(planned, name, stream) if version > 1 else {})
                for (name, stream), rate, used in zip(
                    planned.streams.items(), planned.rates.tolist(), planned.used, strict=True
                )
            },
        }
    )


def _stream_record(
    phase: Phase, name: str, stream: Stream, rate: float, used: int, source: OpenedSource
) -> dict[str, Any]:
    elsewhere = source.held_out_elsewhere
    shared = {"held_out_elsewhere": sha256(elsewhere.tobytes()).hexdigest()[:16]} if len(elsewhere) else {}
    if source.held_out_groups is not None:
        shared["held_out_groups"] = sha256(source.held_out.tobytes()).hexdigest()[:16]
    if source.spec.thin is not None:
        shared["thin"] = str(source.spec.thin)
    if len(source.denied):
        shared["denied"] = sha256(source.denied.tobytes()).hexdigest()[:16]
    return {
        "content": source.content,
        "score": source.spec.score,
        "held_out": len(source.held_out),
        "keep": str(phase.spec.sources[name].keep),
        "ascending": stream.ascending,
        "ranking": source.ranking if stream.selected.order.ranked else None,
        "documents": stream.documents_selected.num_documents,
        "tokens": stream.documents_selected.num_tokens,
        "repeat": str(stream.repeat),
        "rate": rate,
        "passes": stream.whole_passes,
        "extra_documents": stream.extra.num_documents if stream.extra else 0,
        "used": used,
    } | shared


def _second_record(phase: Phase, name: str, stream: Stream) -> dict[str, Any]:
    """What version 2 adds: named draws, bands of repetition, and what earlier phases have shown."""
    part = phase.spec.sources[name]
    levels = [list(level) for level in stream.seen.levels]
    seen = {"seen": [levels, stream.seen.samples]} if part.start == "unseen" else {}
    but = {} if part.but is None else {"except": str(part.but)}
    return {"draw": part.draw, "bands": stream.num_bands} | seen | but | _packing_record(stream)


def _packing_record(stream: Stream) -> dict[str, list[Any]]:
    """How documents are packed, where it is not as they are stored or ranked, one after another."""
    if stream.packed is not None:
        packing: dict[str, list[Any]] = {
            "packing": ["whole", stream.packed.num_documents, stream.packed.group, stream.packed.is_shuffled]
        }
        bands = stream.packed.shuffled_bands  # of one band everything is in `packing`
        return packing | ({"shuffle": ["documents", bands]} if bands > 1 else {})
    return {} if stream.shuffling is None else {"shuffle": ["documents", stream.shuffling.num_bands]}


def version_of_record(record: Mapping[str, Any]) -> int:
    """Return the version of the plan that a saved order was made under.

    The newest version where the record is none of ours.
    """
    found = [version for version, name in _FORMATS.items() if name == record.get("format")]
    return found[0] if found else max(_FORMATS)


def check_resume(saved: dict[str, Any], current: dict[str, Any], consumed_samples: int) -> None:
    """Compare the consumed part of two orders.

    A phase that is wholly or partly consumed must be the same, but for one freedom: the last one that has begun may
    get another length if it is shuffled, since its order does not depend on it; more or fewer passes of its sources
    too, as `_passes_are_free` says. Later phases may change at will.

    Raises:
        ResumeError: names what changed, with the saved and the present value.
    """
    if consumed_samples == 0:
        return
    if saved.get("format") in _FORMATS.values() and saved["format"] != current["format"]:
        version = version_of_record(saved)
        raise ResumeError(
            f"resume after {counted(consumed_samples, 'sample')}: the run began under version {version} of the plan "
            "language, "
            f"and this plan is of version {version_of_record(current)}, which orders its samples otherwise. Write "
            f"version: {version} to go on with the run, or start a new one from these weights with --finetune and "
            "another --save directory"
        )
    for field in ("format", "seq_length", "seed"):
        _same(field, saved.get(field), current[field], consumed_samples)
    first = 0
    for number, old in enumerate(saved["phases"]):
        if first >= consumed_samples:
            return
        where = f"phases.{number} ({old['name']})"
        if number >= len(current["phases"]):
            _refuse(where, "present", "missing", consumed_samples)
        new = current["phases"][number]
        last_begun = first + _length(old) >= consumed_samples
        if last_begun and first + _length(new) < consumed_samples:
            _refuse(f"{where}.samples", _length(old), _length(new), consumed_samples)
        _compare_amendments(where, old, new, consumed_samples, min(consumed_samples - first, _length(old)))
        here = consumed_samples - first if last_begun and old["order"] == "shuffled" else None
        _compare_phase(where, old, new, _Consumed(consumed_samples, here, current["seq_length"]))
        first += _length(old)


def _length(phase: Mapping[str, Any]) -> int:
    """Samples of a phase, with its last amendment."""
    return int(phase["amended"][-1][1] if phase.get("amended") else phase["samples"])


def _compare_amendments(where: str, old: Mapping[str, Any], new: Mapping[str, Any], consumed: int, here: int) -> None:
    """Refuse another length that begins before the sample that was reached.

    `here`: consumed samples of the phase.
    """
    before, now = ([pair for pair in phase.get("amended", []) if pair[0] < here] for phase in (old, new))
    if before != now:
        _refuse(f"{where}.amended", before, now, consumed)


@dataclass(frozen=True, slots=True)
class _Consumed:
    """What a run has consumed, seen from one of its phases."""

    samples: int
    """In all."""
    here: int | None
    """Of this phase, where its length is free; None where it is not."""
    seq_length: int
    """Predicted tokens of a sample."""


def _compare_phase(where: str, old: dict[str, Any], new: dict[str, Any], consumed: _Consumed) -> None:
    each = int(old.get("samples_per_window", 1))
    length = each * consumed.seq_length
    _same(f"{where}.seq_length", length, new.get("samples_per_window", 1) * consumed.seq_length, consumed.samples)
    for field in ("name", "order", "samples") if consumed.here is None else ("name", "order"):
        _same(f"{where}.{field}", old[field], new[field], consumed.samples)
    _same(f"{where}.sources", old.get("merge_order"), new["merge_order"], consumed.samples)
    names = new["merge_order"]
    rates = np.array([old["sources"][name]["rate"] for name in names], dtype=np.float64)
    shown = dict(zip(names, prefix_counts(rates, -(-(consumed.here or 0) // each)).tolist(), strict=True))
    for name, stream in old["sources"].items():
        other = new["sources"][name]
        free = set() if consumed.here is None else {"used"}
        if consumed.here is not None and _passes_are_free(stream, other, shown[name], length):
            free |= {"passes", "extra_documents"}
        for field in sorted((set(stream) | (_OPTIONAL & set(other))) - free):
            _same(f"{where}.sources.{name}.{field}", stream.get(field), other.get(field), consumed.samples)


def _passes_are_free(old: dict[str, Any], new: dict[str, Any], shown: int, seq_length: int) -> bool:
    """Whether two shuffled streams that differ in their passes agree on the first `shown` samples.

    Whole passes are shuffled one by one, whatever follows: windows that end within those that both streams have are the
    same. A partial pass is shuffled as what it is, so once it was reached it must stay as it was.
    """
    if not old.get("extra_documents") and not new["extra_documents"]:
        return True
    common = min(old.get("passes", 0), new["passes"]) * old.get("tokens", 0)
    if "packing" in old:  # windows are whole in their pass
        return bool(shown <= min(old["passes"], new["passes"]) * old["packing"][1])
    return bool(shown <= max(0, (common - 1) // seq_length))


def _same(field: str, old: object, new: object, consumed: int) -> None:
    if old != new:
        _refuse(field, old, new, consumed)


def _refuse(field: str, old: object, new: object, consumed: int) -> None:
    raise ResumeError(
        f"resume after {counted(consumed, 'sample')}: {field} was {old!r} and is now {new!r}, so the samples already "
        "trained "
        "on would "
        "have been others. Restore it (later phases may change freely), or start a new run from these weights with "
        "--finetune and another --save directory"
    )
