"""The tables of tools/evaluate.py on a terminal of 80 columns."""

from io import StringIO
from types import SimpleNamespace
from typing import Any

from rich.console import Console, RenderableType

from megatron_kaiyuan.data import NUM_BANDS
from megatron_kaiyuan.reporting.held_out_table import band_tables

BANDS = tuple(10.0 + number / 8 for number in range(NUM_BANDS - 1))


def plan_of(**scores: str | None) -> Any:
    return SimpleNamespace(
        validation=dict.fromkeys(scores),
        sources={name: SimpleNamespace(score=score) for name, score in scores.items()},
    )


def loss_of(label: str, *sources: str, more: float = 0.0) -> Any:
    loss = SimpleNamespace(bands=(*(band + more for band in BANDS), None))
    return SimpleNamespace(label=label, iteration=12, sources=dict.fromkeys(sources, loss))


def printed(*tables: RenderableType) -> str:
    console = Console(file=StringIO(), width=80, color_system=None)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO


def test_a_table_of_bands_is_whole_and_says_of_which_weights_it_is() -> None:
    labels = ("runs/small/s1/iter_0000012", "runs/small/s1-averaged/iter_0000012")
    results = [loss_of(label, "code", "plain", "a_source_with_a_long_name") for label in labels]
    tables = band_tables(results, plan_of(code="q", plain=None, a_source_with_a_long_name="q"))
    assert len(tables) == len(labels)
    for label, table in zip(labels, tables, strict=True):
        text = printed(table)
        assert label in text
        assert "…" not in text
        rows = [line.split() for line in text.splitlines() if "10.000" in line]
        assert [row[-NUM_BANDS:] for row in rows] == [[*(f"{loss:.3f}" for loss in BANDS), "-"]] * 2
        assert rows[0][0] == "code"
        assert "90-100" in text


def test_each_table_has_the_losses_of_its_own_weights() -> None:
    tables = band_tables([loss_of("a", "code"), loss_of("b", "code", more=7.0)], plan_of(code="q"))
    assert ["10.000" in printed(table) for table in tables] == [True, False]
    assert ["17.000" in printed(table) for table in tables] == [False, True]


def test_without_scores_there_is_no_table_of_bands() -> None:
    assert band_tables([loss_of("x", "plain")], plan_of(plain=None)) == []
