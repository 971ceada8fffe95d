"""Where the demo runs: on the GPUs that are there, as many as its batch can be shared among, or on the CPU."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from settings import DemoSettings

from megatron_kaiyuan.errors import DeviceError
from megatron_kaiyuan.host.machine import ask_torch, has_gpu

__all__ = ["DeviceRefused", "placed"]


class DeviceRefused(RuntimeError):
    """Refusal of the device that was asked for, or of the one that is there, with the reason."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a child process, which may start CUDA, says of this machine."""

    said: str
    gpus: int


def placed(settings: DemoSettings, asked: str | None, repository: Path) -> tuple[DemoSettings, str]:
    """Return the settings for the device, and a line that says what was chosen and why.

    Args:
        settings: Those of the CPU.
        asked: `cpu`, `cuda`, or None: what KAIYUAN_DEVICE says, else the GPUs if there are any.
        repository: The checkout, whose package is asked.

    Raises:
        DeviceRefused: a GPU was asked for or is there, and cannot be used.
    """
    if asked is not None:
        os.environ["KAIYUAN_DEVICE"] = asked  # the commands that the demo starts obey it too
    # torch is asked only where it matters: to import it takes seconds.
    nothing_to_ask = not has_gpu() and os.environ.get("KAIYUAN_DEVICE", "cpu") == "cpu"
    found = _Found("device: CPU (this machine shows no GPU)", 0) if nothing_to_ask else _ask(repository)
    if not found.gpus:
        return settings, f"{found.said}: {settings.processes} processes"
    os.environ["KAIYUAN_DEVICE"] = "cuda"
    # The most processes, each with a GPU of its own, that the batch can be shared among evenly.
    processes = max(count for count in range(1, found.gpus + 1) if settings.global_batch % count == 0)
    micro_batch = min(settings.micro_batch, settings.global_batch // processes)
    chosen = replace(settings, device="cuda", processes=processes, micro_batch=micro_batch)
    several = f"{processes} processes, each with a GPU of its own" if processes > 1 else "one process"
    left = f"; the batch of {settings.global_batch} cannot be shared among more" if processes < found.gpus else ""
    return chosen, f"{found.said}: {several}{left}"


def _ask(repository: Path) -> _Found:
    path = os.pathsep.join([str(repository), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    try:
        said, gpus = ask_torch(os.environ | {"PYTHONPATH": path})
    except DeviceError as error:
        raise DeviceRefused(str(error)) from error
    return _Found(said, len(gpus))
