"""Scores for shards made elsewhere: from a `.npy` or a Parquet column to one sidecar per shard."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ScoreError
from megatron_kaiyuan.host.atomic import atomic_file
from megatron_kaiyuan.shards.score_files import check_scores, load_npy, score_path
from megatron_kaiyuan.shards.source import Source

__all__ = ["import_scores", "read_scores"]


def read_scores(origin: str) -> NDArray[np.floating]:
    """Scores in storage order from `FILE.npy` or `FILE.parquet:column`.

    Raises:
        ScoreError: the file or the column does not exist, is damaged, or is not a list of numbers.
    """
    path, _, column = origin.rpartition(":") if ".parquet:" in origin else (origin, "", "")
    if not Path(path).is_file():
        raise ScoreError(f"--scores {origin}: no file {path}; give a .npy file, or FILE.parquet:column")
    if not column:
        return load_npy(path, f"--scores {origin}")
    import pyarrow.parquet as parquet  # only here: the data engine itself needs numpy alone

    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:
        raise ScoreError(f"--scores {origin}: not a Parquet file ({error})") from error
    if column not in file.schema_arrow.names:
        raise ScoreError(f"--scores {origin}: no column {column!r}; the file has {', '.join(file.schema_arrow.names)}")
    try:
        values: NDArray[np.floating] = file.read(columns=[column]).column(0).to_numpy()
    except (OSError, ValueError) as error:
        raise ScoreError(
            f"--scores {origin}: column {column!r} cannot be read ({error}); the file is damaged: restore it"
        ) from error
    return values


def import_scores(source: Source, origin: str, score: str) -> None:
    """Check scores against the documents of a source and write them beside its shards, atomically.

    Raises:
        ScoreError: not one number per document, NaN among them, or whole numbers that no float64 tells apart.
    """
    kept = _as_floats(check_scores(read_scores(origin), source.num_documents, f"--scores {origin}"), origin)
    for number, shard in enumerate(source.shards):
        first, last = source.document_offsets[number : number + 2].tolist()
        with atomic_file(score_path(shard.prefix, score)) as stream:
            np.save(stream, kept[first:last])


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
