"""The score sidecar of a shard: one number for each document, in a `.npy` file of one dimension."""

import glob as globbing
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ScoreError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.files import open_regular
from megatron_kaiyuan.host.maps import advise_random, map_array, open_maps
from megatron_kaiyuan.host.terminal import agreed, counted, shell_command
from megatron_kaiyuan.shards.shard import Shard

__all__ = [
    "check_score_name",
    "check_score_shape",
    "check_scores",
    "kept_scores",
    "load_npy",
    "load_score_sidecar",
    "open_npy",
    "score_path",
]

_PLAIN_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|](?:f[248]|[iu][1248]))', "
    rb"'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)
_PLAIN_BYTES = 128
"""Of the header that `numpy.save` writes for one dimension."""


def score_path(prefix: str, score: str) -> Path:
    """Where the scores called `score` of a shard are stored."""
    return Path(f"{prefix}.scores.{score}.npy")


def check_score_name(name: str) -> str:
    """Return the name unchanged, or raise ValueError unless it can be a part of a file name."""
    if not name or "/" in name or "\0" in name:
        raise ValueError(
            f"{name!r} is not the name of a score: it is a part of a file name, P.scores.NAME.npy; write it without a "
            "folder"
        )
    return name


def load_score_sidecar(shard: Shard, score: str) -> NDArray[np.floating]:
    """Memory-map and check the scores of one shard."""
    return check_scores(_map_scores(shard, score), shard.documents, os.fspath(score_path(shard.prefix, score)))


def kept_scores(shard: Shard, score: str) -> NDArray[np.floating]:
    """The scores of one shard, mapped once for many look-ups: a training sample asks for them two dozen times."""
    attribute = f"_scores.{score}"
    kept: NDArray[np.floating] | None = shard.__dict__.get(attribute)
    return kept if kept is not None else open_maps().keep(shard, attribute, _map_scores(shard, score, random=True))


def _map_scores(shard: Shard, score: str, *, random: bool = False) -> NDArray[np.floating]:
    """Memory-map the scores of one shard, for a few of them or for all.

    Their number is checked, but none is read.
    """
    path = os.fspath(score_path(shard.prefix, score))
    try:
        layout = _plain_layout(path)
        if layout is not None:
            scores = map_array(path, layout[0], layout[1], layout[2], random=random)
        else:
            mapped = open_npy(path, path)
            if random:
                advise_random(mapped)
            scores = mapped.view(np.ndarray)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _no_such_scores(shard.prefix, score) from error
    if scores.shape == (shard.boundaries - 1,) != (shard.documents,):
        raise ScoreError(
            f"{path}: {counted(len(scores), 'score')}, one for each document as the index counts them, but the "
            "documents hold "
            f"{counted(shard.documents, 'sequence')} (an empty text has none, --split-sentences makes several), and "
            "each is "
            f"ranked; give the scores again with {tool('rank')} --scores {shell_command(path)}"
        )
    check_score_shape(scores, shard.documents, path)
    return scores


def _plain_layout(path: str) -> tuple[np.dtype[Any], int, int] | None:
    """Return type, count and offset of numbers as `numpy.save` writes them.

    None for any other file, which numpy reads. numpy evaluates the header as Python text, which takes longer than
    everything else about opening a shard.
    """
    with open_regular(path) as stream:
        match = _PLAIN_HEADER.match(stream.read(_PLAIN_BYTES))
        if match is None or match.end() != 10 + int.from_bytes(match[1], "little"):
            return None
        dtype, count = np.dtype(match[2].decode()), int(match[3])
        whole = os.fstat(stream.fileno()).st_size >= match.end() + count * dtype.itemsize
    return (dtype, count, match.end()) if whole else None


def _no_such_scores(prefix: str, score: str) -> ScoreError:
    path = score_path(prefix, score)
    start = f"{Path(prefix).name}.scores."
    names = sorted(other.name for other in path.parent.glob(f"{globbing.escape(start)}*.npy"))
    scores = [name.removeprefix(start).removesuffix(".npy") for name in names]
    near = [name for name in scores if name.endswith(f".{score}") or score.endswith(f".{name}")]
    remedy = f"build the shard with --score-key {score}, or give the scores with {tool('rank')} --scores"
    if near:
        remedy = f"name the score {near[0]}, which is there"
    return ScoreError(f"{path}: no such score sidecar (there: {', '.join(names) or 'none'}); {remedy}")


def load_npy(path: str | os.PathLike[str], origin: str) -> NDArray[Any]:
    """Memory-map a `.npy` file, or raise ScoreError for a truncated or different one."""
    return open_npy(path, origin).view(np.ndarray)


def open_npy(path: str | os.PathLike[str], origin: str) -> "np.memmap[Any, Any]":
    """`load_npy` that keeps numpy's class, which knows at what byte the numbers begin."""
    open_regular(path).close()  # a pipe would wait for a writer
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # the header is parsed as Python text, so damage shows as any of the parser's errors
        raise ScoreError(f"{origin}: not a whole .npy file of numbers ({error}); write the scores again") from error


def check_score_shape(scores: NDArray[np.generic], documents: int, origin: str) -> None:
    """Raise ScoreError unless there is one number for each document."""
    if scores.ndim != 1 or len(scores) != documents:
        raise ScoreError(
            f"{origin}: shape {scores.shape}, but the shard has {counted(documents, 'document')}; scores need one "
            "number per "
            "document in storage order: write them again"
        )
    if scores.dtype.kind not in "fiu":
        raise ScoreError(f"{origin}: dtype {scores.dtype} is not a number; scores are floats, higher is better")


def check_scores[Number: np.number](scores: NDArray[Number], documents: int, origin: str) -> NDArray[Number]:
    """Scores as they are, if there is one number for each document and none is NaN."""
    check_score_shape(scores, documents, origin)
    if scores.dtype.kind == "f" and len(scores) and np.isnan(scores.min()):  # the minimum with a NaN is NaN
        missing = np.flatnonzero(np.isnan(scores))
        raise ScoreError(
            f"{origin}: {counted(len(missing), 'score')} {agreed(len(missing), 'is', 'are')} NaN, the first for "
            f"document {missing[0]}; a document "
            "without a "
            "score has "
            "no rank: score it, or leave it out when building the shard (--on-error skip)"
        )
    return scores
