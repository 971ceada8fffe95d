"""Report of the held-out loss by source and quantile band after every evaluation: log, writers, a file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_kaiyuan.data import band_name
from megatron_kaiyuan.monitoring.held_out_losses import HeldOutLosses, HeldOutSums
from megatron_kaiyuan.monitoring.metrics_file import append_metrics

__all__ = ["HeldOutReport"]


@dataclass(frozen=True)
class HeldOutReport:
    """The report on one process.

    All processes call it after the same evaluations.
    """

    losses: HeldOutLosses
    path: Path | None
    """Receives one JSON line an evaluation; None: not written."""
    write_scalar: Callable[[str, float, int], None] | None
    """Name, value, step; None on the ranks that log nothing. The one rank that has it also writes the file."""
    say: Callable[[str], None]
    """Prints on that rank."""

    of: str = ""
    """Whose loss it is where it is not that of the run's own weights, such as ` of the average`."""

    def after_evaluation(self, iteration: int, consumed_samples: int, **more: object) -> None:
        """Add up the losses of all ranks and report them.

        `more` goes into the line of the file.
        """
        sums = {name: found for name, found in self.losses.take().items() if found.loss is not None}
        if self.write_scalar is None or not sums:
            return
        told = "; ".join(_told(name, found) for name, found in sums.items())
        self.say(f" held-out loss{self.of} at step {iteration} by source (by quantile band): {told}")
        for name, found in sums.items():
            self._write_source(name, found, iteration)
        if self.path is not None:
            entry = {"iteration": iteration, "consumed_samples": consumed_samples, **more}
            append_metrics(self.path, entry | {"sources": {name: _plain(found) for name, found in sums.items()}})

    def _write_source(self, name: str, found: HeldOutSums, iteration: int) -> None:
        assert self.write_scalar is not None
        if found.loss is not None:
            self.write_scalar(f"held-out loss{self.of}/{name}", found.loss, iteration)
        for number, loss in enumerate(found.bands):
            if loss is not None:
                self.write_scalar(f"held-out loss{self.of}/{name} {band_name(number)}", loss, iteration)


def _told(name: str, found: HeldOutSums) -> str:
    """`web 2.4310 (0-10% 2.62, 90-100% 2.21)`."""
    bands = [f"{band_name(number)} {loss:.3f}" for number, loss in enumerate(found.bands) if loss is not None]
    return f"{name} {found.loss:.4f}" + (f" ({', '.join(bands)})" if bands else "")


def _plain(found: HeldOutSums) -> dict[str, object]:
    return {
        "loss": found.loss,
        "tokens": sum(found.tokens),
        "bands": list(found.bands),
        "band_tokens": list(found.tokens[:-1]),
    }
