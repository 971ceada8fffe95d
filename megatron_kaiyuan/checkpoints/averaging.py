"""Average the weights of several checkpoints of one run into one that loads like any other.

With a constant or moderately decaying learning rate the last weights still carry the noise of single steps; their
average does not, and the best data of a curriculum, which comes last, keeps its full rate (arXiv 2511.18903). Only
weights are averaged. The optimizer's state is left out: it belongs to one point, so the result is for evaluation,
conversion, and a new start with `--finetune` (or `--no-load-optim`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_kaiyuan.checkpoints.damage import LEGACY_COMMON_STATE, Verifier, verify
from megatron_kaiyuan.checkpoints.identity import AVERAGING, PLAN_RECORD, first_difference
from megatron_kaiyuan.checkpoints.lineage import comes_from
from megatron_kaiyuan.checkpoints.parts import LazyTensor, read_rows, row_groups, write_parts
from megatron_kaiyuan.checkpoints.reading import (
    TRACKER_NAME,
    Checkpoint,
    find_checkpoints,
    iteration_folder,
    new_checkpoint_folder,
    output_conflict,
    read_tracker,
    saved_iterations,
)
from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
from megatron_kaiyuan.data.learning_rate import averaging_weights
from megatron_kaiyuan.data.resume import check_resume
from megatron_kaiyuan.errors import ConfigError, ResumeError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.terminal import counted

__all__ = [
    "MANIFEST_NAME",
    "AverageManifest",
    "add_weighted",
    "average_checkpoints",
    "check_one_run",
    "choose_checkpoints",
    "choose_planned",
    "choose_so_far",
    "complete_average",
    "is_average",
    "weights_of",
]

MANIFEST_NAME = "average.json"
"""File in the folder of the result that says what was averaged."""
_FORMAT = "megatron_kaiyuan.average/1"


@dataclass(frozen=True, slots=True)
class AveragedCheckpoint:
    """One part of an average."""

    iteration: int
    weight: float
    consumed_samples: int


@dataclass(frozen=True, slots=True)
class AverageManifest:
    """What was averaged, stored beside the result as JSON."""

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
            one `average = A * newer + (1 - A) * average`; A = 1 keeps the newest alone. `decay:linear`, `decay:cosine`,
            `decay:sqrt`: as if the rate had decayed to 0 between the oldest and the newest.
        count: Number of checkpoints, at least 1.

    Raises:
        ConfigError: an unknown kind, or A outside (0, 1].
    """
    try:
        return averaging_weights(kind, count)
    except ValueError as error:
        raise ConfigError(
            f"--weights {kind!r} is unknown; use mean, wma, ema:A with 0 < A <= 1, such as ema:0.2, or decay:linear, "
            "decay:cosine, decay:sqrt"
        ) from error


def choose_checkpoints(
    directory: Path, last: int | None, iterations: Sequence[int] | None, verifier: Verifier = verify
) -> list[Checkpoint]:
    """Return the last `last` checkpoints of a save directory, or those of `iterations`, oldest first.

    Folders that are not chosen may be unfinished. The last ones are counted back from the one that the tracker names:
    newer ones are left of an attempt that the run gave up when it resumed from an older checkpoint.

    Raises:
        ConfigError: fewer are there than asked for, one of the iterations is not, or one that is chosen is damaged.
    """
    found = saved_iterations(directory)
    present = f"{directory} holds iterations {', '.join(map(str, found))}"
    if not found:
        find_checkpoints(directory)
    if iterations is not None:
        if set(iterations) - set(found) or len(set(iterations)) < len(iterations):
            asked = " ".join(map(str, iterations))
            raise ConfigError(f"--iterations {asked}: {present}; name each of these at most once")
        return _intact(directory, iterations, verifier)
    newest = read_tracker(directory).iteration
    current = [number for number in found if newest is None or number <= newest]
    count = len(current) if last is None else last
    if not 0 < count <= len(current):
        given_up = f", of which those after {newest} are of an attempt given up" if current != found else ""
        raise ConfigError(f"--last {count}: {present}{given_up}; ask for 1 to {len(current)}, or name --iterations")
    return _intact(directory, current[-count:], verifier)


def _intact(directory: Path, iterations: Sequence[int], verifier: Verifier) -> list[Checkpoint]:
    chosen = find_checkpoints(directory, iterations)
    for checkpoint in chosen:
        found = verifier(checkpoint.folder)
        if found.damage is not None:
            raise ConfigError(f"{checkpoint.folder} {found}; remove the folder, or name --iterations without it")
    return chosen


def choose_planned(directory: Path, verifier: Verifier = verify) -> tuple[list[Checkpoint], str]:
    """Return the checkpoints that the plan of a run wants averaged, and their weighting.

    Its newest checkpoint holds that part of the plan.

    Raises:
        ConfigError: the plan had no averaging section, or some of them are not there.
    """
    newest = open_intact_checkpoint(directory, verifier)
    planned = getattr(newest.arguments, AVERAGING, None)
    if planned is None:
        raise ConfigError(
            f"{directory}: the plan of its run has no averaging section (or it was run without a plan); give --last N "
            "or --iterations"
        )
    chosen = choose_so_far(directory, planned["iterations"], newest.iteration, whole=True, verifier=verifier)
    return chosen, str(planned["weights"])


def choose_so_far(
    directory: Path, planned: Sequence[int], iteration: int, *, whole: bool = False, verifier: Verifier = verify
) -> list[Checkpoint]:
    """Return the planned checkpoints that the run has saved when it is at `iteration`, oldest first.

    Newer folders are left of an attempt that the run gave up.

    Args:
        directory: Save directory of the run.
        planned: Iterations, ascending.
        iteration: The newest one of the run.
        whole: All of them must be saved.
        verifier: Looks at each.

    Raises:
        ConfigError: one is not there, is damaged, or is of another attempt or model.
    """
    found = saved_iterations(directory)
    wanted = [number for number in planned if whole or number <= iteration]
    missing = [number for number in wanted if number not in found or number > iteration]
    if missing:
        lost = [number for number in missing if number <= iteration]
        remedy = _instead(planned, lost, found, iteration) if lost else "finish it, or give --last N"
        raise ConfigError(
            f"{directory}: the plan averages iterations {', '.join(map(str, planned))}, of which "
            f"{', '.join(map(str, missing))} are not there, the run being at {iteration}: {remedy}"
        )
    chosen = _intact(directory, wanted, verifier)
    check_one_run(chosen)
    return chosen


def _instead(planned: Sequence[int], lost: Sequence[int], found: Sequence[int], iteration: int) -> str:
    """What to do where the run has gone past planned checkpoints that it did not save, or that were deleted."""
    left = [number for number in planned if number in found and number <= iteration]
    those = f"--iterations {' '.join(map(str, left))}" if len(left) > 1 else "--last N"
    amend = "" if iteration >= planned[-1] else ", or lower last or every of averaging in the plan and resume"
    return (
        f"{', '.join(map(str, lost))} will not be saved any more; average others with {tool('average')} {those}{amend}"
    )


def average_checkpoints(
    checkpoints: Sequence[Checkpoint],
    kind: str,
    output: Path,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> AverageManifest:
    """Average checkpoints of one run and write the result as a save directory of its own.

    Sums are taken in float32 and rounded once to the stored dtype. Memory: about three times the largest piece of a
    tensor in float32, where a piece is what the last checkpoint stores in one place, such as a layer; never the model.

    Args:
        checkpoints: Oldest first.
        kind: See `weights_of`.
        output: Save directory of the result, for `--load`. It may hold other averages, and no run.
        progress: Called with the bytes that were read of one checkpoint; in all, the `num_bytes` of each.

    Raises:
        ConfigError: the checkpoints are of different models or runs, or the output exists or is that of a run.
    """
    weights = weights_of(kind, len(checkpoints))
    last = checkpoints[-1]
    folder = iteration_folder(output, last.iteration)
    conflict = output_conflict(output, last.iteration, like=MANIFEST_NAME)
    if conflict is not None:
        raise ConfigError(f"--output {output}: {conflict}")
    check_one_run(checkpoints)
    averaged = {name: _averaged(checkpoints, weights, name, progress) for name in last.tensors}
    manifest = _describe(checkpoints, weights, kind)
    files = {MANIFEST_NAME: (json.dumps(asdict(manifest), indent=2) + "\n").encode()}
    legacy = last.folder / LEGACY_COMMON_STATE
    if legacy.is_file():
        files[LEGACY_COMMON_STATE] = legacy.read_bytes()
    with new_checkpoint_folder(folder, files) as unfinished:
        write_parts(unfinished, averaged, last.load_objects())
    write_text_atomically(output / TRACKER_NAME, str(last.iteration))
    return manifest


def complete_average(checkpoints: Sequence[Checkpoint], kind: str, output: Path) -> None:
    """`average_checkpoints`, unless that has been done: a run may have been cut off after it.

    Raises:
        ConfigError: as there; an average that is there and is not this one is left alone.
    """
    last = checkpoints[-1]
    if is_average(output, [checkpoint.iteration for checkpoint in checkpoints], kind, last.folder):
        write_text_atomically(output / TRACKER_NAME, str(last.iteration))  # the cut may have come just before it
    else:
        average_checkpoints(checkpoints, kind, output)


def is_average(output: Path, iterations: Sequence[int], kind: str, last: Path) -> bool:
    """Whether a directory holds this average, whole.

    Args:
        output: Save directory of the average.
        iterations: What it averages, ascending.
        kind: See `weights_of`.
        last: Folder of the last of them: an average older than this is one of an earlier run at the same place.
    """
    folder = iteration_folder(output, iterations[-1])
    if not (folder / MANIFEST_NAME).is_file() or verify(folder).damage is not None:
        return False
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        averaged, weights = [part["iteration"] for part in manifest["checkpoints"]], manifest["weights"]
    except (ValueError, LookupError, TypeError):  # damaged, and too old to have a checksum
        return False
    is_this = averaged == list(iterations) and weights == kind
    made, saved = (path / "metadata.json" for path in (folder, last))
    return is_this and (not saved.is_file() or made.stat().st_mtime >= saved.stat().st_mtime)


def _averaged(
    checkpoints: Sequence[Checkpoint], weights: NDArray[np.float64], name: str, progress: Callable[[int], None]
) -> LazyTensor:
    """A tensor in the pieces it is stored in: a layer of a stack, a part of a tensor-parallel rank."""
    shape, dtype = checkpoints[-1].tensors[name]
    pieces = row_groups(checkpoints[-1], name)
    if len({end - first for first, end in pieces}) > 1 or pieces[-1][1] != shape[0]:
        pieces = [(0, shape[0])]
    return LazyTensor(
        shape,
        dtype,
        [partial(_average_rows, checkpoints, weights, name, first, end, progress) for first, end in pieces],
    )


def _average_rows(
    checkpoints: Sequence[Checkpoint],
    weights: NDArray[np.float64],
    name: str,
    first: int,
    end: int,
    progress: Callable[[int], None],
) -> torch.Tensor:
    shape, dtype = checkpoints[-1].tensors[name]
    if not dtype.is_floating_point:
        rows = read_rows(checkpoints[-1], name, first, end)
        progress(rows.nbytes * len(checkpoints))  # those of the others are not needed
        return rows
    total = torch.zeros((end - first, *shape[1:]))
    for checkpoint, weight in zip(checkpoints, weights.tolist(), strict=True):
        rows = read_rows(checkpoint, name, first, end)
        add_weighted(total, rows, weight)
        progress(rows.nbytes)
    return total.to(dtype)


def add_weighted(total: torch.Tensor, part: torch.Tensor, weight: float) -> None:
    """Add the share of one checkpoint to an average, in place.

    Args:
        total: FP32 on the CPU.
        part: Of the same shape, any floating-point type and device.
        weight: From `weights_of`.
    """
    total.add_(part.to("cpu", torch.float32), alpha=weight)


def check_one_run(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse to average checkpoints of which one was not trained on from the other.

    Args:
        checkpoints: Oldest first.

    Raises:
        ConfigError: they are of different models, runs, or attempts of a run.
    """
    _check_same_model(checkpoints)
    _check_same_run(checkpoints)


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
        difference = first_difference(before, after)
        if difference is not None:
            raise ConfigError(f"{pair}: {difference}; average checkpoints of one run")
        if not comes_from(after, before, earlier.iteration):
            raise ConfigError(
                f"{later.folder} was not trained on from {earlier.folder}: one of them is left of an attempt that the "
                "run gave up when it resumed from an older checkpoint; name --iterations of one attempt"
            )
        if before.consumed_train_samples >= after.consumed_train_samples:
            raise ConfigError(
                f"{pair}: after {before.consumed_train_samples} and "
                f"{counted(after.consumed_train_samples, 'sample')}, which does not grow; average those of one run"
            )
        records = getattr(before, PLAN_RECORD, None), getattr(after, PLAN_RECORD, None)
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
