"""The table of flags as a page of the documentation: `tools/dev/flag_page.py`."""

from collections.abc import Iterable, Mapping, Sequence

from megatron_kaiyuan.flags.rules import Fate, Rule, by_name
from megatron_kaiyuan.flags.spelling import Spelling

__all__ = ["flag_page"]

_HEAD = """# What becomes of each of Megatron's flags

Written by `.venv/bin/python tools/dev/flag_page.py` from the table in `megatron_kaiyuan/flags/`. Tests compare this
page with the table, and the table with the parser of Megatron 0.19.2.

- **honoured**: our own code acts on the flag.
- **passed on**: Megatron's code acts on it, and ours does not stand between. A test checks that a module which a run
  imports reads it; that is no proof that every combination trains.
- **refused**: any value but the default ends the start with this sentence, before anything is built. A refusal with a
  condition holds under that condition alone.

The last column says how a flag that works was verified. Most lines are a flag added to a tiny run on the CPU, and what
differs from the run without it: the number of parameters (model), the loss of the first step (loss), later numbers
(steps), or files. `benchmarks/flag_effects.py` runs them. "No number changes" is said of another way to compute or
store the same, and of what acts on something that this run does not have. "Not run" is said with its reason.

`benchmarks/flag_fuzz.py` tries random command lines: each must train, or be refused in a sentence. docs/lab-notes.md
has the counts of both.

{counts}
"""


_COLUMNS = "| flag | fate | by whom, or why not | how verified |"


def flag_page(
    flags: Mapping[str, Spelling], rules: Iterable[Rule], verified: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Return the page, in Markdown: a section for each group of the parser, a row for each flag.

    Args:
        flags: Of the parser.
        rules: The table.
        verified: How each flag that works was verified, by its name.
    """
    table = by_name(rules)
    sections: dict[str, list[str]] = {}
    counts = dict.fromkeys(Fate, 0)
    for name, flag in flags.items():
        fates = sorted(table.get(name, ()), key=lambda rule: (rule.fate is Fate.REFUSED, rule.where.says))
        if not fates:
            continue
        counts[fates[0].fate] += 1
        words = f"`{'`, `'.join(flag.flags)}`"
        how = "" if fates[0].fate is Fate.REFUSED else "<br>".join((verified or {}).get(name, ())).replace("|", "\\|")
        row = f"| {words} | {fates[0].fate} | {'; '.join(_told(rule) for rule in fates)} | {how} |"
        sections.setdefault(flag.group, []).append(row)
    told = ", ".join(f"{number} {fate}" for fate, number in counts.items())
    parts = [_HEAD.format(counts=f"{sum(counts.values())} flags: {told} (always, or under every condition).")]
    for group, rows in sections.items():
        parts.append("\n".join([f"## {group}\n", _COLUMNS, "| --- | --- | --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _told(rule: Rule) -> str:
    words = rule.says.replace("|", "\\|")
    return f"refused {rule.where.says}: {words}" if rule.where.says else words
