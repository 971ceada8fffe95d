"""Which quality a run shows when: the score quantile of each source over the tokens of the run."""

from typing import Any

__all__ = ["quality_over_run"]


def quality_over_run(description: dict[str, Any], source: str, columns: int) -> list[float | None]:
    """Expected score quantile (0 = worst, 1 = best) of what a scored source shows, at equal distances over the run.

    Exact to a band where the stream ascends, pass by pass; the mean of the phase where it is in random order.

    Args:
        description: What `Plan.describe` returned.
        source: A source with bands.
        columns: Number of places, at the middle of as many equal parts.

    Returns:
        None where the source is not shown.
    """
    values: list[float | None] = []
    for column in range(columns):
        sample = description["samples"] * (column + 0.5) / columns
        phase = next(phase for phase in description["phases"] if sample < phase["first_sample"] + phase["samples"])
        progress = (sample - phase["first_sample"]) / phase["samples"]
        values.append(_quality_at(description["sources"][source]["bands"], phase, source, progress))
    return values


def _quality_at(bands: list[dict[str, Any]], phase: dict[str, Any], source: str, progress: float) -> float | None:
    row = phase["sources"].get(source)
    if row is None:
        return None
    middles: list[float] = [(band["low"] + band["high"]) / 2 for band in bands]
    tokens: list[int] = [band["seen"].get(phase["name"], 0) for band in bands]
    total = sum(tokens)
    if not total:
        return None
    if row["order"] != "ascending quality":
        return sum(middle * count for middle, count in zip(middles, tokens, strict=True)) / total
    place = _place_in_pass(row["repeat"], progress) * total
    for middle, count in zip(middles, tokens, strict=True):
        if place < count:
            return middle
        place -= count
    return next(middle for middle, count in zip(reversed(middles), reversed(tokens), strict=True) if count)


def _place_in_pass(repeat: float, progress: float) -> float:
    """How far the pass has come at `progress` of the phase; the last, fractional pass is shorter and as wide."""
    number, place = divmod(progress * repeat, 1.0)
    left = repeat - number
    return min(place / left, 1.0) if left < 1.0 else place
