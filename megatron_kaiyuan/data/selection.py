"""What part of a source a phase uses: `all`, `top 30%`, `band [20%, 40%)`, `random 60%`, `score >= 3`, and more.

Quantiles are of the score, ascending: 0 is the worst document and 1 the best, so `top 30%` is `band [70%, 100%)`.
Fractions are of documents, or of tokens with ` by tokens` behind. Fractions are kept as exact rationals; counts are
rounded once, to the nearest document. A list of parts by quality is all that any of them has.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = ["Keep", "exact_number", "parse_count", "parse_fraction", "parse_keep"]

_PATTERN = re.compile(
    r"(?P<all>all)|(?P<kind>top|bottom|random)\s+(?P<size>\S+)|band\s*\[\s*(?P<low>[^,\s]+)\s*,\s*(?P<high>[^)\s]+)\s*\)"
)
_AMOUNT = re.compile(r"(?P<kind>top|bottom|random)\s+(?P<count>\S+)\s+(?P<by>documents|tokens)")
_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_LIMIT = re.compile(rf"score\s*(?P<sign>>=|<=|>|<)\s*(?P<value>{_NUMBER})")
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\s*(?P<first><=|<)\s*score\s*(?P<last><=|<)\s*(?P<high>{_NUMBER})")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_FORMS = (
    "write all, top 30%, bottom 10%, band [20%, 40%) or random 60%, optionally followed by ' by tokens'; or "
    "score >= 3, 3 <= score < 5, top 10B tokens, top 2M documents"
)
_LONG_EXPONENT = re.compile(r"e[+-]?\d{4,}")
_SMALLEST = Fraction(1, 10**100)
_UNIT = re.compile(r"\s+by\s+(documents|tokens)$")


@dataclass(frozen=True, slots=True)
class Keep:
    """A parsed selection."""

    kind: Literal["all", "band", "random", "score", "top", "bottom", "list"]
    low: Fraction = Fraction(0)
    """Lower quantile of a band, 0 = worst."""
    high: Fraction = Fraction(1)
    """Upper quantile of a band; for `random`, the fraction drawn."""
    by: Literal["documents", "tokens"] = "documents"
    amount: int = 0
    """Of `top`, `bottom` and `random`: so many documents or tokens, instead of a fraction; 0: a fraction."""
    at_least: tuple[float, bool] | None = None
    """Lowest score, and whether a document with it is kept."""
    at_most: tuple[float, bool] | None = None
    """Highest score, and whether a document with it is kept."""
    parts: tuple["Keep", ...] = ()
    """Of a list."""

    @property
    def needs_scores(self) -> bool:
        """Whether the selection speaks of quality."""
        return self.kind not in ("all", "random")

    @property
    def of_second_version(self) -> bool:
        """Whether version 1 of the plan does not have it."""
        return self.kind not in ("all", "band", "random") or self.amount > 0

    def __str__(self) -> str:
        if self.kind == "list":
            return f"[{', '.join(map(str, self.parts))}]"
        if self.kind == "score":
            return _score_text(self.at_least, self.at_most)
        if self.amount:
            return f"{self.kind} {self.amount} {self.by}"
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


def parse_keep(value: object) -> Keep:
    """Parse a selection, or a list of them.

    Raises:
        ValueError: not a selection, a fraction outside (0, 1], an empty band, a list of other than parts by quality.
    """
    if isinstance(value, Keep):
        return value
    if isinstance(value, list):
        return _parse_list(value)
    text = str(value).strip()
    amount = _AMOUNT.fullmatch(text)
    if amount is not None:
        return _parse_amount(text, amount)
    if (limit := _LIMIT.fullmatch(text)) or (limit := _RANGE.fullmatch(text)):
        return _parse_scores(text, limit)
    return _parse_share(text)


def _parse_share(text: str) -> Keep:
    unit = _UNIT.search(text)
    by: Literal["documents", "tokens"] = "tokens" if unit and unit[1] == "tokens" else "documents"
    match = _PATTERN.fullmatch(text[: unit.start()].strip() if unit else text)
    if match is None:
        raise ValueError(f"{text!r} is not a selection; {_FORMS}")
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


def _parse_list(items: list[object]) -> Keep:
    parts = tuple(parse_keep(item) for item in items)
    if not parts:
        raise ValueError("an empty list keeps nothing; leave the source out of the phase instead")
    for part in parts:
        if not part.needs_scores:
            raise ValueError(f"a list joins parts by quality, and {part} is none; write it alone")
    return parts[0] if len(parts) == 1 else Keep("list", parts=parts)


def _parse_amount(text: str, match: re.Match[str]) -> Keep:
    if "%" in match["count"]:
        raise ValueError(f"{text!r} is a share and an amount at once; write top 30%, or top 10B tokens")
    amount = parse_count(match["count"])
    if not 0 < amount < 1 << 62:
        raise ValueError(f"{text!r} keeps nothing, or more than there can be; give a number from 1 to 4e18")
    kind: Literal["top", "bottom", "random"] = match["kind"]  # type: ignore[assignment]
    by: Literal["documents", "tokens"] = match["by"]  # type: ignore[assignment]
    return Keep(kind, by=by, amount=amount)


def _parse_scores(text: str, match: re.Match[str]) -> Keep:
    given = match.groupdict()
    if "sign" in given:
        limit = (float(given["value"].replace("_", "")), "=" in given["sign"])
        return Keep("score", at_least=limit) if given["sign"][0] == ">" else Keep("score", at_most=limit)
    low, high = (float(given[name].replace("_", "")) for name in ("low", "high"))
    first, last = given["first"] == "<=", given["last"] == "<="
    if low > high or (low == high and not (first and last)):
        raise ValueError(f"{text!r} is empty: its lower score is not below its upper one")
    return Keep("score", at_least=(low, first), at_most=(high, last))


def _score_text(at_least: tuple[float, bool] | None, at_most: tuple[float, bool] | None) -> str:
    if at_most is None:
        assert at_least is not None
        return f"score >{'=' * at_least[1]} {at_least[0]!r}"
    if at_least is None:
        return f"score <{'=' * at_most[1]} {at_most[0]!r}"
    return f"{at_least[0]!r} <{'=' * at_least[1]} score <{'=' * at_most[1]} {at_most[0]!r}"


def parse_count(text: str) -> int:
    """`120B`, `1.5T`, `20k` and `120_000_000`: a whole number in units of a thousand.

    Raises:
        ValueError: not a whole number; says how to write one with an exponent.
    """
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([kmbgt]?)", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a number of tokens; write 120B, 1.5T, 300M or 120_000_000{_exponent(text)}")
    count = Fraction(match[1].replace("_", "")) * _UNITS[match[2]]
    if count.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of tokens")
    return int(count)


def _exponent(text: str) -> str:
    """A hint for what is a number in YAML only with a point in it, such as `1e12`."""
    try:
        value = exact_number(text.strip())
    except (ValueError, ZeroDivisionError, OverflowError):
        return ""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size and (value / size * 1000).denominator == 1:
            return f"; {text.strip()} is {float(value / size):g}{unit}"
    return ""


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
