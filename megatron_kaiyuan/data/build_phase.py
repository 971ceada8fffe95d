"""Resolving a phase: its parts become streams, and its token budget says how much of each it shows."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.amended import amended_phase
from megatron_kaiyuan.data.continued import continued_stream
from megatron_kaiyuan.data.interleave import prefix_counts
from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.parts import Part, build_stream, fitted_stream, most_windows
from megatron_kaiyuan.data.phase import Phase
from megatron_kaiyuan.data.plan_fields import MOST_PASSES
from megatron_kaiyuan.data.plan_phases import PhaseSourceSpec, PhaseSpec
from megatron_kaiyuan.data.plan_schema import PlanSpec
from megatron_kaiyuan.data.stream import Stream
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards.source import sources_at_once

__all__ = ["build_phase"]

_MOST_SAMPLES = 1 << 45  # beyond, interleave.py would round positions too coarsely
_MOST_TOKENS = 1 << 62


def build_phase(
    spec: PhaseSpec,
    plan: PlanSpec,
    sources: Mapping[str, OpenedSource],
    earlier: Sequence[Phase],
    *,
    indexed: bool = True,
) -> Phase:
    """Resolve the selections, repetitions and the token budget of a phase.

    Args:
        spec: the phase.
        plan: that it is of.
        sources: of the plan, opened.
        earlier: phases, resolved.
        indexed: whether what `tools/rank_data.py` stores for large sources must be there.

    Raises:
        PlanError: a selection that leaves less than one window, or a budget that the streams cannot fill.
    """
    length = plan.length_of(spec)
    each = length // plan.seq_length
    parts = [
        Part(plan, spec.name, spec.order, name, part, sources[name], length, indexed)
        for name, part in spec.sources.items()
    ]
    most_at_once = sources_at_once(part.source.source for part in parts)
    streams = side_by_side(
        lambda part: continued_stream(part, earlier) if part.spec.start == "unseen" else build_stream(part),
        parts,
        most=most_at_once,
    )
    _refuse_too_many(spec, streams, length)
    natural = np.array([stream.available for stream in streams], dtype=np.int64)
    weights = [part.weight for part in spec.sources.values()]
    rates = np.array([float(w) for w in weights if w is not None] or natural, dtype=np.float64)
    first_sample = earlier[-1].first_sample + earlier[-1].num_samples if earlier else 0
    wanted = int(natural.sum()) if spec.tokens is None else spec.tokens // length
    num_windows = _up_to_next(spec, plan, first_sample, wanted)
    most = [most_windows(stream, part.spec.max_repeat) for stream, part in zip(streams, parts, strict=True)]
    rates = _filled(rates, [part.spec.fill is not None for part in parts], most, num_windows)
    used = prefix_counts(rates, num_windows)
    if np.any(used > most):
        _refuse_budget(spec, streams, rates, most, num_windows)
    for part, count in zip(parts, used.tolist(), strict=True):
        if count == 0:
            raise PlanError(
                f"phase {spec.name!r}, source {part.name!r}: a budget of {counted(num_windows * each, 'sample')} is "
                "too small to show it even once; raise tokens, or leave the source out of the phase"
            )
    fitted = side_by_side(lambda item: fitted_stream(*item), list(zip(parts, streams, used.tolist(), strict=True)))
    streams_of = dict(zip(spec.sources, fitted, strict=True))
    phase = Phase(spec, first_sample, num_windows * each, streams_of, rates, used, each)
    return _amended(phase, parts, plan) if spec.amended else phase


def _amended(phase: Phase, parts: Sequence[Part], plan: PlanSpec) -> Phase:
    found = amended_phase(phase, parts, phase.spec.amended)
    step, end = _samples_of_next(phase.spec, plan), found.first_sample + found.num_samples
    if end % step:
        raise PlanError(
            f"phase {phase.name!r}: amended to end at sample {end:,}, where the windows of {counted(step, 'sample')} "
            f"that follow cannot begin; give it tokens: {(found.num_samples - end % step) * plan.seq_length}"
        )
    return found


def _samples_of_next(spec: PhaseSpec, plan: PlanSpec) -> int:
    """Samples of a window of the phase that follows; 1 after the last."""
    following = plan.phases[plan.phases.index(spec) + 1 :]
    return plan.length_of(following[0]) // plan.seq_length if following else 1


def _up_to_next(spec: PhaseSpec, plan: PlanSpec, first_sample: int, wanted: int) -> int:
    """Windows of a phase: as many as are wanted, less those after which longer windows could not begin.

    Windows of `k` samples begin at a sample that is a multiple of `k`, so that micro-batches hold whole ones.
    """
    length = plan.length_of(spec)
    each, step = length // plan.seq_length, _samples_of_next(spec, plan)
    found = next((w for w in range(wanted, max(0, wanted - step), -1) if (first_sample + w * each) % step == 0), 0)
    if not wanted:
        raise PlanError(
            f"phase {spec.name!r}: tokens {spec.tokens} is less than one window of seq_length {length}; raise it"
        )
    if not found:
        raise PlanError(
            f"phase {spec.name!r}: windows of {counted(step, 'sample')} follow and begin at a multiple of {step}, "
            "which this one does not reach; give it more tokens"
        )
    return found


def _filled(
    rates: NDArray[np.float64], may_run_out: Sequence[bool], most: Sequence[int], samples: int
) -> NDArray[np.float64]:
    """The rates at which every source that may run out shows at most what it has, and the others share the rest.

    A source that runs out is spread over the whole phase, so that its best data comes last in a curriculum too.
    """
    rooms = np.array(most, dtype=np.float64)
    short = np.zeros(len(rates), dtype=bool)
    found = rates
    while True:
        over = (prefix_counts(found, samples) > most) & np.array(may_run_out)
        if not over.any():
            return found
        rooms[over & short] -= 1  # rounded up to one more than it has
        short |= over
        found = rates * (samples - float(rooms[short].sum())) / float(rates[~short].sum())
        found[short] = np.maximum(rooms[short], 0.5)


def _refuse_too_many(spec: PhaseSpec, streams: Sequence[Stream], seq_length: int) -> None:
    """More samples than the merge can place exactly, or more tokens than 64 bits count."""
    tokens = max(sum(stream.num_tokens for stream in streams), spec.tokens or 0)
    if tokens // seq_length > _MOST_SAMPLES or tokens > _MOST_TOKENS:
        raise PlanError(
            f"phase {spec.name!r}: {counted(tokens, 'token')} are {counted(tokens // seq_length, 'sample')} of "
            f"{seq_length:,}; a phase "
            f"has at most {_MOST_SAMPLES:,} samples and {_MOST_TOKENS:,} tokens: lower repeat or tokens, or make "
            "several phases of it"
        )


def _largest_budget(rates: NDArray[np.float64], most: Sequence[int], samples: int) -> int:
    """The largest number of samples below `samples` that asks no stream for more than it may show."""
    low, high = 0, samples
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.all(prefix_counts(rates, middle) <= most) else (low, middle)
    return low


def _refuse_budget(
    spec: PhaseSpec, streams: Sequence[Stream], rates: NDArray[np.float64], most: Sequence[int], samples: int
) -> NoReturn:
    used, seq_length = prefix_counts(rates, samples), streams[0].seq_length
    short = [number for number, count in enumerate(used.tolist()) if count > most[number]]
    names = list(spec.sources)
    asked = [_asked(spec.sources[names[n]], names[n], streams[n], int(used[n])) for n in short]
    largest = _largest_budget(rates, most, samples)
    lower = (
        f"Lower the phase's tokens to {largest * seq_length:,}, or set "
        if np.all(prefix_counts(rates, largest) > 0)
        else "No smaller budget shows every source of the phase. Set "
    )
    raise PlanError(
        f"phase {spec.name!r}: tokens {spec.tokens:,} asks {'; '.join(text for text, _ in asked)}. {lower}"
        + " and ".join(f"sources.{names[n]}.{remedy}" for n, (_, remedy) in zip(short, asked, strict=True))
    )


def _asked(part: PhaseSourceSpec, name: str, stream: Stream, used: int) -> tuple[str, str]:
    """What a budget asks of a source that has less, and the field that would let it have that."""
    needed = Fraction(stream.tokens_of(stream.seen.windows + used), stream.selected.num_tokens)
    limit = "" if part.max_repeat is None else f", above its max_repeat {float(part.max_repeat):g}"
    text = (
        f"source {name!r} for {counted(used * stream.seq_length, 'token')}, its selection x{float(part.repeat):g} has "
        f"{stream.available * stream.seq_length:,}: that is {float(needed):.4g} passes{limit}"
    )
    if needed > MOST_PASSES:
        return text, f"weight lower, since a source has at most {MOST_PASSES:,} passes"
    if stream.seen.windows and (stream.ascending or stream.seen.levels):
        return text, "from to all, since what an ascending phase left is shown once"
    return text, f"max_repeat to at least {math.ceil(needed * 100) / 100:.2f}"
