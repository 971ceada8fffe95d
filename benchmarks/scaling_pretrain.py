"""The project's entry point, with every sample that training asks for written down, one number a line.

`SCALING_SAMPLES` names the folder; each process has a file there. With `--num-workers 0` nothing is read ahead, so the
n-th line of a rank is the n-th sample it trained on since it was started.
"""

import os
from pathlib import Path
from typing import Any

from megatron_kaiyuan import pretrain
from megatron_kaiyuan.host.devices import start_device
from megatron_kaiyuan.host.quiet import quiet_megatron_import

__all__ = ["record_samples"]


def record_samples(folder: Path) -> None:
    """From now on, this process writes the numbers of its training samples to a file of its own in `folder`."""
    start_device()
    with quiet_megatron_import():  # importing Megatron reads what the CPU platform replaces
        from megatron_kaiyuan.training.provider import PlanSamples
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / f"rank{os.environ.get('RANK', '0')}-{os.getpid()}.txt").open("w", buffering=1)
    original = PlanSamples.__getitem__

    def recorded(self: PlanSamples, index: int) -> Any:
        stream.write(f"{int(index)}\n")
        return original(self, index)

    PlanSamples.__getitem__ = recorded


if __name__ == "__main__":
    if "SCALING_SAMPLES" in os.environ:
        record_samples(Path(os.environ["SCALING_SAMPLES"]))
    pretrain.main()
