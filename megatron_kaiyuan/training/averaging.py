"""Average the weights of several checkpoints of one run into one that loads like any other.

With a constant or moderately decaying learning rate the last weights still carry the noise of single steps; their
average does not, and the best data of a curriculum, which comes last, keeps its full rate (arXiv 2511.18903). Only
weights are averaged. The optimizer's state is left out: it belongs to one point, so the result is for evaluation,
conversion, and a new start with `--finetune` (or `--no-load-optim`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_kaiyuan.data.resume import check_resume
from megatron_kaiyuan.errors import ConfigError, ResumeError
from megatron_kaiyuan.training.checkpoint_io import (
    LEGACY_COMMON_STATE,
    TRACKER_NAME,
    Checkpoint,
    find_checkpoints,
    grouped_by_size,
    iteration_folder,
    write_checkpoint,
)

__all__ = ["MANIFEST_NAME", "AverageManifest", "average_checkpoints", "choose_checkpoints", "weights_of"]

MANIFEST_NAME = "average.json"
"""File in the folder of the result that says what was averaged."""
_FORMAT = "megatron_kaiyuan.average/1"
_GROUP_BYTES = 1 << 28
_PLAN_RECORD = "kaiyuan_plan_record"
_EMA = re.compile(r"ema:([\d.]+)")


@dataclass(frozen=True, slots=True)
class AveragedCheckpoint:
    """One part of an average."""

    iteration: int
    weight: float
    consumed_samples: int


@dataclass(frozen=True, slots=True)
class AverageManifest:
    """What was averaged; stored beside the result as JSON."""

    format: str
    weights: str
    checkpoints: tuple[AveragedCheckpoint, ...]
    tensors: int
    parameters: int
    taken_from_last: tuple[str, ...]
    """Tensors that are no floating-point numbers, and hence have no average."""


def weights_of(kind: str, count: int) -> NDArray[np.float64]:
    """Weights of `count` checkpoints, oldest first, summing to 1.

    Args:
        kind: `mean`: equal. `wma`: 1, 2, ..., count over their sum. `ema:A`: start with the oldest, then for each newer
            one `average = A * newer + (1 - A) * average`; A = 1 keeps the newest alone.
        count: Number of checkpoints, at least 1.

    Raises:
        ConfigError: an unknown kind, or A outside (0, 1].
    """
    ema = _EMA.fullmatch(kind)
    if kind == "mean":
        raw = np.ones(count)
    elif kind == "wma":
        raw = np.arange(1, count + 1, dtype=np.float64)
    elif ema and ema[1].count(".") <= 1 and 0.0 < float(ema[1]) <= 1.0:
        alpha = float(ema[1])
        raw = alpha * (1.0 - alpha) ** np.arange(count - 1, -1, -1, dtype=np.float64)
        raw[0] /= alpha
    else:
        raise ConfigError(f"--weights {kind!r} is unknown; use mean, wma, or ema:A with 0 < A <= 1, such as ema:0.2")
    return np.asarray(raw / raw.sum(), dtype=np.float64)


def choose_checkpoints(directory: Path, last: int | None, iterations: Sequence[int] | None) -> list[Checkpoint]:
    """The last `last` checkpoints of a save directory, or those of `iterations`; oldest first.

    Raises:
        ConfigError: fewer are there than asked for, or one of the iterations is not.
    """
    found = {checkpoint.iteration: checkpoint for checkpoint in find_checkpoints(directory)}
    present = f"{directory} holds iterations {', '.join(map(str, found))}"
    if iterations is not None:
        missing = [iteration for iteration in iterations if iteration not in found]
        if missing or len(set(iterations)) < len(iterations):
            asked = " ".join(map(str, iterations))
            raise ConfigError(f"--iterations {asked}: {present}; name each of these at most once")
        return [found[iteration] for iteration in sorted(iterations)]
    count = len(found) if last is None else last
    if not 0 < count <= len(found):
        raise ConfigError(f"--last {count}: {present}; ask for 1 to {len(found)}")
    return list(found.values())[-count:]


def average_checkpoints(checkpoints: Sequence[Checkpoint], kind: str, output: Path) -> AverageManifest:
    """Average checkpoints of one run and write the result as a save directory of its own.

    Sums are taken in float32 and rounded once to the stored dtype. Memory: one model in the stored dtype, and two
    groups of tensors.

    Args:
        checkpoints: Oldest first.
        kind: See `weights_of`.
        output: Save directory of the result; `--load OUTPUT` finds it.

    Raises:
        ConfigError: the checkpoints are of different models or runs, or the output exists.
    """
    weights = weights_of(kind, len(checkpoints))
    last = checkpoints[-1]
    folder = iteration_folder(output, last.iteration)
    if folder.exists():
        raise ConfigError(f"--output {output}: {folder.name} exists; remove it or name another directory")
    _check_same_model(checkpoints)
    _check_same_run(checkpoints)
    averaged: dict[str, torch.Tensor] = {}
    for names in grouped_by_size(last.tensors, _GROUP_BYTES):
        averaged.update(_average_group(checkpoints, weights, names))
    manifest = _describe(checkpoints, weights, kind)
    files = {MANIFEST_NAME: (json.dumps(asdict(manifest), indent=2) + "\n").encode()}
    legacy = last.folder / LEGACY_COMMON_STATE
    if legacy.is_file():
        files[LEGACY_COMMON_STATE] = legacy.read_bytes()
    write_checkpoint(folder, averaged, last.load_objects(), files)
    tracker = output / f"{TRACKER_NAME}.tmp"
    tracker.write_text(str(last.iteration))
    tracker.replace(output / TRACKER_NAME)
    return manifest


def _average_group(
    checkpoints: Sequence[Checkpoint], weights: NDArray[np.float64], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    shapes = checkpoints[-1].tensors
    sums = {name: torch.zeros(shapes[name][0]) for name in names if shapes[name][1].is_floating_point}
    result: dict[str, torch.Tensor] = {}
    for checkpoint, weight in zip(checkpoints, weights.tolist(), strict=True):
        for name, tensor in checkpoint.load_tensors(names).items():
            if name in sums:
                sums[name].add_(tensor.to(torch.float32), alpha=weight)
            else:
                result[name] = tensor
    return {**result, **{name: total.to(shapes[name][1]) for name, total in sums.items()}}


def _check_same_model(checkpoints: Sequence[Checkpoint]) -> None:
    last = checkpoints[-1]
    if not last.tensors:
        raise ConfigError(f"{last.folder}: holds no weights of a model")
    for other in checkpoints[:-1]:
        difference = _first_difference(other.tensors, last.tensors)
        if difference is not None:
            raise ConfigError(
                f"{other.folder} and {last.folder} are of different models: {difference}; "
                "average checkpoints of one run"
            )


def _first_difference(
    one: Mapping[str, tuple[tuple[int, ...], torch.dtype]], other: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> str | None:
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name, 'missing')} there and {other.get(name, 'missing')} here"
    return None


def _check_same_run(checkpoints: Sequence[Checkpoint]) -> None:
    """The seed is the same, samples go on, and the later run would have consumed what the earlier one did."""
    for earlier, later in pairwise(checkpoints):
        before, after = earlier.arguments, later.arguments
        pair = f"{earlier.folder} and {later.folder} are of different runs"
        if before.seed != after.seed:
            raise ConfigError(f"{pair}: --seed {before.seed} and {after.seed}; average checkpoints of one run")
        if before.consumed_train_samples >= after.consumed_train_samples:
            raise ConfigError(
                f"{pair}: after {before.consumed_train_samples} and {after.consumed_train_samples} samples, which does "
                "not grow with the iteration; average checkpoints of one run"
            )
        records = getattr(before, _PLAN_RECORD, None), getattr(after, _PLAN_RECORD, None)
        if records[0] is None and records[1] is None:
            continue
        if records[0] is None or records[1] is None:
            raise ConfigError(f"{pair}: only one of them was trained with a plan; average checkpoints of one run")
        try:
            check_resume(records[0], records[1], before.consumed_train_samples)
        except ResumeError as error:
            raise ConfigError(f"{pair}: their data plans differ ({error})") from error


def _describe(checkpoints: Sequence[Checkpoint], weights: NDArray[np.float64], kind: str) -> AverageManifest:
    tensors = checkpoints[-1].tensors
    return AverageManifest(
        format=_FORMAT,
        weights=kind,
        checkpoints=tuple(
            AveragedCheckpoint(checkpoint.iteration, weight, int(checkpoint.arguments.consumed_train_samples))
            for checkpoint, weight in zip(checkpoints, weights.tolist(), strict=True)
        ),
        tensors=len(tensors),
        parameters=sum(torch.Size(shape).numel() for shape, dtype in tensors.values() if dtype.is_floating_point),
        taken_from_last=tuple(name for name, (_, dtype) in tensors.items() if not dtype.is_floating_point),
    )
