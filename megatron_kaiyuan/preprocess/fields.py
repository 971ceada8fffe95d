"""One row to a text, scores and a name, or to the reason why it gives no document.

Every reason is listed in `Reason`; docs/shards.md says what each means and what to do about it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any

import numpy as np

__all__ = ["LARGEST_SCORE", "MISSING", "FieldKeys", "OtherType", "Reason", "RowError", "id_of", "score_of", "text_of"]

MISSING = object()
"""Stands for a field that a row does not have."""
LARGEST_SCORE = float(np.finfo(np.float32).max)
_LARGEST_EXACT = 1 << 53
_NUMERIC_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MOST_DIGITS = 400
"""A longer number is beyond float64 anyway, and slow to read."""
_MOST_FIELDS = 20
_MOST_SHOWN = 40


class Reason(StrEnum):
    """Why a row gave no document.

    The names are the keys of `skipped` in the manifest.
    """

    BLANK_LINE = "blank_line"
    UNREADABLE_FILE = "unreadable_file"
    LINE_TOO_LONG = "line_too_long"
    INVALID_UTF8 = "invalid_utf8"
    BROKEN_JSON = "broken_json"
    MISSING_KEY = "missing_key"
    NOT_TEXT = "not_text"
    MISSING_ID = "missing_id"
    MISSING_SCORE = "missing_score"
    NULL_SCORE = "null_score"
    NON_NUMERIC_SCORE = "non_numeric_score"
    NAN_SCORE = "nan_score"
    INEXACT_SCORE = "inexact_score"
    NOT_TOKENIZABLE = "not_tokenizable"
    EMPTY_DOCUMENT = "empty_document"
    TOO_LONG = "too_long"

    @property
    def is_error(self) -> bool:
        """Return whether a row with this reason follows `--on-error`.

        All but a blank line do: it holds no document, so nothing is lost with it.
        """
        return self is not Reason.BLANK_LINE


@dataclass(frozen=True, slots=True)
class FieldKeys:
    """Which fields of a row are read.

    A dot descends (`metadata.quality`), unless a field has that very name.
    """

    text: tuple[str, ...]
    scores: tuple[str, ...] = ()
    id: str | None = None
    """Field that names a document; None: documents have no names."""

    @property
    def all(self) -> tuple[str, ...]:
        """Every field that is read."""
        return (*self.text, *self.scores, *([self.id] if self.id is not None else []))


@dataclass(frozen=True, slots=True)
class OtherType:
    """A cell of a Parquet column whose type Python has no value for."""

    name: str

    def __repr__(self) -> str:
        return self.name


class RowError(Exception):
    """Error while one row is read, always caught and turned into a `Fault`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def text_of(record: Mapping[str, Any], key: str, checked: bool) -> str:  # noqa: FBT001
    """Return the text under a key.

    `checked` says that it is known to be valid Unicode.

    Raises:
        RowError: no such field, or no text in it.
    """
    value = _field(record, key)
    if type(value) is str:
        if not checked:
            _check_surrogates(value, key)
        return value
    if value is MISSING:
        raise RowError(Reason.MISSING_KEY, _absent(record, key))
    if isinstance(value, bytes):
        return _decoded(value, key)
    raise RowError(Reason.NOT_TEXT, f"field {key!r} holds {_shown(value)} instead of text")


def id_of(record: Mapping[str, Any], key: str) -> str:
    """Return the name of a document, or raise RowError."""
    value = _field(record, key)
    if isinstance(value, bytes):
        value = _decoded(value, key)
    if value is MISSING:
        raise RowError(Reason.MISSING_ID, f"no id: {_absent(record, key)}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(Reason.MISSING_ID, f"id {key!r} is {_shown(value)}; an id is a text or a whole number")
    _check_surrogates(name := str(value), key)
    return name


def score_of(record: Mapping[str, Any], key: str) -> float:
    """Return the number under a key, of JSON, of a Parquet column of any number type, or written as text.

    Raises:
        RowError: none, or one that float32 cannot hold; or a whole number that even float64 would round.
    """
    value = _field(record, key)
    if type(value) is float and -LARGEST_SCORE <= value <= LARGEST_SCORE:
        return value
    if value is MISSING:
        raise RowError(Reason.MISSING_SCORE, f"no score: {_absent(record, key)}")
    if value is None:
        raise RowError(Reason.NULL_SCORE, f"score {key!r} is null")
    number = _number(value)
    if number is None:
        raise RowError(Reason.NON_NUMERIC_SCORE, f"score {key!r} is {_shown(value)} instead of a number")
    try:
        score = float(number)
    except OverflowError:
        score = np.inf
    if not abs(score) <= LARGEST_SCORE:
        raise RowError(Reason.NAN_SCORE, f"score {key!r} is {score}, which is not a finite float32 number")
    if abs(score) >= _LARGEST_EXACT and score != number:
        raise RowError(
            Reason.INEXACT_SCORE,
            f"score {key!r} is {number}, a number beyond 2^53 that float64 rounds to {int(score)}, so that documents "
            "would tie; subtract the smallest, or give ranks",
        )
    return score


def _number(value: object) -> int | float | Decimal | None:
    """Return a number of whatever type, or written as text.

    None for anything else.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        text = value.strip()
        return Decimal(text) if len(text) <= _MOST_DIGITS and _NUMERIC_TEXT.fullmatch(text) else None
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, np.number):
        value = value.item()
    return value if isinstance(value, int | float | Decimal) else None


def _field(record: Mapping[str, Any], key: str) -> Any:
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def _absent(record: Mapping[str, Any], key: str) -> str:
    """Where the way to a field ends."""
    value: Any = record
    way: list[str] = []
    for part in key.split("."):
        inside = f" in {'.'.join(way)!r}" if way else ""
        if not isinstance(value, Mapping):
            return f"no field {key!r}: {'.'.join(way)!r} is {_shown(value)}, without fields of its own"
        if part not in value:
            names = sorted(map(str, value))
            more = ", ..." if len(names) > _MOST_FIELDS else ""
            nested = ".".join([*way, part])
            return f"no field {nested!r}; the fields{inside} here are {', '.join(names[:_MOST_FIELDS]) or 'none'}{more}"
        value = value[part]
        way.append(part)
    return f"no field {key!r}"


def _check_surrogates(value: str, key: str) -> None:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            detail = f"field {key!r} has half of a surrogate pair at character {error.start}"
            raise RowError(Reason.INVALID_UTF8, detail) from None


def _decoded(value: bytes, key: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            Reason.INVALID_UTF8, f"byte {error.start} of field {key!r}: not UTF-8 ({error.reason})"
        ) from None


def _shown(value: object) -> str:
    """A value of a row in a message, in the words of JSON."""
    if value is None:
        return "null"
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "the truth value"),
        ((str, bytes), "the text"),
        ((int, float, Decimal), "the number"),
        (Mapping, "the object"),
        (list, "the array"),
        (OtherType, "a cell of type"),
    ]
    text = repr(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
    kind = next((word for types, word in kinds if isinstance(value, types)), type(value).__name__)
    return f"{kind} {text[:_MOST_SHOWN]}{'...' if len(text) > _MOST_SHOWN else ''}"
