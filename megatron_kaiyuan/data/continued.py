"""`from: unseen`: a part that goes on with a source where earlier phases stopped, without replacement.

The phases that show a source one after the other, each but the first with `from: unseen`, are a chain. They share one
packing, so nothing is shown twice or left between two phases, to the window. Shuffled phases go on along one random
order: two of them are one phase cut in two. Phases that ascend each take an even part of what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from megatron_kaiyuan.data.parts import Part
from megatron_kaiyuan.data.phase import Phase
from megatron_kaiyuan.data.plan_phases import PhaseSourceSpec
from megatron_kaiyuan.data.stream import Stream
from megatron_kaiyuan.data.unseen import Seen
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.terminal import counted

__all__ = ["continued_stream"]


@dataclass(frozen=True, slots=True)
class _Earlier:
    """What one earlier phase showed of the source."""

    phase: Phase
    number: int

    @property
    def stream(self) -> Stream:
        """What it was taken from."""
        return self.phase.stream_list[self.number]

    @property
    def used(self) -> int:
        """Windows shown."""
        return int(self.phase.used[self.number])

    @property
    def continues(self) -> bool:
        """Whether it went on with what was unseen then."""
        return self.spec.start == "unseen"

    @property
    def spec(self) -> PhaseSourceSpec:
        """What the plan says of it."""
        return list(self.phase.spec.sources.values())[self.number]


def continued_stream(part: Part, earlier: Sequence[Phase]) -> Stream:
    """The windows of a source that no earlier phase has shown.

    Raises:
        PlanError: no earlier phase shows the source, nothing of it is unseen, or what they left cannot be continued.
    """
    shown = [
        _Earlier(phase, number)
        for phase in earlier
        for number, name in enumerate(phase.source_list)
        if name == part.source.name
    ]
    if not shown:
        _refuse(part, "no earlier phase shows it, so all of it is unseen", "leave out from")
    last = shown[-1]
    _check_others(part, shown)
    _check_same(part, last)
    if last.stream.ascending and last.phase.spec.amended:
        _refuse(part, f"phase {last.phase.name!r} was amended, so what it left is no even part", "leave out from")
    seen = _seen_after(last)
    stream = _of_part(part, last, seen)
    if stream.available < 1:
        many = "once" if stream.whole_passes == 1 else f"{stream.whole_passes} times"
        _refuse(
            part,
            f"earlier phases have shown all {counted(stream.num_windows, 'window')} of it {many}",
            f"write repeat: {stream.whole_passes + 1} for one more pass, or leave out from"
            if not stream.ascending and not seen.levels
            else "leave out from",
        )
    return stream


def _of_part(part: Part, last: _Earlier, seen: Seen) -> Stream:
    """The stream of the last phase, as this one goes on with it."""
    stream, repeat = last.stream, part.spec.repeat
    if part.ascending and not stream.ascending:
        _refuse(
            part,
            f"phase {last.phase.name!r} showed it in random order, so what it left does not ascend",
            "write sorted: false, or part the source beforehand with draw: NAME there and draw: rest of NAME here",
        )
    if stream.extra is not None or repeat.denominator != 1:
        _refuse(part, "it counts whole passes, and a repeat has a fraction", "write whole numbers in all its phases")
    if not stream.ascending and not seen.levels:  # `repeat` counts the passes of all these phases together
        return replace(stream, whole_passes=max(int(repeat), 1), repeat=repeat, seen=seen)
    if repeat != 1 or stream.whole_passes != 1:
        _refuse(part, "what an ascending phase left is shown once", "leave out repeat")
    if part.spec.max_repeat not in (None, 1):
        _refuse(part, "what an ascending phase left is shown once", "leave out max_repeat")
    key = part.key if stream.ascending and not part.ascending else stream.key
    return replace(stream, repeat=repeat, seen=seen, ascending=part.ascending, key=key)


def _seen_after(last: _Earlier) -> Seen:
    before = last.stream.seen
    if not last.stream.ascending:
        return replace(before, samples=before.samples + last.used)
    if last.used == last.stream.available:
        return replace(before, levels=(*before.levels, (last.used, last.used)))
    return replace(before, levels=(*before.levels, (last.stream.available, last.used)))


def _check_same(part: Part, last: _Earlier) -> None:
    """Refuse another selection than that of the phase that is continued, or windows of another length."""
    spec = last.spec
    if part.seq_length != last.stream.seq_length:
        _refuse(
            part,
            f"phase {last.phase.name!r} cut it into windows of {counted(last.stream.seq_length, 'token')}, and "
            f"this phase has {part.seq_length:,}",
            "give both phases the same seq_length, or part the source beforehand with draw: NAME there and draw: rest "
            "of NAME here",
        )
    same = (part.spec.keep, part.spec.draw, part.spec.but) == (spec.keep, spec.draw, spec.but)
    if {"keep", "draw", "but"} & part.spec.model_fields_set and not same:
        but = "" if spec.but is None else f" except {spec.but}"
        _refuse(
            part,
            f"phase {last.phase.name!r} kept {spec.draw or spec.keep}{but}, and only that can be continued",
            "leave out keep, draw and except",
        )
    for field, kept in _packing_of(last.stream).items():
        if field in part.spec.model_fields_set and getattr(part.spec, field) != kept:
            _refuse(
                part,
                f"phase {last.phase.name!r} packed the source with {field}: {kept}, and only that can be continued",
                f"leave out {field}",
            )


def _packing_of(stream: Stream) -> dict[str, str]:
    packed = stream.packed
    shuffled = stream.shuffling is not None or (packed is not None and packed.is_shuffled)
    return {
        "shuffle": "documents" if shuffled else "windows",
        "packing": "flowing" if packed is None else "whole",
    }


def _check_others(part: Part, shown: Sequence[_Earlier]) -> None:
    """Refuse phases before the chain that showed some of the same documents."""
    first = max(number for number, one in enumerate(shown) if not one.continues)
    mine = shown[first].stream.documents_selected
    for one in shown[:first]:
        other = one.stream.documents_selected
        if other.order.ranked != mine.order.ranked or other.common_with(mine).num_documents:
            _refuse(
                part,
                f"phases {one.phase.name!r} and {shown[first].phase.name!r} may have shown the same documents of it",
                f"write from: unseen in {shown[first].phase.name!r}, or leave it out here",
            )


def _refuse(part: Part, why: str, remedy: str) -> NoReturn:
    raise PlanError(f"phase {part.phase!r}, source {part.name!r}: from: unseen, but {why}; {remedy}")
