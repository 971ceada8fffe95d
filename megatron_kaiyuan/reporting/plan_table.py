"""The dry run of a plan as terminal tables."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_kaiyuan.data.learning_rate import batch_warnings, rate_warnings
from megatron_kaiyuan.data.retention import repetition_notes, repetition_warnings, retention_warnings
from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.terminal import counted

__all__ = ["format_tokens", "plan_tables", "print_plan", "times_shown"]

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def format_tokens(count: float) -> str:
    """Three significant digits and a unit: `120B`, `1.5T`, `950`."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return f"{count:.0f}"


def plan_tables(description: dict[str, Any], global_batch_size: int | None = None) -> Group:
    """All tables of a described plan.

    Args:
        description: what `Plan.describe` returned.
        global_batch_size: sequences a step; adds the steps of each phase.
    """
    parts: list[Table | Text] = [_phases_table(description, global_batch_size)]
    if description["domain_bounds"]:
        parts.append(_bounds_table(description))
    parts += [_phase_table(phase) for phase in description["phases"]]
    if any(source["bands"] for source in description["sources"].values()):
        parts.append(_bands_table(description))
    if description.get("retained"):
        parts.append(_retained_table(description["retained"]))
    parts.append(_summary(description, global_batch_size))
    notes = (
        length_notes(description) + fill_notes(description) + padding_notes(description) + repetition_notes(description)
    )
    parts += [Text(line) for line in notes]
    warnings = rate_warnings(description) + repetition_warnings(description)
    parts += [Text(f"warning: {line}", style="yellow") for line in warnings]
    parts += [Text(f"warning: {line}", style="yellow") for line in retention_warnings(description.get("retained", []))]
    lost = batch_warnings(description, global_batch_size) if global_batch_size else []
    parts += [Text(f"warning: {line}", style="yellow") for line in lost]
    return Group(*parts)


def print_plan(description: dict[str, Any], global_batch_size: int | None = None) -> None:
    """Print all tables to stdout, as wide as they need when it is not a terminal."""
    console = SafeConsole()
    if not console.is_terminal:
        console = SafeConsole(width=175)
    console.print(plan_tables(description, global_batch_size))


def _phases_table(description: dict[str, Any], batch: int | None) -> Table:
    table = Table(title="Phases", title_justify="left")
    for name in ("phase", "order", "first sample"):
        table.add_column(name)
    for name in ("samples", "tokens", "steps", "learning rate", "domains"):
        table.add_column(name, justify="right")
    for phase in description["phases"]:
        table.add_row(
            phase["name"],
            phase["order"],
            f"{phase['first_sample']:,}",
            f"{phase['samples']:,}",
            format_tokens(phase["tokens"]),
            f"{phase['samples'] / batch:,.1f}" if batch else "-",
            _learning_rate(phase["lr"]),
            _shares(phase["domains"]),
        )
    return table


def _shares(domains: dict[str, float]) -> str:
    return ", ".join(f"{domain} {share:.1%}" for domain, share in domains.items())


def _bounds_table(description: dict[str, Any]) -> Table:
    table = Table(title="Domain bounds", title_justify="left")
    for name in ("domain", "over"):
        table.add_column(name)
    for name in ("tokens", "share", "min", "max"):
        table.add_column(name, justify="right")
    table.add_column("kept")
    for bound in description["domain_bounds"]:
        limits = ["-" if bound[side] is None else f"{bound[side]:.1%}" for side in ("min", "max")]
        table.add_row(
            bound["domain"],
            bound["phase"] or "the run",
            format_tokens(bound["tokens"]),
            f"{bound['share']:.1%}",
            *limits,
            "yes" if bound["met"] else "NO (reported only)",
        )
    return table


def _learning_rate(lr: dict[str, Any] | None) -> str:
    if lr is None:
        return "-"
    if lr["shape"] == "constant":
        return f"{lr['start']:g}"
    return f"{lr['start']:g} to {lr['end']:g} ({lr['shape']})"


def _phase_table(phase: dict[str, Any]) -> Table:
    table = Table(title=f"{phase['name']} ({phase['order']})", title_justify="left")
    for name in ("source", "keep", "order"):
        table.add_column(name)
    for name in ("documents", "unique tokens", "repeat", "tokens shown", "epochs", "share"):
        table.add_column(name, justify="right")
    table.add_column("of the selection")
    for name, row in phase["sources"].items():
        table.add_row(
            name,
            row["keep"],
            row["order"],
            f"{row['documents']:,}",
            format_tokens(row["unique_tokens"]),
            f"x{row['repeat']:g}",
            format_tokens(row["tokens"]),
            f"{row['epochs']:.2f}",
            f"{row['share']:.1%}",
            times_shown(row),
        )
    return table


def fill_notes(description: dict[str, Any]) -> list[str]:
    """Sources that have less than their weight asks for, where others fill the rest."""
    return [
        f"phase {phase['name']!r}: {name} is exhausted at {row['share']:.1%} of the phase, its weight asks for "
        f"{row['share_asked']:.1%}; the others fill the rest"
        for phase in description["phases"]
        for name, row in phase["sources"].items()
        if row["fill"] and row["share"] < row["share_asked"] - row["mix_bound_samples"] / phase["samples"]
    ]


def length_notes(description: dict[str, Any]) -> list[str]:
    """Phases whose windows are several samples, and what training on them asks for."""
    return [
        f"phase {phase['name']!r}: windows of {counted(phase['seq_length'], 'token')}, "
        f"{counted(phase['samples_per_window'], 'sample')} each: --micro-batch-size counts samples, "
        f"a multiple of {phase['samples_per_window']} of which sample {phase['first_sample']:,} is one"
        for phase in description["phases"]
        if phase["samples_per_window"] > 1
    ]


def padding_notes(description: dict[str, Any]) -> list[str]:
    """Parts that are packed whole, and how much of them is padding."""
    return [
        f"phase {phase['name']!r}: {row['padding']:.2%} of what is shown of {name} is padding, {format_tokens(tokens)} "
        "of its tokens"
        for phase in description["phases"]
        for name, row in phase["sources"].items()
        if (tokens := round(row["padding"] * row["tokens"]))
    ]


def times_shown(row: dict[str, Any]) -> str:
    """Return how much of a selection a phase shows how often, such as `70.0% once, 30.0% twice`.

    Shares below 0.05 % are left out.
    """
    if row["shown"] is None:
        return "all passes thinned alike: see version 2"
    total = sum(count["tokens"] for count in row["shown"])
    shares = [(count["times"], count["tokens"] / total) for count in row["shown"]]
    names = {0: "never", 1: "once", 2: "twice"}
    return ", ".join(f"{share:.1%} {names.get(n, f'{n} times')}" for n, share in shares if share >= 5e-4)


def _bands_table(description: dict[str, Any]) -> Table:
    """Epochs per score band over all phases: how often the run sees the best and the worst of each source."""
    scored = {name: source for name, source in description["sources"].items() if source["bands"]}
    bands = next(iter(scored.values()))["bands"]
    table = Table(title="Times each quality band is seen, all phases (best band first)", title_justify="left")
    table.add_column("source")
    for band in reversed(bands):
        table.add_column(f"{band['low'] * 100:.0f}-{band['high'] * 100:.0f}%", justify="right")
    for name, source in scored.items():
        table.add_row(name, *(f"{band['epochs']:.2f}" if band["tokens"] else "-" for band in reversed(source["bands"])))
    return table


def _retained_table(rows: list[dict[str, Any]]) -> Table:
    """The weight that a token of each phase, source and band keeps in the final weights."""
    table = Table(
        title="Weight that a token keeps in the final weights, 1 = most (best band first)", title_justify="left"
    )
    table.add_column("phase")
    table.add_column("source")
    bands = len(rows[0]["bands"])
    for name in ("all", *(f"{100 * band // bands}-{100 * (band + 1) // bands}%" for band in reversed(range(bands)))):
        table.add_column(name, justify="right")
    for row in rows:
        cells = ["-" if kept is None else f"{kept:.2f}" for kept in reversed(row["bands"])]
        alike = [""] * bands
        table.add_row(row["phase"], row["source"], f"{row['kept']:.2f}", *(cells if row["ascending"] else alike))
    return table


def _summary(description: dict[str, Any], batch: int | None) -> Text:
    held_out = sum(source["held_out_documents"] for source in description["sources"].values())
    elsewhere = "".join(
        f"\n{name}: {source['held_out_elsewhere_documents']:,} more documents are left out, held out of another source "
        "with the same shards"
        for name, source in description["sources"].items()
        if source["held_out_elsewhere_documents"]
    )
    elsewhere += "".join(
        f"\n{name}: {counted(source['denied_documents'], 'document')} denied"
        for name, source in description["sources"].items()
        if source["denied_documents"]
    )
    written = "" if description["version_written"] else " (none is written: a run begun under version 1 stays there)"
    steps = f", {description['samples'] / batch:,.1f} steps of {batch:,}" if batch else ""
    return Text(
        f"{counted(description['samples'], 'sample')} of {counted(description['seq_length'], 'token')} = "
        f"{format_tokens(description['tokens'])} tokens{steps}; {counted(held_out, 'document')} held out{elsewhere}\n"
        f"over the run: {_shares(description['domains'])}\n"
        f"seed {description['seed']}, version {description['version']}{written}, fingerprint "
        f"{description['fingerprint']}"
    )
