"""From a block to documents: texts, scores and, for each row that yields none, the reason.

Every reason is listed in `Reason`; docs/shards.md says what each means and what to do about it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_kaiyuan.preprocess.readers import ArrowRows, Block, Unreadable, lines_of

__all__ = ["DocumentBatch", "Fault", "FieldKeys", "Reason", "RowError", "parse_block"]

_MISSING = object()
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Reason(StrEnum):
    """Why a row gave no document; the names are the keys of `skipped` in the manifest."""

    BLANK_LINE = "blank_line"
    UNREADABLE_FILE = "unreadable_file"
    INVALID_UTF8 = "invalid_utf8"
    BROKEN_JSON = "broken_json"
    MISSING_KEY = "missing_key"
    NOT_TEXT = "not_text"
    MISSING_SCORE = "missing_score"
    NON_NUMERIC_SCORE = "non_numeric_score"
    NAN_SCORE = "nan_score"
    NOT_TOKENIZABLE = "not_tokenizable"
    EMPTY_DOCUMENT = "empty_document"
    TOO_LONG = "too_long"

    @property
    def is_error(self) -> bool:
        """A blank line holds no document, so nothing is lost with it; everything else follows `--on-error`."""
        return self is not Reason.BLANK_LINE


@dataclass(frozen=True, slots=True)
class FieldKeys:
    """Which fields of a row are read; a dot descends (`metadata.quality`), unless a field has that very name."""

    text: tuple[str, ...]
    scores: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """One row that gave no document."""

    row: int
    """Counted from 0 at the start of the block."""
    reason: Reason
    detail: str


class RowError(Exception):
    """Raised while one row is read; always caught and turned into a `Fault`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class DocumentBatch:
    """The documents of one block."""

    rows: int = 0
    """Lines or rows read, faulty ones included."""
    row_numbers: list[int] = field(default_factory=list)
    """Row of each document, from 0 at the start of the block."""
    texts: list[tuple[str, ...]] = field(default_factory=list)
    """One text per `FieldKeys.text`."""
    scores: list[tuple[float, ...]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def score_matrix(self, score_keys: int) -> NDArray[np.float32]:
        """float32 `[documents, score keys]`."""
        return np.array(self.scores, dtype=np.float32).reshape(len(self.texts), score_keys)


def parse_block(block: Block, keys: FieldKeys) -> DocumentBatch:
    """Read the rows of a block."""
    batch = DocumentBatch()
    payload = block.payload
    if isinstance(payload, Unreadable):
        batch.faults.append(Fault(0, Reason.UNREADABLE_FILE, payload.problem))
        return batch
    rows: list[bytes | Mapping[str, Any]]
    rows = [*_arrow_rows(payload)] if isinstance(payload, ArrowRows) else [*lines_of(payload)]
    batch.rows = len(rows)
    for number, row in enumerate(rows):
        try:
            record = _parse_line(row) if isinstance(row, bytes) else row
            texts = tuple(_text(record, key) for key in keys.text)
            scores = tuple(_score(record, key) for key in keys.scores)
        except RowError as error:
            batch.faults.append(Fault(number, error.reason, error.detail))
            continue
        batch.row_numbers.append(number)
        batch.texts.append(texts)
        batch.scores.append(scores)
    return batch


def _parse_line(line: bytes) -> Mapping[str, Any]:
    if not line.strip():
        raise RowError(Reason.BLANK_LINE, "a blank line")
    try:
        text = line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(Reason.INVALID_UTF8, f"byte {error.start} of the line: {error.reason}") from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(Reason.BROKEN_JSON, f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise RowError(Reason.BROKEN_JSON, f"a JSON {type(record).__name__} instead of an object with named fields")
    return record


def _arrow_rows(payload: ArrowRows) -> list[Mapping[str, Any]]:
    """Rows as mappings; text stays bytes, for one cell of invalid UTF-8 would otherwise spoil the whole batch."""
    table = pa.ipc.open_stream(payload.data).read_all()
    absent = dict.fromkeys(payload.columns, _MISSING)
    columns = {name: _cells(table.column(name).combine_chunks()) for name in table.column_names}
    if not columns:
        return [absent] * table.num_rows
    rows = zip(*columns.values(), strict=True)
    return [absent | dict(zip(columns, row, strict=True)) for row in rows]


def _cells(column: pa.Array) -> list[Any]:
    return list(column.cast(_with_bytes(column.type)).to_pylist())


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _with_bytes(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct(
            [kind.field(index).with_type(_with_bytes(kind.field(index).type)) for index in range(len(kind))]
        )
    return kind


def _field(record: Mapping[str, Any], key: str) -> Any:
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _text(record: Mapping[str, Any], key: str) -> str:
    value = _field(record, key)
    if value is _MISSING:
        raise RowError(Reason.MISSING_KEY, f"no field {key!r}; the fields here are {sorted(record)[:20]}")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(Reason.INVALID_UTF8, f"byte {error.start} of field {key!r}: {error.reason}") from None
    if not isinstance(value, str):
        raise RowError(Reason.NOT_TEXT, f"field {key!r} holds {_shown(value)} instead of text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            detail = f"field {key!r} has half of a surrogate pair at character {error.start}"
            raise RowError(Reason.INVALID_UTF8, detail) from None
    return value


def _score(record: Mapping[str, Any], key: str) -> float:
    value = _field(record, key)
    if value is _MISSING or value is None:
        raise RowError(Reason.MISSING_SCORE, f"no score {key!r}; the fields here are {sorted(record)[:20]}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(Reason.NON_NUMERIC_SCORE, f"score {key!r} is {_shown(value)} instead of a number")
    try:
        score = float(value)
    except OverflowError:
        score = np.inf
    if not abs(score) <= float(np.finfo(np.float32).max):
        raise RowError(Reason.NAN_SCORE, f"score {key!r} is {score}, which is not a finite float32 number")
    return score


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
