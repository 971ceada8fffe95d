"""Scores for shards made elsewhere: from a `.npy` or a Parquet column to one sidecar per shard."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ScoreError
from megatron_kaiyuan.host.atomic import atomic_file
from megatron_kaiyuan.host.cli import tool_command
from megatron_kaiyuan.host.files import is_read_only, open_regular
from megatron_kaiyuan.host.terminal import counted, shell_command
from megatron_kaiyuan.shards.index_check import read_boundaries, require_sound_index
from megatron_kaiyuan.shards.score_files import check_scores, load_npy, score_path
from megatron_kaiyuan.shards.source import Source

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["import_scores", "read_scores"]

_MAGIC_BYTES = 8
_PARQUET = b"PAR1"
_ARCHIVE = b"PK\x03\x04"


def read_scores(origin: str) -> NDArray[np.number]:
    """Return scores in storage order from `FILE.npy` or `FILE.parquet:COLUMN`.

    The first bytes decide which it is. A column may hold numbers of any type, decimals included, or numbers written as
    text. A dot descends: `metadata.quality`.

    Raises:
        ScoreError: the file or the column does not exist, is damaged, or is not a list of numbers.
    """
    path, column = _split_origin(origin)
    try:
        with open_regular(path) as stream:
            magic = stream.read(_MAGIC_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ScoreError(
            f"--scores {origin}: no file {path} ({error.strerror}); give a .npy file, or FILE.parquet:COLUMN"
        ) from error
    if magic.startswith(_PARQUET):
        return _read_column(origin, path, column)
    if magic.startswith(_ARCHIVE):
        raise ScoreError(f"--scores {origin}: an archive (.npz); write one array with numpy.save")
    if column:
        raise ScoreError(f"--scores {origin}: {path} is not a Parquet file; give a .npy file, or FILE.parquet:COLUMN")
    return load_npy(path, f"--scores {origin}")


def _split_origin(origin: str) -> tuple[str, str]:
    """The file and the column, which are parted at the first colon behind which they can be."""
    if Path(origin).exists():
        return origin, ""
    places = [place for place, character in enumerate(origin) if character == ":"]
    existing = [place for place in places if Path(origin[:place]).is_file()]
    place = next(iter(existing or reversed(places)), len(origin))
    return origin[:place], origin[place + 1 :]


def _read_column(origin: str, path: str, column: str) -> NDArray[np.number]:
    import pyarrow as pa  # only here: the data engine itself needs numpy alone
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = _leaves(file.schema_arrow)
            if column not in names:
                told = f"no column {column!r}; " if column else ""
                raise ScoreError(
                    f"--scores {origin}: {told}give FILE.parquet:COLUMN (it has {', '.join(names) or 'no column'})"
                )
            way = [column] if column in file.schema_arrow.names else column.split(".")
            values = file.read(columns=[column]).column(way[0])
        if len(way) > 1:
            values = compute.struct_field(values, way[1:])
    except (OSError, pa.ArrowException) as error:
        raise ScoreError(
            f"--scores {origin}: column {column!r} cannot be read ({error}); the file is damaged: restore it"
        ) from error
    return _numbers(origin, column, values)


def _leaves(schema: "pa.Schema") -> list[str]:
    """Names of all columns, those inside structs with dots."""
    import pyarrow as pa

    names: list[str] = []
    waiting = [(field.name, field.type) for field in reversed(schema)]
    while waiting:
        name, kind = waiting.pop()
        if pa.types.is_struct(kind):
            waiting += [
                (f"{name}.{kind.field(place).name}", kind.field(place).type) for place in reversed(range(len(kind)))
            ]
        else:
            names.append(name)
    return names


def _numbers(origin: str, column: str, values: "pa.ChunkedArray") -> NDArray[np.number]:
    """Return a column as numpy numbers.

    Whole numbers stay whole.
    """
    import pyarrow as pa

    asked = f"--scores {origin}: column {column!r}"
    if values.null_count:
        first = values.is_null().index(pa.scalar(value=True)).as_py()
        raise ScoreError(
            f"{asked} has {counted(values.null_count, 'null')}, the first in row {first:,}; a document without a "
            "score has no "
            "rank: fill them in"
        )
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        numbers: NDArray[np.number] = values.cast(kind).to_numpy()
        return numbers
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (pa.types.is_decimal(kind) or is_text):
        raise ScoreError(f"{asked} is of type {kind}, which is not a number")
    try:
        return _exact(values.cast(kind))
    except (pa.ArrowException, OverflowError) as error:
        raise ScoreError(f"{asked} does not hold numbers that float64 can tell apart ({error})") from error


def _exact(values: "pa.ChunkedArray") -> NDArray[np.number]:
    """Return decimals, or numbers written as text, as int64 where all are whole.

    Beyond 2^53 they would be ties as float64.
    """
    import pyarrow as pa

    try:
        numbers: NDArray[np.number] = values.cast(pa.int64()).to_numpy()
    except pa.ArrowException:
        numbers = values.cast(pa.float64()).to_numpy()
        if np.abs(numbers).max(initial=0) > 1 << 53:
            raise OverflowError("numbers beyond 2^53 with fractions") from None
    return numbers


def import_scores(source: Source, origin: str, score: str) -> None:
    """Check scores against the documents of a source and write them beside its shards, atomically.

    One number for each document as the index counts them is taken too: an empty text has a score and no tokens, and
    what --split-sentences made of one text has one score.

    Raises:
        ScoreError: not one number per document, NaN among them, or different whole numbers that are equal as
            float64. Or the folder of the shards cannot be written.
    """
    scores = _one_each(read_scores(origin), source, f"--scores {origin}")
    kept = _as_floats(check_scores(scores, source.num_documents, f"--scores {origin}"), origin)
    for number, shard in enumerate(source.shards):
        first, last = source.document_offsets[number : number + 2].tolist()
        try:
            with atomic_file(score_path(shard.prefix, score)) as stream:
                np.save(stream, kept[first:last])
        except OSError as error:
            if not is_read_only(error):
                raise
            raise _read_only(source, shard.prefix, origin, score, error) from error


def _read_only(source: Source, prefix: str, origin: str, score: str, error: OSError) -> ScoreError:
    folder, name = Path(prefix).absolute().parent, Path(prefix).name
    ends = "{bin,idx,manifest.json}" if source.shards[0].record else "{bin,idx}"
    only = len(source.shards) == 1
    linked = f"{shell_command(folder / name if only else folder)}{'' if only else '/*'}.{ends}"
    ranked = shell_command(f"scored/{name}" if only else "scored", "--score", score, "--scores", origin)
    return ScoreError(
        f"--scores {origin}: scores are stored beside the shards, and {folder} cannot be written ({error.strerror}). "
        "Link the shards into a folder of your own, rank them there, and name that folder in the plan:\n"
        f"  mkdir scored && ln -s {linked} scored/\n"
        f"  {tool_command('rank')} {ranked}"
    )


def _one_each(scores: NDArray[np.number], source: Source, origin: str) -> NDArray[np.number]:
    """Return scores of documents as the indexes count them, spread over their sequences.

    Other scores are returned as they are.
    """
    boundaries = sum(shard.boundaries - 1 for shard in source.shards)
    if scores.ndim != 1 or len(scores) != boundaries:
        return scores
    sequences = []
    for shard in source.shards:
        require_sound_index(shard)
        sequences.append(np.diff(read_boundaries(shard)))
    held = np.concatenate(sequences)
    if boundaries == source.num_documents and (held != 1).any():
        raise ScoreError(
            f"{origin}: {counted(boundaries, 'score')}, and the shards have as many documents as sequences, but not "
            f"one each (the first other one is document {int((held != 1).argmax()):,}), so what the scores are of "
            "cannot be known; "
            "build the shards again without empty texts, or rank them by scores of sequences in shards of their own"
        )
    return np.repeat(scores, held)


def _as_floats(scores: NDArray[np.generic], origin: str) -> NDArray[np.floating]:
    """The scores in float32, or in float64 where they need it: large whole numbers would else become ties."""
    for dtype in (np.float64,) if scores.dtype == np.float64 else (np.float32, np.float64):
        floats: NDArray[np.floating] = scores.astype(dtype, copy=False)
        with np.errstate(invalid="ignore"):  # the largest whole numbers round up to what their type cannot hold
            if np.array_equal(floats.astype(scores.dtype, copy=False), scores):
                return floats
    raise ScoreError(
        f"--scores {origin}: {scores.dtype} numbers beyond 2^53 would lose their order as float64; subtract their "
        "smallest, or give their ranks"
    )
