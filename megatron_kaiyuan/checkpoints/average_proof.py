"""Whether an average was made of the checkpoints of one run: a seed, a model and a plan may be those of two runs."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megatron_kaiyuan.checkpoints.averaging import MANIFEST_NAME, add_weighted, check_one_run, weights_of
from megatron_kaiyuan.checkpoints.identity import PLAN_RECORD, first_difference
from megatron_kaiyuan.checkpoints.lineage import STARTS
from megatron_kaiyuan.checkpoints.reading import Checkpoint, find_checkpoints
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.files import read_regular

__all__ = ["check_average_of_run", "read_manifest"]

_SMALL = 1 << 16
"""Values of a tensor that is averaged again to compare it."""


class _Member(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    iteration: int
    weight: float
    consumed_samples: int


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str
    weights: str
    checkpoints: list[_Member] = Field(min_length=1)
    tensors: int
    parameters: int
    taken_from_last: list[str]


def read_manifest(average: Checkpoint) -> dict[str, Any] | None:
    """Return what a checkpoint says of the average that it is, None where it is none.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        content = read_regular(average.folder / MANIFEST_NAME)
    except FileNotFoundError:
        return None
    try:
        return _Manifest.model_validate_json(content).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"its {MANIFEST_NAME} is damaged ({place}: {first['msg']}); average again") from error


def check_average_of_run(average: Checkpoint, last: Checkpoint) -> None:
    """Refuse a checkpoint that is no average of the checkpoints of a run.

    Its starts and its order of samples must be those of the run. Where an earlier version recorded no starts, its
    small tensors must be the average of the members', which then have to be there.

    Args:
        average: Opened.
        last: Checkpoint of the run, at the last member of the average or later.

    Raises:
        ConfigError: says what differs, or that nothing proves it.
    """
    manifest = read_manifest(average)
    if manifest is None:
        raise ConfigError(f"it has no {MANIFEST_NAME}, so it is no average; make one with {tool('average')}")
    if average.iteration > last.iteration:
        raise ConfigError(f"it ends at iteration {average.iteration}, the run is released at {last.iteration}")
    if average.iteration < last.iteration:
        check_one_run([average, last])
    elif told := _first_difference(average, last):
        raise ConfigError(f"it is of another run: {told}")
    if getattr(average.arguments, STARTS, None) is None or getattr(last.arguments, STARTS, None) is None:
        _check_by_members(average, last, manifest)


def _first_difference(average: Checkpoint, last: Checkpoint) -> str | None:
    """Of two checkpoints after the same iteration."""
    before, after = average.arguments, last.arguments
    if average.tensors != last.tensors:
        return "its weights have other names, shapes or dtypes"
    if (told := first_difference(before, after)) is not None:
        return told
    if getattr(before, PLAN_RECORD, None) != getattr(after, PLAN_RECORD, None):
        return "its data plan differs"
    known = [starts for saved in (before, after) if (starts := getattr(saved, STARTS, None)) is not None]
    return "its starts have other names" if any(one != other for one, other in pairwise(known)) else None


def _check_by_members(average: Checkpoint, last: Checkpoint, manifest: dict[str, Any]) -> None:
    """Average the small tensors again."""
    try:
        members = find_checkpoints(last.folder.parent, [part["iteration"] for part in manifest["checkpoints"]])
    except ConfigError as error:
        raise ConfigError(
            f"it records no starts, and what it averages is not there to be compared ({error})"
        ) from error
    small = [name for name, (shape, _) in last.tensors.items() if torch.Size(shape).numel() <= _SMALL]
    again = _Average(small, members, weights_of(manifest["weights"], len(members)).tolist())
    theirs = average.load_tensors(small)
    for name, tensor in again.tensors().items():
        if not torch.equal(theirs[name], tensor):
            raise ConfigError(f"{name} is not the average of the run's checkpoints")


@dataclass(frozen=True, slots=True)
class _Average:
    names: list[str]
    members: list[Checkpoint]
    weights: list[float]

    def tensors(self) -> dict[str, Tensor]:
        """Sums in FP32, as the average was made."""
        parts = [member.load_tensors(self.names) for member in self.members]
        return {name: self._tensor([part[name] for part in parts]) for name in self.names}

    def _tensor(self, parts: list[Tensor]) -> Tensor:
        if not parts[-1].is_floating_point():
            return parts[-1]
        total = torch.zeros_like(parts[-1], dtype=torch.float32)
        for part, weight in zip(parts, self.weights, strict=True):
            add_weighted(total, part, weight)
        return total.to(parts[-1].dtype)
