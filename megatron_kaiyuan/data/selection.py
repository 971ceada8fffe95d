"""What part of a source a phase uses: `all`, `top 30%`, `bottom 10%`, `band [20%, 40%)`, `random 60%`.

Quantiles are of the score, ascending: 0 is the worst document and 1 the best, so `top 30%` is `band [70%, 100%)`.
Fractions are of documents, or of tokens with ` by tokens` behind. Fractions are kept as exact rationals; counts are
rounded once, to the nearest document.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = ["Keep", "exact_number", "parse_fraction", "parse_keep"]

_PATTERN = re.compile(
    r"(?P<all>all)|(?P<kind>top|bottom|random)\s+(?P<size>\S+)|band\s*\[\s*(?P<low>[^,\s]+)\s*,\s*(?P<high>[^)\s]+)\s*\)"
)
_LONG_EXPONENT = re.compile(r"e[+-]?\d{4,}")
_SMALLEST = Fraction(1, 10**100)
_UNIT = re.compile(r"\s+by\s+(documents|tokens)$")


@dataclass(frozen=True, slots=True)
class Keep:
    """A parsed selection."""

    kind: Literal["all", "band", "random"]
    low: Fraction = Fraction(0)
    """Lower quantile of a band, 0 = worst."""
    high: Fraction = Fraction(1)
    """Upper quantile of a band; for `random`, the fraction drawn."""
    by: Literal["documents", "tokens"] = "documents"

    @property
    def needs_scores(self) -> bool:
        """Whether the selection speaks of quality."""
        return self.kind == "band"

    def __str__(self) -> str:
        unit = " by tokens" if self.by == "tokens" else ""
        if self.kind == "all":
            return "all"
        if self.kind == "random":
            return f"random {_percent(self.high)}{unit}"
        if self.high == 1:
            return f"top {_percent(1 - self.low)}{unit}"
        if self.low == 0:
            return f"bottom {_percent(self.high)}{unit}"
        return f"band [{_percent(self.low)}, {_percent(self.high)}){unit}"


def parse_keep(text: str) -> Keep:
    """Parse a selection.

    Raises:
        ValueError: not a selection, a fraction outside (0, 1], or an empty band.
    """
    unit = _UNIT.search(text)
    by: Literal["documents", "tokens"] = "tokens" if unit and unit[1] == "tokens" else "documents"
    match = _PATTERN.fullmatch(text[: unit.start()].strip() if unit else text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a selection; write all, top 30%, bottom 10%, band [20%, 40%) or random 60%, "
            "optionally followed by ' by tokens'"
        )
    if match["all"]:
        return Keep("all")
    if match["kind"]:
        size = parse_fraction(match["size"])
        if size == 0:
            raise ValueError(f"{text!r} keeps nothing; leave the source out of the phase instead")
        if match["kind"] == "random":
            return Keep("random", high=size, by=by)
        return Keep("band", 1 - size, Fraction(1), by) if match["kind"] == "top" else Keep("band", high=size, by=by)
    low, high = parse_fraction(match["low"]), parse_fraction(match["high"])
    if low >= high:
        raise ValueError(f"{text!r} is empty: its lower quantile is not below its upper one (0% = worst, 100% = best)")
    return Keep("band", low, high, by)


def parse_fraction(text: str) -> Fraction:
    """`30%`, `0.3` and `3/10` alike.

    Raises:
        ValueError: not a number, or outside [0, 1]; a bare `30` is refused because it could mean either.
    """
    try:
        value = exact_number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except OverflowError as error:
        raise ValueError(f"{text!r} is too large or too small: {error}") from error
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} is not a fraction; write 30% or 0.3") from error
    if not 0 <= value <= 1:
        hint = f"; did you mean {text}%?" if 1 < value <= 100 and not text.endswith("%") else ""
        raise ValueError(f"{text!r} is not between 0% and 100%{hint}")
    return value


def exact_number(text: str) -> Fraction:
    """`2.5`, `1e-3` and `7/2` as they stand.

    Raises:
        ValueError, ZeroDivisionError: not a number, as of Fraction.
        OverflowError: beyond 1e-100 to 1e100. An exponent of nine digits would take minutes to write out.
    """
    value = None if _LONG_EXPONENT.search(text.replace("_", "").lower()) else Fraction(text)
    if value is None or (value and not _SMALLEST <= abs(value) <= 1 / _SMALLEST):
        raise OverflowError("numbers are between 1e-100 and 1e100")
    return value


def _percent(value: Fraction) -> str:
    return f"{float(value * 100):.10g}%"
