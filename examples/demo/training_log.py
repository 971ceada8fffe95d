"""What Megatron's training log says, line by line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LogLine", "ScaleChange", "parse_line", "read_training_log", "scale_changes"]

_LINE = re.compile(
    r" iteration +(?P<iteration>\d+)/ *(?P<of>\d+) \|.*?"
    r"elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \|.*?"
    r"learning rate: (?P<lr>[\d.E+-]+) \|(?P<rest>.*)"
)
_LOSS = re.compile(r"lm loss: (?P<loss>[\d.E+-]+) \|")
_SCALE = re.compile(r"loss scale: (?P<scale>[\d.]+) \|")
_SKIPPED = re.compile(r"number of skipped iterations: +(?P<skipped>\d+) \|")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One logged step (`--log-interval 1`)."""

    iteration: int
    of: int
    milliseconds: float
    """Wall time of the step."""
    learning_rate: float
    loss: float | None
    """Nats per token; None when the step overflowed and was skipped."""
    loss_scale: float
    """After the step."""
    skipped: bool
    """Whether FP16 gradients overflowed, so that no update was made and the scale was counted down."""


@dataclass(frozen=True, slots=True)
class ScaleChange:
    """From this step on the loss scale is another one."""

    iteration: int
    scale: float
    reason: str


def parse_line(line: str) -> LogLine | None:
    """The step that a line of the log reports, None when it reports something else."""
    match = _LINE.search(line)
    if match is None:
        return None
    loss, scale, skips = (pattern.search(match["rest"]) for pattern in (_LOSS, _SCALE, _SKIPPED))
    skipped = skips is not None and int(skips["skipped"]) > 0
    return LogLine(
        iteration=int(match["iteration"]),
        of=int(match["of"]),
        milliseconds=float(match["ms"]),
        learning_rate=float(match["lr"]),
        loss=float(loss["loss"]) if loss and not skipped else None,
        loss_scale=float(scale["scale"]) if scale else 1.0,
        skipped=skipped,
    )


def read_training_log(path: Path) -> list[LogLine]:
    """Steps of a log in order. A step that a resumed run repeated counts once, as it was the last time."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        found = {parsed.iteration: parsed for line in stream if (parsed := parse_line(line)) is not None}
    return [found[iteration] for iteration in sorted(found)]


def scale_changes(lines: Sequence[LogLine]) -> list[ScaleChange]:
    """Where the dynamic loss scale starts, and each step at which it became another."""
    changes: list[ScaleChange] = []
    for line in lines:
        if not changes:
            changes.append(ScaleChange(line.iteration, line.loss_scale, "start"))
        elif line.loss_scale != changes[-1].scale:
            reason = "no overflow for a whole window" if line.loss_scale > changes[-1].scale else "gradients overflowed"
            changes.append(ScaleChange(line.iteration, line.loss_scale, reason))
    return changes
