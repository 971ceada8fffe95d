"""What a source holds, as terminal tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.shards.manifest import SpecialTokenRecord, special_token_facts

__all__ = ["format_bytes", "format_number", "print_findings", "print_source", "report_console", "source_facts"]

_ROWS = 14
_BAR = 36
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def report_console() -> Console:
    """Return a console on stdout, wide enough for every table where it is not a terminal."""
    console = SafeConsole(highlight=False)
    return console if console.is_terminal else SafeConsole(width=140, highlight=False)


def print_source(described: Mapping[str, Any], console: Console) -> None:
    """Everything `describe_source` returned but its findings."""
    parts: list[RenderableType] = [Rule(Text(described["name"], style="bold"), align="left"), _facts_grid(described)]
    if described["manifests"]["skipped"]:
        parts.append(_skipped_table(described["manifests"]))
    if described["lengths"]["count"]:
        parts.append(_quantile_table(described))
        parts.append(_histogram_table("Tokens of a document", described["lengths"], lambda low: f"{low:,.0f}"))
    for score, told in described["scores"].items():
        if told["count"]:
            parts.append(_histogram_table(f"Score {score}", told, format_number))
            parts.append(_band_table(score, told))
    console.print(Group(*(part for item in parts for part in (item, Text("")))))


def source_facts(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of a source that fit on one line each."""
    manifests, lengths = described["manifests"], described["lengths"]
    facts = [
        ("shards", f"{described['shards']:,}"),
        ("documents", f"{described['documents']:,}"),
        (
            "tokens",
            f"{described['tokens']:,} ({format_tokens(described['tokens'])}), {format_bytes(described['bytes'])}",
        ),
        (
            "ids",
            ", ".join(f"{dtype} in {counted(count, 'shard')}" for dtype, count in described["dtypes"].items())
            or "none",
        ),
        ("manifests", _manifest_counts(manifests)),
    ]
    if described["index_documents"] != described["documents"]:
        sequences, documents = counted(described["documents"], "sequence"), described["index_documents"]
        facts.append(
            (
                "sequences",
                f"{sequences} in {counted(documents, 'document')}; a plan "
                "takes each sequence as a document, as Megatron does, and passes over documents without one",
            )
        )
    facts += [("tokenizer", _tokenizer(row)) for row in manifests["tokenizers"]]
    if manifests["present"]:
        facts.append(("largest id", f"{manifests['max_token_id']:,}"))
        facts.append(
            (
                "built from",
                f"{counted(manifests['input_rows'], 'row')} in {counted(manifests['input_files'], 'file')}, "
                f"{format_bytes(manifests['input_bytes'])}",
            )
        )
        facts.append(("skipped rows", f"{sum(manifests['skipped'].values()):,}"))
        if manifests["left_out"]:
            told = ", ".join(f"{count:,} {reason}" for reason, count in manifests["left_out"].items())
            facts.append(("left out of --input", told))
        if manifests["special_tokens"] is not None:
            record = SpecialTokenRecord.model_validate(manifests["special_tokens"])
            facts.append(("special tokens", special_token_facts(record) or "none inside texts"))
    for score, told in described["scores"].items():
        facts.append((f"score {score}", _score_fact(told, described["shards"])))
        facts.append((f"rank index by {score}", _rank_index(told["rank_index"])))
    if lengths["count"]:
        facts.append(("quantiles", _exactness([lengths, *described["scores"].values()])))
    return facts


def print_findings(findings: Sequence[Mapping[str, str]], console: Console) -> None:
    """A line for each thing that is wrong."""
    table = Table(title=f"Findings: {len(findings):,}", title_justify="left", show_lines=True)
    table.add_column("kind", style="bold red", no_wrap=True)
    table.add_column("file", overflow="fold", ratio=2)
    table.add_column("what is wrong", overflow="fold", ratio=3)
    for row in findings:
        table.add_row(Text(row["kind"]), Text(row["file"]), Text(row["message"]))
    console.print(table)


def format_bytes(size: float) -> str:
    """Three significant digits and a unit: `1.95 GB`."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return counted(round(size), "byte")


def format_number(value: float) -> str:
    """Return four significant digits, or whole numbers with separators where there are more."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _manifest_counts(manifests: Mapping[str, Any]) -> str:
    told = [f"{manifests['present']:,} present", f"{manifests['missing']:,} missing"]
    return ", ".join(told + ([f"{manifests['unreadable']:,} unreadable"] if manifests["unreadable"] else []))


def _tokenizer(row: Mapping[str, Any]) -> str:
    end = (
        "no end-of-document id" if row["appended_eod_id"] is None else f"documents end with id {row['appended_eod_id']}"
    )
    model = f" {row['model']}" if row["model"] else ""
    return f"{row['type']}{model}, {counted(row['vocab_size'], 'id')}, {end}, fingerprint {row['fingerprint'][:12]}"


def _score_fact(told: Mapping[str, Any], shards: int) -> str:
    fact = f"{counted(told['count'], 'document')} in {told['sidecars']:,} of {counted(shards, 'shard')}"
    if told["count"]:
        fact += f", {format_number(told['quantiles']['0'])} to {format_number(told['quantiles']['1'])}, "
        fact += f"mean {format_number(told['mean'])}"
    return fact + (f", {told['nan']:,} NaN" if told["nan"] else "")


def _rank_index(told: Mapping[str, Any]) -> str:
    if told["state"] == "present":
        return f"present: {told['path']}"
    if told["state"] == "missing":
        return f"none; up to 1,048,576 documents are ranked when a plan is opened, more need {tool('rank')}"
    return f"{told['state']}: {told['path']}"


def _exactness(columns: Sequence[Mapping[str, Any]]) -> str:
    if all(column.get("exact", True) for column in columns):
        return "exact"
    return "from a fine histogram: within 0.05 % of the value; counts, means, minima and maxima are exact"


def _facts_grid(described: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in source_facts(described):
        grid.add_row(Text(name), Text(value))
    return grid


def _skipped_table(manifests: Mapping[str, Any]) -> Table:
    table = Table(title="Rows that gave no document", title_justify="left")
    table.add_column("reason")
    table.add_column("rows", justify="right")
    table.add_column("of all rows", justify="right")
    for reason, count in manifests["skipped"].items():
        table.add_row(reason, f"{count:,}", f"{count / max(manifests['input_rows'], 1):.2%}")
    return table


def _quantile_table(described: Mapping[str, Any]) -> Table:
    columns = {"tokens of a document": described["lengths"]}
    columns |= {f"score {name}": told for name, told in described["scores"].items() if told["count"]}
    table = Table(title="Quantiles (fraction of the documents at or below)", title_justify="left")
    table.add_column("")
    for fraction in described["lengths"]["quantiles"]:
        table.add_column({"0": "min", "1": "max"}.get(fraction, f"{float(fraction):g}"), justify="right")
    table.add_column("mean", justify="right")
    for name, told in columns.items():
        row = [format_number(value) for value in told["quantiles"].values()]
        table.add_row(name, *row, format_number(told["mean"]))
    return table


def _histogram_table(title: str, told: Mapping[str, Any], edge: Callable[[float], str]) -> Table:
    grades = told.get("grades")
    bins = told["bins"] if grades is not None and len(grades) <= _ROWS else _merged(told["bins"], _ROWS)
    table = Table(title=title, title_justify="left")
    table.add_column("from" if grades is None else "score", justify="right")
    if grades is None:
        table.add_column("below", justify="right")
    for name in ("documents", "", "tokens", "share of tokens"):
        table.add_column(name, justify="left" if not name else "right")
    most = max(row["documents"] for row in bins)
    tokens = max(sum(row["tokens"] for row in bins), 1)
    for row in bins:
        edges = [edge(row["low"])] + ([] if grades is not None else [edge(row["high"])])
        bar = _bar(row["documents"] / most if most else 0)
        share = f"{row['tokens'] / tokens:.1%}"
        table.add_row(*edges, f"{row['documents']:,}", bar, format_tokens(row["tokens"]), share)
    return table


def _merged(bins: Sequence[Mapping[str, Any]], rows: int) -> list[dict[str, Any]]:
    """Neighbouring bins joined, so that at most `rows` are left."""
    step = -(-len(bins) // rows)
    groups = [bins[first : first + step] for first in range(0, len(bins), step)]
    return [
        {
            "low": group[0]["low"],
            "high": group[-1]["high"],
            "documents": sum(row["documents"] for row in group),
            "tokens": sum(row["tokens"] for row in group),
        }
        for group in groups
    ]


def _bar(share: float) -> Text:
    whole, part = divmod(round(share * _BAR * 8), 8)
    return Text("█" * whole + (_EIGHTHS[part] if part else ""), style="blue")


def _band_table(score: str, told: Mapping[str, Any]) -> Table:
    bands = told["band_tokens"]
    table = Table(title=f"Share of tokens by score {score}, equal bands of documents, best first", title_justify="left")
    for band in range(len(bands) - 1, -1, -1):
        table.add_column(f"{band / len(bands):.0%}-{(band + 1) / len(bands):.0%}", justify="right")
    table.add_row(*(f"{tokens / max(sum(bands), 1):.1%}" for tokens in reversed(bands)))
    return table
