"""Entry point: `python -m megatron_kaiyuan.pretrain --plan PLAN <Megatron flags>`, alone or under torchrun."""

import os
import sys

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_kaiyuan.errors import DeviceError, KaiyuanError, MetricsError, TrainingStopped
from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.host.devices import start_device
from megatron_kaiyuan.host.quiet import quiet_megatron_import

__all__ = ["main"]


def main() -> int:
    """Train as the command line says.

    Returns:
        0 when the run is done; 1 after a mistake in the flags, the plan or the data, explained on stderr.
    """
    store = _stand_alone_unless_launched()  # noqa: F841 - held until the run ends
    try:
        _start()
        with quiet_megatron_import():
            # Not before: importing Megatron reads what the CPU platform replaces.
            from megatron_kaiyuan.training.launch import run_pretraining

        run_pretraining()
        _leave_together()
    except KaiyuanError as error:
        if _tells(error):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _start() -> None:
    """Choose the device; the first line of the log says which."""
    said = start_device()
    if os.environ["RANK"] == "0":
        print(f"> {said}", flush=True)
    if cpu_platform.is_installed():
        cpu_platform.keep_freed_memory()


def _tells(error: KaiyuanError) -> bool:
    """Whether this process prints the error.

    What is found before the start is found by all ranks, and told once a host: files may be missing on one of them
    only. A metrics file is looked at by one rank, and once training has begun each rank reads its own samples.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, DeviceError | MetricsError):
        return True
    return torch.distributed.is_initialized() and not isinstance(error, TrainingStopped)


def _leave_together() -> None:
    """Close the process group on all ranks at once.

    Megatron leaves that to the interpreter, which may unload a group whose threads still run: torch then aborts a run
    that was done, or a rank fails because rank 0, which hosts the store, has left before it.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _stand_alone_unless_launched() -> TCPStore | None:
    """Without a launcher, be the only process of a group of one, as torchrun would set it up.

    Returns:
        The store of the group, which listens as long as somebody holds it, so that no other run can take its port.
    """
    if "RANK" in os.environ:
        return None
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", TORCHELASTIC_RESTART_COUNT="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
    return store


if __name__ == "__main__":
    sys.exit(main())
