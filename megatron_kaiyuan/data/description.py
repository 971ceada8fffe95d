"""The dry run: what a plan will show, phase by source by quantile band, as plain data."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.amended import AmendedPhase
from megatron_kaiyuan.data.constraints import bounded_shares, describe_bound, domain_samples
from megatron_kaiyuan.data.interleave import prefix_bound, prefix_counts
from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.phase import Phase
from megatron_kaiyuan.data.plan_schema import PlanSpec
from megatron_kaiyuan.data.stream import Stream
from megatron_kaiyuan.documents.runs import DocumentRuns

__all__ = ["QUALITY_COLUMNS", "ResolvedPlan", "band_edges", "describe_plan", "quality_at"]


QUALITY_COLUMNS = 96
"""Places at which a description gives the quality of each scored source."""
_PLACES = 2048
"""Windows of a stretch that are looked up for the bands of an amended curriculum."""


class ResolvedPlan(NamedTuple):
    """What a description is made from."""

    spec: PlanSpec
    opened: Mapping[str, OpenedSource]
    phases: list[Phase]
    fingerprint: str

    @property
    def seq_length(self) -> int:
        """Predicted tokens of a sample."""
        return self.spec.seq_length


def describe_plan(plan: ResolvedPlan, bands: int) -> dict[str, Any]:
    """Return all of `Plan.describe`.

    Args:
        plan: the facts of a resolved plan.
        bands: equal score bands, by documents, that a scored source is divided into.
    """
    samples = sum(phase.num_samples for phase in plan.phases)
    return {
        "version": plan.spec.order_version,
        "version_written": plan.spec.version is not None,
        "seq_length": plan.seq_length,
        "seed": plan.spec.seed,
        "fingerprint": plan.fingerprint,
        "samples": samples,
        "tokens": samples * plan.seq_length,
        "domains": _domain_shares(plan, plan.phases),
        "domain_bounds": [describe_bound(share, plan.seq_length) for share in bounded_shares(plan.spec, plan.phases)],
        "phases": [_describe_phase(plan, phase) for phase in plan.phases],
        "sources": {name: _describe_source(plan, source, bands) for name, source in plan.opened.items()},
    }


def _describe_phase(plan: ResolvedPlan, phase: Phase) -> dict[str, Any]:
    sources = {
        name: _describe_stream(plan.spec.order_version, phase, number, name, stream)
        for number, (name, stream) in enumerate(phase.streams.items())
    }
    return {
        "name": phase.name,
        "order": phase.order,
        "seq_length": phase.seq_length,
        "samples_per_window": phase.samples_per_window,
        "first_sample": phase.first_sample,
        "samples": phase.num_samples,
        "tokens": phase.num_samples * plan.seq_length,
        "tokens_unused_of_budget": _unused(plan, phase),
        "lr": phase.lr.model_dump(exclude={"jump"}) if phase.lr else None,
        "domains": _domain_shares(plan, [phase]),
        "sources": sources,
    }


def _unused(plan: ResolvedPlan, phase: Phase) -> int:
    """Tokens of its budget that a phase does not show: less than a window of it, or of a longer one that follows."""
    amended = isinstance(phase, AmendedPhase)
    budget = phase.spec.amended[-1].tokens if amended else phase.spec.tokens
    return 0 if budget is None else budget - phase.num_samples * plan.seq_length


def _domain_shares(plan: ResolvedPlan, phases: list[Phase]) -> dict[str, float]:
    total = sum(phase.num_samples for phase in phases)
    return {domain: samples / total for domain, samples in domain_samples(plan.spec, phases).items()}


def _describe_stream(version: int, phase: Phase, number: int, name: str, stream: Stream) -> dict[str, Any]:
    used = int(phase.used[number])
    return {
        "draw": phase.spec.sources[name].draw,
        "fill": phase.spec.sources[name].fill,
        "from": phase.spec.sources[name].start,
        "keep": phase.spec.sources[name].kept,
        "repeat": float(stream.repeat),
        "order": _order_text(stream),
        "documents": stream.documents_selected.num_documents,
        "unique_tokens": stream.documents_selected.num_tokens,
        "padding": 0.0 if stream.packed is None else stream.packed.padding,
        "samples": used * phase.samples_per_window,
        "tokens": used * stream.seq_length,
        "share": used / phase.num_windows,
        "share_asked": _share_asked(phase, name),
        "epochs": used * stream.seq_length / stream.selected.num_tokens,
        "shown": _times_shown(version, stream, used),
        "bands": stream.num_bands if stream.ascending else None,
        "windows_left_out": stream.available - used,
        "tokens_left_over": stream.leftover,
        "mix_bound_samples": prefix_bound(phase.rates.tolist(), number) * phase.samples_per_window,
    }


def _order_text(stream: Stream) -> str:
    if stream.packed is not None:
        rising = "ascending" if stream.ascending else "random"
        return f"{rising} windows of whole{' shuffled' if stream.packed.is_shuffled else ''} documents"
    if stream.shuffling is None:
        return "ascending quality" if stream.ascending else "random"
    return f"random in {stream.shuffling.num_bands} ascending bands" if stream.ascending else "random documents"


def _share_asked(phase: Phase, name: str) -> float | None:
    """Return the share of the phase that the weight of a source asks for, None without weights."""
    weights = {one: part.weight for one, part in phase.spec.sources.items() if part.weight is not None}
    return float(weights[name] / sum(weights.values())) if weights else None


def _times_shown(version: int, stream: Stream, used: int) -> list[dict[str, int]] | None:
    """Return the tokens of the selection, by how often it is shown together with the phases it goes on with.

    None where this is not known.
    """
    total, shown = stream.selected.num_tokens, (stream.seen.windows + used) * stream.seq_length
    if version == 1 and stream.ascending and stream.num_passes > 1 and used < stream.num_windows:
        return None
    times, more = divmod(shown, total)
    counts = ({"times": times, "tokens": total - more}, {"times": times + 1, "tokens": more})
    return [count for count in counts if count["tokens"]]


def _tokens_seen(phase: Phase, number: int) -> int:
    """Tokens that a phase shows of a source, less padding."""
    stream, tokens = phase.stream_list[number], int(phase.used[number]) * phase.stream_list[number].seq_length
    return tokens if stream.packed is None else round(tokens * (1 - stream.packed.padding))


def _describe_source(plan: ResolvedPlan, source: OpenedSource, bands: int) -> dict[str, Any]:
    seen = sum(
        _tokens_seen(phase, number)
        for phase in plan.phases
        for number, name in enumerate(phase.streams)
        if name == source.name
    )
    described = [] if source.spec.score is None else _describe_bands(plan, source, bands)
    return {
        "documents": source.source.num_documents,
        "tokens": source.source.num_tokens,
        "domain": source.spec.domain,
        "score": source.spec.score,
        "held_out_documents": len(source.held_out),
        "held_out_tokens": source.held_out_runs.num_tokens,
        "held_out_elsewhere_documents": len(source.held_out_elsewhere),
        "denied_documents": len(source.denied),
        "tokens_seen": seen,
        "thin": None if source.spec.thin is None else float(source.spec.thin),
        "epochs": seen / (source.source if source.spec.thin is None else source.trainable(ranked=False)).num_tokens,
        "bands": described,
        "quality": quality_over_run(plan.phases, source, described, QUALITY_COLUMNS) if described else [],
    }


def band_edges(documents: int, bands: int) -> NDArray[np.int64]:
    """Return the ranks at which equal bands of documents begin and, last, end, int64 `[bands + 1]`.

    Bands are those that the monitor counts.
    """
    return np.array([-(-band * documents // bands) for band in range(bands + 1)], dtype=np.int64)


def _describe_bands(plan: ResolvedPlan, source: OpenedSource, bands: int) -> list[dict[str, Any]]:
    edges = band_edges(source.source.num_documents, bands)
    tokens = np.diff(source.trainable(ranked=True).tokens_below(edges))  # what is held out can be seen by no phase
    seen = {
        phase.name: _band_tokens(phase, number, stream, edges, tokens)
        for phase in plan.phases
        for number, (name, stream) in enumerate(phase.streams.items())
        if name == source.name
    }
    return [
        {
            "low": band / bands,
            "high": (band + 1) / bands,
            "tokens": int(tokens[band]),
            "seen": {phase: round(float(values[band])) for phase, values in seen.items()},
            "epochs": float(sum(values[band] for values in seen.values()) / tokens[band]) if tokens[band] else 0.0,
        }
        for band in range(bands)
    ]


def _band_tokens(
    phase: Phase, number: int, stream: Stream, edges: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Tokens of each band that a phase shows.

    Exact for streams in rank order, but for windows that cross an edge; a random part in storage order takes its
    share of each band in expectation. A budget's thinning is even, so it scales all bands alike.
    """
    if isinstance(phase, AmendedPhase) and stream.ascending:
        return _amended_tokens(phase, number, edges)
    if stream.packed is not None:
        one = _pass_tokens(stream, stream.packed.runs, edges, tokens)
        return np.asarray(one * (int(phase.used[number]) / stream.packed.num_documents), dtype=np.float64)
    whole = _pass_tokens(stream, stream.selected, edges, tokens) * stream.whole_passes
    extra = _pass_tokens(stream, stream.extra, edges, tokens) if stream.extra else 0.0
    used: NDArray[np.float64] = (whole + extra) * (int(phase.used[number]) / stream.num_windows)
    return used


def _amended_tokens(phase: AmendedPhase, number: int, edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens of each band that an ascending stream of several stretches shows, by the middles of some windows."""
    found = np.zeros(len(edges) - 1)
    for stretch in phase.stretches:
        stream, used = stretch.stream_list[number], int(stretch.used[number])
        shown = int(prefix_counts(stretch.rates, stretch.num_samples)[number])
        places = [shown * (2 * part + 1) // (2 * min(shown, _PLACES)) for part in range(min(shown, _PLACES))]
        middles = [stream.middle_position(stream.window(place, used)) for place in places]
        bands = np.searchsorted(edges, middles, side="right") - 1
        tokens = shown * stream.seq_length * (1.0 if stream.packed is None else 1 - stream.packed.padding)
        found += np.bincount(bands, minlength=len(found)) * (tokens / max(len(places), 1))
    return found


def _pass_tokens(
    stream: Stream, documents: DocumentRuns, edges: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    if documents.order.ranked:
        return np.diff(documents.tokens_below(edges)).astype(np.float64)
    fraction = documents.num_tokens / int(tokens.sum())
    share: NDArray[np.float64] = tokens.astype(np.float64) * fraction
    return share


def quality_over_run(
    phases: Sequence[Phase], source: OpenedSource, bands: Sequence[Mapping[str, Any]], columns: int
) -> list[float | None]:
    """Score quantile (0 = worst, 1 = best) of what a scored source shows at the middle of `columns` equal parts.

    It is that of the document in the middle of the window shown there, where the stream ascends, and the mean of the
    phase where it comes in random order. None where the source is not shown.

    Args:
        phases: of the plan.
        source: one with scores.
        bands: as described: `low`, `high` and, by phase, `seen`.
        columns: how many places.
    """
    total = phases[-1].first_sample + phases[-1].num_samples
    values: list[float | None] = []
    for column in range(columns):
        sample = total * (2 * column + 1) // (2 * columns)
        phase = next(phase for phase in phases if sample < phase.first_sample + phase.num_samples)
        if source.name not in phase.streams:
            values.append(None)
        elif phase.streams[source.name].ascending:
            values.append(quality_at(phase, source, sample - phase.first_sample))
        else:
            values.append(_mean(phase, bands))
    return values


def quality_at(phase: Phase, source: OpenedSource, sample: int) -> float:
    """Of the window that an ascending stream shows nearest to a sample of its phase."""
    if isinstance(phase, AmendedPhase):
        stretch = phase.stretch_of(sample)
        phase, sample = stretch, sample + phase.first_sample - stretch.first_sample
    number = phase.source_list.index(source.name)
    stream, used = phase.stream_list[number], int(phase.used[number])
    own = int(sample // phase.samples_per_window * phase.rates[number] / phase.rates.sum())
    return stream.middle_position(stream.window(min(own, used - 1), used)) / source.source.num_documents


def _mean(phase: Phase, bands: Sequence[Mapping[str, Any]]) -> float | None:
    tokens = [band["seen"].get(phase.name, 0) for band in bands]
    middles = [(band["low"] + band["high"]) / 2 for band in bands]
    total = sum(tokens)
    return sum(middle * count for middle, count in zip(middles, tokens, strict=True)) / total if total else None
