"""Held-out losses of checkpoints and their scores on tasks, as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from megatron_kaiyuan.data import NUM_BANDS, Plan, band_name

if TYPE_CHECKING:  # it imports Megatron
    from megatron_kaiyuan.evaluation.held_out import CheckpointLoss, SourceLoss

__all__ = ["band_tables", "source_table", "task_tables"]


def source_table(results: Sequence["CheckpointLoss"], plan: Plan) -> Table:
    """One row a checkpoint, one column a source."""
    columns = [f"{name}\nnats/token (bits/byte)" for name in plan.validation]
    table = Table(Column("weights", overflow="fold"), *columns, title="Held-out loss")
    for result in results:
        table.add_row(result.label, *(_cell(loss) for loss in result.sources.values()))
    return table


def band_tables(results: Sequence["CheckpointLoss"], plan: Plan) -> list[Table]:
    """Return one table for each checkpoint: nats a token by quantile band, lowest scores first.

    No table where no source has scores. Ten losses and the name of a source fill 80 columns; that of the weights stands
    above them.
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


def task_tables(results: Sequence["CheckpointLoss"]) -> list[Table]:
    """Return one table a checkpoint: mean and standard error of each score of each task.

    None without tasks.
    """
    tables = []
    for result in results:
        rows = result.more.get("tasks", {})
        names = list(dict.fromkeys(name for row in rows.values() for name in row["scores"]))
        if not rows:
            continue
        columns = [Column(name.replace("_", " "), justify="right") for name in ("items", "shots", *names)]
        table = Table(Column("task", overflow="fold"), *columns, title=f"{result.label}\ntasks, +- standard error")
        for task, row in rows.items():
            shots = "-" if row["num_fewshot"] is None else str(row["num_fewshot"])
            table.add_row(task, f"{row['items']:,}", shots, *(_score(row, name) for name in names))
        tables.append(table)
    return tables


def _score(row: Mapping[str, Any], name: str) -> str:
    if name not in row["scores"]:
        return "-"
    error = row["standard_errors"][name]
    return f"{row['scores'][name]:.3f}" + ("" if error is None else f" +- {error:.3f}")


def _cell(loss: "SourceLoss") -> str:
    bits = loss.bits_per_byte
    return f"{loss.loss:.4f}" + ("" if bits is None else f" ({bits:.4f})")
