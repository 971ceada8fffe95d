"""The table of flags as a page of the documentation: `tools/dev/flag_page.py`."""

from collections.abc import Iterable, Mapping

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

`benchmarks/flag_fuzz.py` tries random command lines on the CPU: each must train, or be refused in a sentence. It does
not compare what trained with stock Megatron. docs/lab-notes.md has its counts.

{counts}
"""


def flag_page(flags: Mapping[str, Spelling], rules: Iterable[Rule]) -> str:
    """Return the page, in Markdown: a section for each group of the parser, a row for each flag."""
    table = by_name(rules)
    sections: dict[str, list[str]] = {}
    counts = dict.fromkeys(Fate, 0)
    for name, flag in flags.items():
        fates = sorted(table.get(name, ()), key=lambda rule: (rule.fate is Fate.REFUSED, rule.where.says))
        if not fates:
            continue
        counts[fates[0].fate] += 1
        words = f"`{'`, `'.join(flag.flags)}`"
        row = f"| {words} | {fates[0].fate} | {'; '.join(_told(rule) for rule in fates)} |"
        sections.setdefault(flag.group, []).append(row)
    told = ", ".join(f"{number} {fate}" for fate, number in counts.items())
    parts = [_HEAD.format(counts=f"{sum(counts.values())} flags: {told} (always, or under every condition).")]
    for group, rows in sections.items():
        parts.append(
            "\n".join([f"## {group}\n", "| flag | fate | by whom, or why not |", "| --- | --- | --- |", *rows]) + "\n"
        )
    return "\n".join(parts)


def _told(rule: Rule) -> str:
    words = rule.says.replace("|", "\\|")
    return f"refused {rule.where.says}: {words}" if rule.where.says else words
