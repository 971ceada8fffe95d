"""From a block to documents: texts, scores and, for each row that yields none, the reason.

Every reason is listed in `Reason`; docs/shards.md says what each means and what to do about it.
"""

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_kaiyuan.preprocess.readers import MAX_LINE_BYTES, ArrowRows, Block, LongLine, Unreadable, lines_of

__all__ = ["DocumentBatch", "Fault", "FieldKeys", "Reason", "RowError", "parse_block"]

_MISSING = object()
_LARGEST_SCORE = float(np.finfo(np.float32).max)
_STRETCH = 64  # rows that are not tried as plain ones after one that was not
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Reason(StrEnum):
    """Why a row gave no document; the names are the keys of `skipped` in the manifest."""

    BLANK_LINE = "blank_line"
    UNREADABLE_FILE = "unreadable_file"
    LINE_TOO_LONG = "line_too_long"
    INVALID_UTF8 = "invalid_utf8"
    BROKEN_JSON = "broken_json"
    MISSING_KEY = "missing_key"
    NOT_TEXT = "not_text"
    MISSING_ID = "missing_id"
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
    id: str | None = None
    """Field that names a document; None: documents have no names."""

    @property
    def all(self) -> tuple[str, ...]:
        """Every field that is read."""
        return (*self.text, *self.scores, *([self.id] if self.id is not None else []))


@dataclass(frozen=True, slots=True)
class Fault:
    """One row that gave no document."""

    row: int
    """Counted from 0 at the start of the block."""
    reason: Reason
    detail: str
    byte: int | None = None
    """Where its line begins in the file, of plain JSONL."""


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
    ids: list[str] = field(default_factory=list)
    """Empty where `FieldKeys.id` is None."""
    faults: list[Fault] = field(default_factory=list)
    offsets: NDArray[np.int64] | None = None
    """Byte of each row in its file, int64 `[rows]`; None where rows have no byte of their own (compressed, Parquet)."""

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
    if isinstance(payload, LongLine):
        batch.rows = 1
        batch.faults.append(_line_too_long(0))
        return batch
    if isinstance(payload, ArrowRows):
        _read_rows(_arrow_rows(payload), keys, batch, lambda row: row, checked=False)
        return batch
    found = lines_of(payload)
    if found.first_byte is not None:
        sizes = np.array(list(map(len, found.lines)), dtype=np.int64) + 1
        batch.offsets = found.first_byte + np.cumsum(sizes) - sizes
    if found.last_is_cut:
        found.lines.pop()
    loads = _fast_json()
    if loads is None:
        _read_rows(found.lines, keys, batch, _parse_line, checked=False)
    else:
        _read_lines(found.lines, keys, batch, loads)
    if found.last_is_cut:
        batch.faults.append(_line_too_long(batch.rows))
        batch.rows += 1
    return batch


def _line_too_long(row: int) -> Fault:
    detail = (
        f"a line longer than {MAX_LINE_BYTES >> 20} MiB; JSONL has one document a line (a JSON array over the whole "
        "file is not JSONL)"
    )
    return Fault(row, Reason.LINE_TOO_LONG, detail)


def _read_lines(
    lines: Sequence[bytes | memoryview],
    keys: FieldKeys,
    batch: DocumentBatch,
    loads: Callable[[bytes | memoryview], Any],
) -> None:
    """Fill the batch by a parser that gives valid Unicode: rows without any peculiarity here, the others as they come.

    A peculiar row, faulty or not, goes through `_read_rows`, and some rows after it too; most files have none, and then
    nothing is called for a row but the parser.
    """
    parse = _line_parser(loads)
    first = 0
    while first < len(lines):
        plain = _read_plain_rows(lines, first, keys, batch, loads)
        stop = min(plain + _STRETCH, len(lines))
        _read_rows(lines[plain:stop], keys, batch, parse, checked=True, first=plain)
        first = stop
    batch.rows = len(lines)


def _read_plain_rows(
    lines: Sequence[bytes | memoryview],
    first: int,
    keys: FieldKeys,
    batch: DocumentBatch,
    loads: Callable[[bytes | memoryview], Any],
) -> int:
    """Read rows from number `first` on until one is not plain; the number of that row.

    Plain is a row with texts as `str`, scores as `float` in range and the name as `str`, all under their very names.
    """
    numbers, texts, scores, names = batch.row_numbers, batch.texts, batch.scores, batch.ids
    for number in range(first, len(lines)):
        try:
            record = loads(lines[number])
            found = tuple([record[key] for key in keys.text])
            values = tuple([record[key] for key in keys.scores])
            name = record[keys.id] if keys.id is not None else ""
        except (ValueError, KeyError, TypeError):
            return number
        if type(name) is not str:
            return number
        for text in found:
            if type(text) is not str:
                return number
        for value in values:
            if type(value) is not float or not -_LARGEST_SCORE <= value <= _LARGEST_SCORE:
                return number
        numbers.append(number)
        texts.append(found)
        scores.append(values)
        if keys.id is not None:
            names.append(name)
    return len(lines)


def _read_rows[Row](
    rows: Sequence[Row],
    keys: FieldKeys,
    batch: DocumentBatch,
    parse: Callable[[Row], Mapping[str, Any]],
    *,
    checked: bool,
    first: int = 0,
) -> None:
    """Fill the batch; `checked` says that a `str` of `parse` is known to be valid Unicode."""
    batch.rows = len(rows)
    for number, row in enumerate(rows, start=first):
        try:
            record = parse(row)
            texts = tuple([_text(record, key, checked) for key in keys.text])
            scores = tuple([_score(record, key) for key in keys.scores])
            name = None if keys.id is None else _id(record, keys.id)
        except RowError as error:
            batch.faults.append(Fault(number, error.reason, error.detail))
            continue
        batch.row_numbers.append(number)
        batch.texts.append(texts)
        batch.scores.append(scores)
        if name is not None:
            batch.ids.append(name)


@functools.cache
def _fast_json() -> Callable[[bytes | memoryview], Any] | None:
    """The parser of orjson where it is installed: it takes half the time, and the bytes as they are."""
    if importlib.util.find_spec("orjson") is None:
        return None
    loads: Callable[[bytes | memoryview], Any] = importlib.import_module("orjson").loads
    return loads


def _line_parser(loads: Callable[[bytes | memoryview], Any]) -> Callable[[bytes | memoryview], Mapping[str, Any]]:
    def parse(line: bytes | memoryview) -> Mapping[str, Any]:
        try:
            record = loads(line)
        except ValueError:
            # orjson is stricter (NaN, lone surrogates, a byte order mark) and tells less: the other parser decides
            return _Unchecked(_parse_line(line))
        if type(record) is not dict:
            raise _not_an_object(record)
        return record

    return parse


def _parse_line(line: bytes | memoryview) -> Mapping[str, Any]:
    line = bytes(line)
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
        raise _not_an_object(record)
    return record


class _Unchecked(dict[str, Any]):
    """A row whose text may hold half of a surrogate pair."""


def _not_an_object(record: object) -> RowError:
    return RowError(Reason.BROKEN_JSON, f"a JSON {type(record).__name__} instead of an object with named fields")


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


def _text(record: Mapping[str, Any], key: str, checked: bool) -> str:  # noqa: FBT001
    value = _field(record, key)
    if type(value) is str:
        if not (checked and type(record) is dict):
            _check_surrogates(value, key)
        return value
    if value is _MISSING:
        raise RowError(Reason.MISSING_KEY, f"no field {key!r}; the fields here are {sorted(record)[:20]}")
    if isinstance(value, bytes):
        return _decoded(value, key)
    raise RowError(Reason.NOT_TEXT, f"field {key!r} holds {_shown(value)} instead of text")


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
        raise RowError(Reason.INVALID_UTF8, f"byte {error.start} of field {key!r}: {error.reason}") from None


def _id(record: Mapping[str, Any], key: str) -> str:
    value = _field(record, key)
    if isinstance(value, bytes):
        value = _decoded(value, key)
    if value is _MISSING or value is None or isinstance(value, bool) or not isinstance(value, str | int):
        found = "nothing" if value is _MISSING or value is None else _shown(value)
        raise RowError(Reason.MISSING_ID, f"id {key!r} is {found}; an id is a text or a whole number")
    _check_surrogates(name := str(value), key)
    return name


def _score(record: Mapping[str, Any], key: str) -> float:
    value = _field(record, key)
    if type(value) is float and -_LARGEST_SCORE <= value <= _LARGEST_SCORE:
        return value
    if value is _MISSING or value is None:
        raise RowError(Reason.MISSING_SCORE, f"no score {key!r}; the fields here are {sorted(record)[:20]}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(Reason.NON_NUMERIC_SCORE, f"score {key!r} is {_shown(value)} instead of a number")
    try:
        score = float(value)
    except OverflowError:
        score = np.inf
    if not abs(score) <= _LARGEST_SCORE:
        raise RowError(Reason.NAN_SCORE, f"score {key!r} is {score}, which is not a finite float32 number")
    return score


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
