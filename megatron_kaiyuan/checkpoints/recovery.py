"""Which checkpoint a run starts from, and whether it may write where it is told to; decided before anything is built.

A process that is killed while it saves leaves a folder without its last files, and one that is killed while Megatron
writes the tracker leaves an empty tracker, on which Megatron exits with code 0. Rank 0 looks, cheaply: it reads the
metadata and the sizes of the files, no tensor. The other ranks do as it says.
"""

import argparse
import json
import os
import pickle
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from megatron_kaiyuan.checkpoints.reading import (
    TRACKER_NAME,
    Checkpoint,
    iteration_folder,
    open_checkpoint,
    saved_iterations,
)
from megatron_kaiyuan.errors import ConfigError, ResumeError
from megatron_kaiyuan.host.atomic import write_text_atomically

__all__ = ["Start", "agree_on_start", "check_save_directory", "choose_start", "damage", "open_intact_checkpoint"]

_WAIT = timedelta(minutes=10)
_UNREADABLE = (OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, LookupError, ImportError)
_stores: list[Store] = []
"""Kept open: rank 0 may host the store that the process group uses afterwards."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts."""

    step: int | None = None
    """Iteration to load in place of the tracker's; None: as Megatron would."""
    announcement: str = ""
    """What was found amiss."""
    name: str | None = None
    """Of this start, like no other; None: the ranks have not agreed on one."""


def damage(folder: Path) -> str | None:
    """Why a `torch_dist` checkpoint cannot be loaded; None if it can, as far as its metadata and file sizes tell.

    The content of a file of the right size is not looked at.
    """
    if not folder.is_dir():
        return "is missing"
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            return f"has no {name}: its save did not end"
    try:
        json.loads((folder / "metadata.json").read_text())
        stored = FileSystemReader(folder).read_metadata().storage_data
    except _UNREADABLE as error:
        return f"has unreadable metadata ({type(error).__name__}: {error})"
    needed: dict[str, int] = {}
    for part in (stored or {}).values():
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sorted(needed.items()):
        path = folder / name
        if not path.is_file():
            return f"has no {name}"
        if path.stat().st_size < size:
            return f"has only {path.stat().st_size:,} of {size:,} bytes in {name}"
    return None


def open_intact_checkpoint(path: Path) -> Checkpoint:
    """`open_checkpoint`, for tools that read the tensors.

    Raises:
        ConfigError: as there, or the checkpoint is damaged.
    """
    checkpoint = open_checkpoint(path)
    reason = damage(checkpoint.folder)
    if reason is not None:
        raise ConfigError(f"{checkpoint.folder} {reason}; restore it from a copy, or name another checkpoint")
    return checkpoint


def choose_start(directory: Path, asked: int | None) -> Start:
    """The checkpoint to load from a save directory: that of the tracker, or the newest intact one before it.

    Args:
        directory: What `--load` names.
        asked: What `--ckpt-step` names.

    Raises:
        ResumeError: the one that was asked for is damaged, or none is intact.
    """
    iterations = saved_iterations(directory)
    if asked:
        _check_asked(directory, asked, iterations)
        return Start()
    tracker = directory / TRACKER_NAME
    content = tracker.read_text().strip() if tracker.is_file() else None
    if content == "release" or (content is None and not iterations):
        return Start()
    named = int(content) if content is not None and content.isdigit() else None
    lost = [] if named is None or named in iterations else [f"{iteration_folder(directory, named)} is missing"]
    for iteration in reversed(iterations):
        if named is not None and iteration > named:
            continue
        reason = damage(iteration_folder(directory, iteration))
        if reason is None:
            return Start() if iteration == named else Start(iteration, _announce(tracker, content, lost, iteration))
        lost.append(f"{iteration_folder(directory, iteration)} {reason}")
    ended = [number for number in iterations if (iteration_folder(directory, number) / "metadata.json").is_file()]
    if content is None and (len(iterations) == 1 or not ended):  # the tracker is written right after metadata.json
        return Start(None, f"{'; '.join(lost)}, and no save ever ended: the run starts at its first sample")
    raise ResumeError(
        f"--load {directory}: no intact checkpoint: {'; '.join(lost) or f'{tracker} says {content!r}'}. Restore one "
        "from a copy; to start at the first sample, name an empty directory"
    )


def _check_asked(directory: Path, asked: int, iterations: list[int]) -> None:
    reason = damage(iteration_folder(directory, asked))
    if reason is None:
        return
    others = [number for number in iterations if number != asked]
    intact = [number for number in others if damage(iteration_folder(directory, number)) is None]
    raise ResumeError(
        f"--ckpt-step {asked}: {iteration_folder(directory, asked)} {reason}; intact are "
        f"{', '.join(map(str, intact)) or 'none'}: name one of them, or leave --ckpt-step out to continue from the "
        "newest intact one"
    )


def _announce(tracker: Path, content: str | None, lost: list[str], iteration: int) -> str:
    if content is None or not content.isdigit():
        lost = [f"{tracker} {'is missing' if content is None else f'says {content!r}'}", *lost]
    return f"{'; '.join(lost)}. FALLING BACK to the checkpoint of iteration {iteration}, the newest intact one"


def check_save_directory(save: Path, load: Path | None, *, finetune: bool) -> None:
    """Refuse to write into a directory that holds a run which this one does not continue.

    Raises:
        ResumeError: it has checkpoints, and `--load` does not name it, or `--finetune` starts anew.
    """
    folders = {number: iteration_folder(save, number) for number in saved_iterations(save)}
    iterations = [number for number, folder in folders.items() if (folder / ".metadata").is_file()]
    if not iterations and not (save / TRACKER_NAME).is_file():
        return
    held = f"--save {save} already holds a run" + (f" (its last checkpoint: {iterations[-1]})" if iterations else "")
    if load is None or load.resolve() != save.resolve():
        raise ResumeError(f"{held}: --load {save} continues it; for a new run name another directory")
    if finetune:
        raise ResumeError(
            f"{held}, which --finetune would overwrite: leave --finetune out to continue it, or name another directory"
        )


def agree_on_start(args: argparse.Namespace) -> Start:
    """What rank 0 found, on all ranks; it mends a tracker that would mislead, and says so.

    Local and other non-persistent checkpoints, and formats other than `torch_dist`, are left to Megatron.

    Args:
        args: Parsed, not yet validated; the process group need not exist.

    Raises:
        ResumeError: on every rank: see `choose_start` and `check_save_directory`.
    """
    if args.ckpt_format != "torch_dist" or args.non_persistent_ckpt_type is not None:
        return Start()
    found = json.loads(_from_rank_zero("start", lambda: json.dumps(_look(args))))
    if "error" in found:
        raise ResumeError(found["error"])
    return Start(found["step"], found["announcement"], found["name"])


def _look(args: argparse.Namespace) -> dict[str, object]:
    load = Path(args.load) if args.load else None
    try:
        if args.save:
            check_save_directory(Path(args.save), load, finetune=args.finetune)
        start = Start() if load is None else choose_start(load, args.ckpt_step)
        if start.step is not None and (args.finetune or args.load != args.save):
            raise ResumeError(f"{start.announcement}, once you ask for it: --ckpt-step {start.step}")
    except ResumeError as error:
        return {"error": str(error)}
    if start.announcement:
        print(f"\nWARNING: {start.announcement}\n", file=sys.stderr, flush=True)
    if start.step is not None and load is not None:
        write_text_atomically(load / TRACKER_NAME, str(start.step))  # Megatron stops, with code 0, at a torn one
    return {"step": start.step, "announcement": start.announcement, "name": uuid.uuid4().hex[:16]}


def _from_rank_zero(key: str, produce: Callable[[], str]) -> str:
    """The same text on all ranks, through the store that the process group will use."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return produce()
    store, rank, _ = next(rendezvous("env://", timeout=_WAIT))
    _stores.append(store)
    key = f"megatron_kaiyuan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{key}"
    if rank == 0:
        store.set(key, produce())
    return str(store.get(key).decode())
