"""Entry point: `python -m megatron_kaiyuan.pretrain --plan PLAN <Megatron flags>`, alone or under torchrun."""

import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_kaiyuan.host.endings import end_helpers, end_process, record_reason
from megatron_kaiyuan.host.parent_death import die_with_launcher
from megatron_kaiyuan.host.quiet import lose_lines
from megatron_kaiyuan.host.stop_signals import end_at_interrupt

# Nothing above imports torch. That takes seconds, in which Ctrl-C would end in a traceback.

__all__ = ["main"]


def main() -> None:
    """Train as the command line says, and end the process.

    Its exit code is 0 when the run is done, or was asked to stop and has saved; 1 after a mistake or a fault, explained
    on stderr; Megatron's own where it ends the run.
    """
    lose_lines()
    end_at_interrupt()
    die_with_launcher()
    if code := _train_and_report():
        end_process(code, _release_folder, _close_events, _fail_wandb)
    _close_events()
    _release_folder()
    end_helpers()


def _train_and_report() -> int:
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_kaiyuan.host.rank_failures import failure_of

    store = _stand_alone_unless_launched()  # noqa: F841 - held until the run ends
    try:
        return _train(_start())
    except (Exception, CheckpointException) as error:
        failure = failure_of(error)
        if failure.is_told_here:
            print(failure.text, file=sys.stderr, flush=True)
        record_reason(failure.text, is_consequence=failure.is_consequence)
        return 1


def _start() -> Callable[[], None]:
    """Choose the device, and return what trains.

    The first line of the log says which device it is.
    """
    from megatron_kaiyuan.host import cpu_platform
    from megatron_kaiyuan.host.devices import start_device
    from megatron_kaiyuan.host.quiet import quiet_megatron_import

    said = start_device()
    if os.environ["RANK"] == "0":
        print(f"> {said}", flush=True)
    if cpu_platform.is_installed():
        cpu_platform.keep_freed_memory()
    with quiet_megatron_import():
        # Not before: importing Megatron reads what the CPU platform replaces.
        from megatron_kaiyuan.training.launch import run_pretraining

    return run_pretraining


def _train(run_pretraining: Callable[[], None]) -> int:
    """Run to the end, or to where Megatron leaves by `sys.exit`: with 0 where the run was asked to stop."""
    try:
        run_pretraining()
    except SystemExit as left:
        if left.code:
            return left.code if isinstance(left.code, int) else 1
    _leave_together()
    return 0


def _close_events() -> None:
    """Write what TensorBoard still holds in memory."""
    if (megatron := _megatron_state()) and (writer := megatron.get_tensorboard_writer()):
        writer.close()


def _fail_wandb() -> None:
    """Send what wandb still holds, and that the run has failed.

    A run that ends well closes it by itself.
    """
    if (megatron := _megatron_state()) and (wandb := megatron.get_wandb_writer()):
        wandb.finish(exit_code=1)


def _megatron_state() -> Any:
    """Return Megatron's module of global variables.

    None in a process that ends before it has imported Megatron.
    """
    return sys.modules.get("megatron.training.global_vars")


def _release_folder() -> None:
    """Let the next run have the save folder."""
    from megatron_kaiyuan.checkpoints.hold import release_holds

    release_holds()


def _leave_together() -> None:
    """Close the process group on all ranks at once.

    Megatron leaves that to the interpreter, which may unload a group whose threads still run: torch then aborts a run
    that was done, or a rank fails because rank 0, which hosts the store, has left before it.
    """
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _stand_alone_unless_launched() -> object:
    """Without a launcher, be the only process of a group of one, as torchrun would set it up.

    Returns:
        The store of the group, which listens as long as somebody holds it, so that no other run can take its port.
    """
    if "RANK" in os.environ:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", TORCHELASTIC_RESTART_COUNT="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
    return store


if __name__ == "__main__":
    main()
