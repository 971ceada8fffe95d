"""From a block to documents: texts, scores and, for each row that yields none, the reason."""

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_kaiyuan.preprocess.fields import (
    LARGEST_SCORE,
    MISSING,
    FieldKeys,
    OtherType,
    Reason,
    RowError,
    id_of,
    score_of,
    text_of,
)
from megatron_kaiyuan.preprocess.formats import encoding_problem
from megatron_kaiyuan.preprocess.readers import MAX_LINE_BYTES, ArrowRows, Block, LongLine, Unreadable, lines_of

__all__ = ["DocumentBatch", "Fault", "parse_block"]

_STRETCH = 64  # rows that are not tried as plain ones after one that was not
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row that gave no document."""

    row: int
    """Counted from 0 at the start of the block."""
    reason: Reason
    detail: str
    byte: int | None = None
    """Where its line begins in the file, of plain JSONL."""


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

    def score_matrix(self, score_keys: int) -> NDArray[np.float64]:
        """float64 `[documents, score keys]`."""
        return np.array(self.scores, dtype=np.float64).reshape(len(self.texts), score_keys)


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
    """Read rows from number `first` on until one is not plain, and return that row's number.

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
            if type(value) is not float or not -LARGEST_SCORE <= value <= LARGEST_SCORE:
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
    """Fill the batch from rows.

    `checked` says that a `str` of `parse` is known to be valid Unicode.
    """
    batch.rows = len(rows)
    for number, row in enumerate(rows, start=first):
        try:
            record = parse(row)
            valid = checked and type(record) is dict
            texts = tuple([text_of(record, key, valid) for key in keys.text])
            scores = tuple([score_of(record, key) for key in keys.scores])
            name = None if keys.id is None else id_of(record, keys.id)
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
            # orjson is stricter (NaN, lone surrogates, a byte order mark) and explains less: the other parser decides
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
        raise RowError(Reason.INVALID_UTF8, _not_utf8(line, error)) from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(Reason.BROKEN_JSON, f"not JSON: {error}{_json_hint(line)}") from None
    if not isinstance(record, dict):
        raise _not_an_object(record)
    return record


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    told = f"byte {error.start} of the line: not UTF-8 ({error.reason})"
    if other := encoding_problem(line):
        return f"{told}; {other}"
    return f"{told}; if the file is Latin-1 or Windows-1252, convert it with iconv -f WINDOWS-1252 -t UTF-8"


def _json_hint(line: bytes) -> str:
    """What a line is that looks like another format."""
    if other := encoding_problem(line):
        return f"; {other}"
    if b"\0" in line:
        return "; the line has zero bytes: the file is binary, or damaged"
    start = line.removeprefix(_BYTE_ORDER_MARK).strip()
    if start.startswith(b"["):
        return "; is the file one JSON array? Convert it with jq -c '.[]'"
    return "; is this JSON over several lines? Convert it with jq -c ." if start == b"{" else ""


class _Unchecked(dict[str, Any]):
    """A row whose text may hold half of a surrogate pair."""


def _not_an_object(record: object) -> RowError:
    what = {list: "array", str: "text", bool: "truth value", type(None): "null"}.get(type(record), "number")
    hint = "; is the file one JSON array? Convert it with jq -c '.[]'" if isinstance(record, list) else ""
    return RowError(Reason.BROKEN_JSON, f"a JSON {what} instead of an object with named fields{hint}")


def _arrow_rows(payload: ArrowRows) -> list[Mapping[str, Any]]:
    """Return rows as mappings with text as bytes.

    One cell of invalid UTF-8 would otherwise spoil the whole batch.
    """
    table = pa.ipc.open_stream(payload.data).read_all()
    absent = dict.fromkeys(payload.columns, MISSING)
    columns = {name: _cells(table.column(name).combine_chunks()) for name in table.column_names}
    if not columns:
        return [absent] * table.num_rows
    rows = zip(*columns.values(), strict=True)
    return [absent | dict(zip(columns, row, strict=True)) for row in rows]


def _cells(column: pa.Array) -> list[Any]:
    """Cells as Python values.

    A moment is shown by its column's type, for its value depends on pandas being there.
    """
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        children = [_cells(child) for child in column.flatten()]
        there = column.is_valid().to_pylist()
        rows = zip(*children, strict=True) if children else iter([()] * len(column))
        return [dict(zip(names, row, strict=True)) if valid else None for row, valid in zip(rows, there, strict=True)]
    if not _holds_moments(column.type):
        try:
            return list(column.cast(_with_bytes(column.type)).to_pylist(maps_as_pydicts="lossy"))
        except (pa.ArrowException, ValueError, OverflowError):
            pass  # such as an extension's type
    other = OtherType(str(column.type))
    return [other if valid else None for valid in column.is_valid().to_pylist()]


def _holds_moments(kind: pa.DataType) -> bool:
    return pa.types.is_temporal(kind) or any(_holds_moments(kind.field(index).type) for index in range(kind.num_fields))


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _with_bytes(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.large_binary()
    if pa.types.is_map(kind):
        return pa.map_(kind.key_type, _with_bytes(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct(
            [kind.field(index).with_type(_with_bytes(kind.field(index).type)) for index in range(len(kind))]
        )
    return kind
