"""Decide before anything is built which checkpoint a run starts from, and whether it may write to `--save`.

A process that is killed while it saves leaves a folder without its last files, and one that is killed while the tracker
is written may leave an empty one, on which Megatron exits with code 0. Disks and copies damage files. Rank 0 decides
which checkpoint to look at, all ranks compare their share of its files with their checksums, and all do as it says.
"""

import argparse
import json
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_kaiyuan.checkpoints.damage import DESCRIPTION_NAME, METADATA_NAME, Verifier, damage, is_legacy, verify
from megatron_kaiyuan.checkpoints.hold import hold_folder
from megatron_kaiyuan.checkpoints.reading import (
    TRACKER_NAME,
    Checkpoint,
    Tracker,
    iteration_folder,
    open_checkpoint,
    read_tracker,
    saved_iterations,
)
from megatron_kaiyuan.checkpoints.shared_look import Looker, look_together
from megatron_kaiyuan.errors import ConfigError, ResumeError
from megatron_kaiyuan.host.atomic import write_text_atomically

__all__ = [
    "Start",
    "agree_on_start",
    "check_pretrained",
    "check_save_directory",
    "choose_start",
    "open_intact_checkpoint",
]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts."""

    step: int | None = None
    """Iteration to load in place of the tracker's; None: as Megatron would."""
    announcement: str = ""
    """What is wrong."""
    name: str | None = None
    """Of this start, like no other; None: the ranks have not agreed on one."""


def open_intact_checkpoint(path: Path, verifier: Verifier = verify) -> Checkpoint:
    """`open_checkpoint`, for tools that read the tensors: every file is compared with its checksum.

    Args:
        path: An `iter_*` folder, or a save directory.
        verifier: Looks at it.

    Raises:
        ConfigError: as `open_checkpoint`, or the checkpoint is damaged.
    """
    checkpoint = open_checkpoint(path)
    found = verifier(checkpoint.folder)
    if found.damage is not None:
        raise ConfigError(f"{checkpoint.folder} {found}; restore it from a copy, or name another checkpoint")
    return checkpoint


def choose_start(
    directory: Path, asked: int | None, look: Callable[[Path], str | None] = lambda folder: verify(folder).damage
) -> Start:
    """Choose the checkpoint to load from a save directory: that of the tracker, or the newest intact one before it.

    Args:
        directory: What `--load` names.
        asked: What `--ckpt-step` names.
        look: Returns what is wrong with a checkpoint; None if it is intact.

    Raises:
        ResumeError: the one that was asked for is damaged, or none is intact.
    """
    iterations = saved_iterations(directory)
    if asked:
        _check_asked(directory, asked, iterations, look)
        return Start()
    tracker = read_tracker(directory)
    if tracker.text == "release":
        if reason := look(directory / tracker.text):
            raise ResumeError(f"--load {directory}: {directory / tracker.text} {reason}; restore it from a copy")
        return Start()
    if tracker.text is None and not iterations:
        return Start()
    named, lost = tracker.iteration, []
    if legacy := _legacy_checkpoint(directory):
        raise ResumeError(
            f"--load {directory}: {legacy} is in Megatron's legacy format; add --ckpt-format torch (with "
            "--ckpt-convert-format torch_dist --ckpt-convert-save DIR it is converted)"
        )
    candidates = [number for number in iterations if named is None or number <= named]
    if named is not None and named not in iterations:
        lost = [f"{iteration_folder(directory, named)} is missing"]
        candidates = candidates or iterations  # a tracker cut short names a step that never was
    for iteration in reversed(candidates):
        reason = look(iteration_folder(directory, iteration))
        if reason is None:
            intact = iteration == named
            return Start() if intact else Start(iteration, _announce(directory, tracker, lost, iteration))
        lost.append(f"{iteration_folder(directory, iteration)} {reason}")
    ended = [n for n in iterations if (iteration_folder(directory, n) / DESCRIPTION_NAME).is_file()]
    if tracker.text is None and (len(iterations) == 1 or not ended):  # the tracker is written right after this file
        return Start(None, f"{'; '.join(lost)}, and no save ever ended: the run starts at its first sample")
    raise ResumeError(
        f"--load {directory}: no intact checkpoint: {'; '.join(lost) or _of_tracker(directory, tracker)}. Restore one "
        "from a copy; to start at the first sample, name an empty directory"
    )


def check_pretrained(
    directory: Path, look: Callable[[Path], str | None] = lambda folder: verify(folder).damage
) -> None:
    """Refuse weights to start from that are not as they were saved.

    Nobody asked for an earlier checkpoint instead.

    Args:
        directory: What `--pretrained-checkpoint` names; one without a checkpoint is not looked at.
        look: Returns what is wrong with a checkpoint; None if it is intact.

    Raises:
        ResumeError: the checkpoint that the tracker names is damaged, or it names none.
    """
    tracker, iterations = read_tracker(directory), saved_iterations(directory)
    if tracker.text is None and not iterations:
        return
    if tracker.iteration is None and tracker.text != "release":
        reason = _of_tracker(directory, tracker)
    else:
        folder = iteration_folder(directory, tracker.iteration) if tracker.iteration else directory / "release"
        damaged = look(folder)
        if damaged is None:
            return
        reason = f"{folder} {damaged}"
    raise ResumeError(
        f"--pretrained-checkpoint {directory}: {reason}; restore it from a copy, or write the number of another "
        f"checkpoint into {TRACKER_NAME} (there are {', '.join(map(str, iterations)) or 'none'})"
    )


def _legacy_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that the tracker names, if it is in the format of `--ckpt-format torch`."""
    named = read_tracker(directory).iteration
    folder = None if named is None else iteration_folder(directory, named)
    return folder if folder is not None and is_legacy(folder) else None


def _check_asked(directory: Path, asked: int, iterations: list[int], look: Callable[[Path], str | None]) -> None:
    reason = look(iteration_folder(directory, asked))
    if reason is None:
        return
    others = [number for number in iterations if number != asked]
    sound = [number for number in others if damage(iteration_folder(directory, number)) is None]
    raise ResumeError(
        f"--ckpt-step {asked}: {iteration_folder(directory, asked)} {reason}; intact are "
        f"{', '.join(map(str, sound)) or 'none'}: name one of them, or leave --ckpt-step out to continue from the "
        "newest intact one"
    )


def _announce(directory: Path, tracker: Tracker, lost: list[str], iteration: int) -> str:
    if tracker.iteration is None:
        lost = [_of_tracker(directory, tracker), *lost]
    return f"{'; '.join(lost)}. FALLING BACK to the checkpoint of iteration {iteration}, the newest intact one"


def _of_tracker(directory: Path, tracker: Tracker) -> str:
    return f"{directory / TRACKER_NAME} {'is missing' if tracker.text is None else f'says {tracker.text!r:.60}'}"


def check_save_directory(save: Path, load: Path | None, *, finetune: bool) -> None:
    """Refuse to write into a directory that holds a run which this one does not continue.

    Raises:
        ResumeError: it has checkpoints, and `--load` does not name it, or `--finetune` starts anew.
    """
    folders = {number: iteration_folder(save, number) for number in saved_iterations(save)}
    iterations = [number for number, folder in folders.items() if (folder / METADATA_NAME).is_file()]
    if not iterations and not (save / TRACKER_NAME).is_file():
        return
    held = f"--save {save} already holds a run" + (f" (its last checkpoint: {iterations[-1]})" if iterations else "")
    if load is None or not _are_same(load, save):
        raise ResumeError(f"{held}: --load {save} continues it; for a new run name another directory")
    if finetune:
        raise ResumeError(
            f"{held}, which --finetune would overwrite: leave --finetune out to continue it, or name another directory"
        )


def _are_same(load: Path, save: Path) -> bool:
    return load.resolve() == save.resolve()


def _is_of_run(args: argparse.Namespace) -> bool:
    return bool(args.load and args.save) and _are_same(Path(args.load), Path(args.save))


def agree_on_start(args: argparse.Namespace) -> Start:
    """Let rank 0 decide where the run starts, and return it on all ranks.

    Rank 0 also holds the save folder, mends a tracker that would mislead, and says so.

    Local and other non-persistent checkpoints, and formats other than `torch_dist`, are otherwise left to Megatron.

    Args:
        args: Parsed, not yet validated; the process group need not exist.

    Raises:
        ResumeError: on every rank: see `hold_folder`, `choose_start` and `check_save_directory`.
    """
    found = json.loads(look_together(lambda look: json.dumps(_decide(args, look))))
    if "error" in found:
        raise ResumeError(found["error"])
    return Start(found["step"], found["announcement"], found["name"])


def _pretrained(args: argparse.Namespace, load: Path | None, start: Start) -> Path | None:
    """Folder of the weights that Megatron starts from: those of `--load` come first, where it has any."""
    if not args.pretrained_checkpoint or (load is not None and (start.step or (load / TRACKER_NAME).is_file())):
        return None
    folder = Path(args.pretrained_checkpoint)
    return None if args.auto_detect_ckpt_format and _legacy_checkpoint(folder) is not None else folder


def _decide(args: argparse.Namespace, look: Looker) -> dict[str, object]:
    load, looked_at = Path(args.load) if args.load else None, f"--load {args.load}"
    try:
        if args.save:
            hold_folder(Path(args.save))
        if args.ckpt_format != "torch_dist" or args.non_persistent_ckpt_type is not None:
            return {"step": None, "announcement": "", "name": None}
        if args.save:
            check_save_directory(Path(args.save), load, finetune=args.finetune)
        detected = load is not None and args.auto_detect_ckpt_format and _legacy_checkpoint(load) is not None
        start = Start() if load is None or detected else choose_start(load, args.ckpt_step, look)
        if start.step is not None and (args.finetune or not _is_of_run(args)):
            raise ResumeError(f"{start.announcement}, once you ask for it: --ckpt-step {start.step}")
        if (pretrained := _pretrained(args, load, start)) is not None:
            looked_at = f"--pretrained-checkpoint {pretrained}"
            check_pretrained(pretrained, look)
    except ResumeError as error:
        return {"error": str(error)}
    if start.announcement:
        print(f"\nWARNING: {start.announcement}\n", file=sys.stderr, flush=True)
    if look.summary:
        print(f"> {looked_at}: {look.summary}", flush=True)
    if start.step is not None and load is not None:
        write_text_atomically(load / TRACKER_NAME, str(start.step))  # Megatron stops, with code 0, at a torn one
    return {"step": start.step, "announcement": start.announcement, "name": uuid.uuid4().hex[:16]}
