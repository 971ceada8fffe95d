"""Stages that remember what they were made from, so that a second run repeats only what changed.

A stage is done when its stamp holds the hash of its present inputs and its outputs exist. The inputs of a stage
include the hash of the stage before it, so a change runs everything after it again.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Stage", "StageOutcome", "file_digest", "run_stages"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a pipeline."""

    name: str
    title: str
    """What it does, in a few words."""
    inputs: object
    """JSON-able: everything its outputs depend on beside the stages before it."""
    outputs: Sequence[Path]
    """Files and folders that it makes; removed before it runs anew."""
    run: Callable[[], None]
    continues: bool = False
    """Whether it can go on from the outputs of an interrupted run with the same inputs."""


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """How a stage went."""

    name: str
    title: str
    skipped: bool
    seconds: float
    """Wall time of the run that made the outputs, be it this one or an earlier one."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_stages(
    stages: Sequence[Stage], stamps: Path, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> list[StageOutcome]:
    """Run the stages in order, leaving out those that are done.

    Args:
        stages: Each may use the outputs of those before it.
        stamps: Folder for the stamps.
        say: Called with a line for each stage.
        clock: Seconds.
    """
    stamps.mkdir(parents=True, exist_ok=True)
    outcomes = []
    chain = ""
    for number, stage in enumerate(stages, 1):
        chain = hashlib.sha256(json.dumps([chain, stage.name, stage.inputs], sort_keys=True).encode()).hexdigest()
        head = f"[{number}/{len(stages)}] {stage.title}"
        outcome = _completed(stage, stamps, chain)
        if outcome is None:
            say(head)
            outcome = _run(stage, stamps, chain, clock)
            say(f"      done in {outcome.seconds:.1f} s")
        else:
            say(f"{head}: up to date, skipped")
        outcomes.append(outcome)
    return outcomes


def _completed(stage: Stage, stamps: Path, digest: str) -> StageOutcome | None:
    stamp = _read(stamps / f"{stage.name}.json")
    if stamp.get("inputs") != digest or not stamp.get("done") or not all(path.exists() for path in stage.outputs):
        return None
    return StageOutcome(stage.name, stage.title, True, float(str(stamp["seconds"])))


def _run(stage: Stage, stamps: Path, digest: str, clock: Callable[[], float]) -> StageOutcome:
    path = stamps / f"{stage.name}.json"
    before = _read(path)
    interrupted = before.get("inputs") == digest and not before.get("done")
    spent = 0.0
    if stage.continues and interrupted:
        spent = float(str(before.get("seconds", 0.0)))
    else:
        for output in stage.outputs:
            _remove(output)
    _write(path, {"inputs": digest, "done": False, "seconds": spent})
    started = clock()
    try:
        stage.run()
    except BaseException:
        _write(path, {"inputs": digest, "done": False, "seconds": spent + clock() - started})
        raise
    seconds = spent + clock() - started
    _write(path, {"inputs": digest, "done": True, "seconds": seconds})
    return StageOutcome(stage.name, stage.title, False, seconds)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, object]) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)
