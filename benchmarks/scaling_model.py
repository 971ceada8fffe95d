"""Time of a training step on many nodes, from what was measured on one of them: arithmetic on paper, no measurement.

On G GPUs, each of which computes m micro-batches a step, with the distributed optimizer and overlap,

    step = m t + u + max(0, R - h (2/3) t) + max(0, A - h (1/3) t)
    R    = 4 P (G - 1) / (G b) + (G - 1) B l          reduce-scatter of FP32 gradients
    A    = 2 P (G - 1) / (G b) + (G - 1) B l          all-gather of FP16 weights

with t the seconds of a micro-batch, u the seconds of a step beside them (optimizer, logging), P the parameters, b the
bytes a second of a ring (the smaller of the host's and, from two nodes on, the network's share of a GPU), B the buckets
that gradients and weights are cut into, l the seconds of one hop, and h the share of the backward and of the forward
pass of one micro-batch that collectives can hide behind. All measured values come from a file; the two of the network
must be given, because no run on one node knows them.

Not in it: stragglers, shared network switches, checkpoints, failures. The optimizer's work is shared by the ranks and
would shrink; u is taken as constant, which errs on the slow side.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_kaiyuan.errors import StudyError

__all__ = ["Measured", "Network", "Projected", "load_measured", "project"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one node says."""

    parameters: int
    micro_batch_tokens: int
    micro_batch_seconds: float
    """Forward and backward of one micro-batch on one GPU."""
    step_overhead_seconds: float
    """Of a step on one GPU, beside its micro-batches."""
    host_bytes_per_second: float
    """Of a ring over the GPUs of one host, each direction, of one GPU: what the collectives of a step moved, over
    their time."""
    gpus_per_node: int
    hidden_share: float
    """Of the passes of one micro-batch that collectives hid behind, 0 to 1."""
    flops_per_token: float


@dataclass(frozen=True, slots=True)
class Network:
    """What has to be assumed."""

    bytes_per_second: float
    """Between nodes, of one GPU."""
    hop_seconds: float
    bucket_bytes: float = 160e6
    """Megatron's buckets: 40 million FP32 elements."""


@dataclass(frozen=True, slots=True)
class Projected:
    """A step on so many nodes."""

    nodes: int
    gpus: int
    micro_batches: int
    seconds: float
    exposed_seconds: float
    """Of these, collectives that nothing hides."""
    tokens_per_second: float
    efficiency: float
    """Tokens a second and GPU, relative to one GPU alone with as many micro-batches."""
    model_flops_per_gpu: float


def project(
    measured: Measured,
    network: Network,
    nodes: Sequence[int],
    micro_batches: int,
    total_micro_batches: int | None = None,
) -> list[Projected]:
    """Steps on several numbers of nodes.

    Args:
        measured: Of one node.
        network: Assumed.
        nodes: Numbers of nodes.
        micro_batches: Of a GPU and step (weak scaling).
        total_micro_batches: Of a step, shared by all GPUs (strong scaling) in place of it.

    Raises:
        StudyError: a step cannot be shared evenly.
    """
    return [_one(measured, network, count, micro_batches, total_micro_batches) for count in nodes]


def _one(measured: Measured, network: Network, nodes: int, micro_batches: int, total: int | None) -> Projected:
    gpus = nodes * measured.gpus_per_node
    if total is not None:
        if total % gpus:
            raise StudyError(f"{total} micro-batches cannot be shared by {gpus} GPUs: give a multiple of {gpus}")
        micro_batches = total // gpus
    alone = micro_batches * measured.micro_batch_seconds + measured.step_overhead_seconds
    exposed = sum(_exposed(measured, network, nodes, gpus))
    tokens = gpus * micro_batches * measured.micro_batch_tokens
    rate = tokens / (alone + exposed)
    return Projected(
        nodes, gpus, micro_batches, alone + exposed, exposed, rate, alone / (alone + exposed),
        rate * measured.flops_per_token / gpus,
    )  # fmt: skip


def _exposed(measured: Measured, network: Network, nodes: int, gpus: int) -> tuple[float, float]:
    """Seconds of reduce-scatter and of all-gather that nothing hides."""
    speed = measured.host_bytes_per_second
    if nodes > 1:
        speed = min(speed, network.bytes_per_second)
    found = []
    for width, share in ((4, 2 / 3), (2, 1 / 3)):
        size = width * measured.parameters
        buckets = max(1.0, 4 * measured.parameters / network.bucket_bytes)
        seconds = size * (gpus - 1) / gpus / speed + (gpus - 1) * buckets * network.hop_seconds
        found.append(max(0.0, seconds - measured.hidden_share * share * measured.micro_batch_seconds))
    return found[0], found[1]


def load_measured(path: Path) -> Measured:
    """Read the file that `benchmarks/scaling.py` writes, or one by hand.

    Raises:
        StudyError: it is no such file, or a field is missing, unknown or not positive.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read: {error}; benchmarks/scaling.py writes it after its rows") from error
    names = {entry.name for entry in fields(Measured)}
    if set(told) != names:
        missing, unknown = sorted(names - set(told)), sorted(set(told) - names)
        raise StudyError(
            f"{path}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}; give all of {sorted(names)}"
        )
    if bad := [name for name, value in told.items() if not value >= 0 or (value == 0 and name != "hidden_share")]:
        raise StudyError(f"{path}: {bad[0]} is {told[bad[0]]}; measured values are above 0")
    if told["hidden_share"] > 1:
        raise StudyError(f"{path}: hidden_share is {told['hidden_share']}; it is a share, 0 to 1")
    return Measured(**told)


def as_json(measured: Measured) -> str:
    """For the file."""
    return json.dumps(asdict(measured), indent=1) + "\n"
