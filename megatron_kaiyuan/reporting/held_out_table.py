"""Held-out losses of checkpoints as tables for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from megatron_kaiyuan.data import NUM_BANDS, Plan, band_name

if TYPE_CHECKING:  # it imports Megatron
    from megatron_kaiyuan.evaluation.held_out import CheckpointLoss, SourceLoss

__all__ = ["band_tables", "source_table"]


def source_table(results: Sequence["CheckpointLoss"], plan: Plan) -> Table:
    """One row a checkpoint, one column a source."""
    columns = [f"{name}\nnats/token (bits/byte)" for name in plan.validation]
    table = Table(Column("weights", overflow="fold"), *columns, title="Held-out loss")
    for result in results:
        table.add_row(result.label, *(_cell(loss) for loss in result.sources.values()))
    return table


def band_tables(results: Sequence["CheckpointLoss"], plan: Plan) -> list[Table]:
    """One table a checkpoint: nats a token by quantile band, lowest scores first; none where no source has scores.

    Ten losses and the name of a source fill 80 columns; that of the weights stands above them.
    """
    scored = [name for name in plan.validation if plan.sources[name].score is not None]
    bands = [band_name(number).replace("%", "") for number in range(NUM_BANDS)]
    tables = []
    for result in results if scored else []:
        table = Table(
            Column("source", overflow="fold"),
            *(Column(band, no_wrap=True, justify="right") for band in bands),
            title=f"{result.label}\nheld-out loss by quantile band of the score, %; - is no document",
            box=SIMPLE_HEAD,
            padding=0,
            collapse_padding=True,
            pad_edge=False,
        )
        for name in scored:
            table.add_row(name, *("-" if loss is None else f"{loss:.3f}" for loss in result.sources[name].bands))
        tables.append(table)
    return tables


def _cell(loss: "SourceLoss") -> str:
    bits = loss.bits_per_byte
    return f"{loss.loss:.4f}" + ("" if bits is None else f" ({bits:.4f})")
