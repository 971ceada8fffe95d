"""Rules between the fields of a plan that no field can check alone: versions, draws, repetitions."""

from collections.abc import Collection, Iterator, Sequence

from megatron_kaiyuan.data.plan_phases import PhaseSourceSpec, PhaseSpec
from megatron_kaiyuan.data.selection import Keep

__all__ = ["check_draws", "check_first_version", "check_repeats", "named_draws", "otherwise_in_second"]

_SECOND = {
    "start": "from",
    "but": "except",
    "draw": "draw",
    "repeat_order": "repeat_order",
    "repeat_spacing": "repeat_spacing",
    "shuffle": "shuffle",
    "packing": "packing",
}
"""Fields of a part that version 1 of the plan does not have, and how a plan writes them."""


def named_draws(phases: Sequence[PhaseSpec]) -> dict[tuple[str, str], Keep]:
    """Return what each named draw keeps, keyed with source and draw.

    It is the largest where the draw stands in several places.
    """
    found: dict[tuple[str, str], Keep] = {}
    for _, _, source, part in _parts(phases):
        if part.draw is not None and part.rest_of is None:
            known = found.get((source, part.draw))
            found[source, part.draw] = part.keep if known is None or known.high < part.keep.high else known
    return found


def _parts(phases: Sequence[PhaseSpec]) -> Iterator[tuple[str, PhaseSpec, str, PhaseSourceSpec]]:
    """The path of each part, its phase, its name and itself."""
    for number, phase in enumerate(phases):
        for name, part in phase.sources.items():
            yield f"phases.{number} ({phase.name}).sources.{name}", phase, name, part


def check_first_version(phases: Sequence[PhaseSpec]) -> None:
    """Refuse what a plan of version 1 cannot say."""
    for path, _, _, part in _parts(phases):
        if part.keep.of_second_version:
            raise ValueError(
                f"{path}.keep: {part.keep} is not in version 1 of the plan; write version: 2 for a new run"
            )
        for field in sorted(part.model_fields_set & set(_SECOND)):
            raise ValueError(
                f"{path}.{_SECOND[field]}: not in version 1 of the plan, begun by an earlier release; leave it "
                "out, or write version: 2 for a new run"
            )


def otherwise_in_second(phases: Sequence[PhaseSpec], scored: Collection[str]) -> list[str]:
    """Parts that version 2 of the plan would show in another order than version 1, each with the reason."""
    found = []
    for path, phase, name, part in _parts(phases):
        ascending = phase.order == "curriculum" and part.sorted and name in scored
        if part.keep.kind == "random":
            found.append(f"{path}: {part.keep} is drawn independently of every other random part")
        if part.repeat.denominator != 1:
            found.append(f"{path}: the part of a pass in repeat {float(part.repeat):g} is drawn independently")
        if ascending and (part.repeat > 1 or part.max_repeat is not None):
            found.append(f"{path}: copies rise in one ascent, and a budget repeats nothing before all is seen")
    return found


def check_draws(phases: Sequence[PhaseSpec]) -> None:
    """Refuse the rest of a draw that is made nowhere, or in several sizes."""
    for path, _, name, part in _parts(phases):
        if part.rest_of is None:
            continue
        sizes = [
            str(other.keep) for _, _, source, other in _parts(phases) if source == name and other.draw == part.rest_of
        ]
        if not sizes:
            made = sorted(draw for source, draw in named_draws(phases) if source == name)
            raise ValueError(
                f"{path}.draw: no part of {name} has draw: {part.rest_of}; write it where the random part is kept "
                f"(draws of {name}: {', '.join(made) or 'none'})"
            )
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{path}.draw: the draw {part.rest_of} is kept as {' and as '.join(dict.fromkeys(sizes))}, so its rest "
                "is not one set; keep the same part wherever the draw is named"
            )


def check_repeats(phases: Sequence[PhaseSpec], scored: Collection[str]) -> None:
    """Refuse an order of repetition where nothing ascends, or where an earlier phase has decided it."""
    for path, phase, name, part in _parts(phases):
        ascending = phase.order == "curriculum" and part.sorted and name in scored
        for field in sorted(part.model_fields_set & {"repeat_order", "repeat_spacing"}):
            if not ascending:
                raise ValueError(
                    f"{path}.{field}: only for a scored source in a curriculum, whose passes ascend; here each pass is "
                    "shuffled: leave it out"
                )
            if part.start == "unseen":
                raise ValueError(
                    f"{path}.{field}: with from: unseen the part keeps the bands of the phase that it goes on with, "
                    "and repeats nothing: leave it out"
                )
