"""The page of the documentation is what the table says, of every flag of the parser."""

import re
from pathlib import Path

from megatron_kaiyuan.flags.evidence import evidence
from megatron_kaiyuan.flags.page import flag_page
from megatron_kaiyuan.flags.rules import Condition, Fate, Rule
from megatron_kaiyuan.flags.spelling import Spelling
from megatron_kaiyuan.flags.table import TABLE
from megatron_kaiyuan.training.parsing import known_flags

PAGE = Path(__file__).parents[3] / "docs/megatron-flags.md"


def test_the_page_is_written_from_the_table() -> None:
    page = flag_page(known_flags(), TABLE, evidence(known_flags()))
    assert PAGE.read_text() == page, "run .venv/bin/python tools/dev/flag_page.py"


def test_every_flag_has_its_row() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `--")]
    listed = [flag for row in rows for flag in re.findall(r"`(--[^`]+)`", row.split(" | ")[0])]
    assert sorted(listed) == sorted(flag for spelling in known_flags().values() for flag in spelling.flags)


def test_a_row_tells_the_fate_and_the_refusals_with_their_conditions() -> None:
    flags = {"fp8": Spelling(("--fp8-format",), None, group="precision")}
    local = Condition("with --transformer-impl local", lambda _args: True)
    rules = (
        Rule(Fate.REFUSED, ("fp8",), "needs a|b; leave it out", local),
        Rule(Fate.PASSED_ON, ("fp8",), "its layers"),
    )
    row = flag_page(flags, rules, {"fp8": ["`a.py::b`", "read"]}).splitlines()[-1]
    assert row == (
        "| `--fp8-format` | passed on | its layers; refused with --transformer-impl local: needs a\\|b; leave it out "
        "| `a.py::b`<br>read |"
    )
