"""Held-out losses of checkpoints as tables for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Column, Table

from megatron_kaiyuan.data import NUM_BANDS, Plan, band_name

if TYPE_CHECKING:  # it imports Megatron
    from megatron_kaiyuan.training.evaluation import CheckpointLoss, SourceLoss

__all__ = ["band_table", "source_table"]


def source_table(results: Sequence["CheckpointLoss"], plan: Plan) -> Table:
    """One row a checkpoint, one column a source."""
    columns = [f"{name}\nnats/token (bits/byte)" for name in plan.validation]
    table = Table(Column("weights", overflow="fold"), *columns, title="Held-out loss")
    for result in results:
        table.add_row(result.label, *(_cell(loss) for loss in result.sources.values()))
    return table


def band_table(results: Sequence["CheckpointLoss"], plan: Plan) -> Table | None:
    """Nats a token by quantile band, lowest scores first; None where no held-out source has scores."""
    scored = [name for name in plan.validation if plan.sources[name].score is not None]
    if not scored:
        return None
    bands = [band_name(number).replace("%", "") for number in range(NUM_BANDS)]
    table = Table("step", "source", *bands, title="Held-out loss by quantile band of the score, %; - is no document")
    for result in results:
        for name in scored:
            cells = ["-" if loss is None else f"{loss:.3f}" for loss in result.sources[name].bands]
            table.add_row(str(result.iteration), name, *cells)
    return table


def _cell(loss: "SourceLoss") -> str:
    bits = loss.bits_per_byte
    return f"{loss.loss:.4f}" + ("" if bits is None else f" ({bits:.4f})")
