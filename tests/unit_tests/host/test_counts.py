"""No message counts with a plural spelled by hand: `1 shards`."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

from megatron_kaiyuan.host.terminal import agreed
from tests import REPOSITORY

NOUNS = frozenset(
    """documents tokens samples bytes runs steps ids shards parameters windows rows checkpoints scores seeds values
    sources tensors files entries heads slices quantiles pairs layers GPUs positions groups dtypes processes sequences
    gradients nulls ranks prefixes batches models results bands trends bends facts passes seconds others texts lines
    tasks phases iterations""".split()  # noqa: SIM905
)
NEVER_ONE = re.compile(
    r"\b_?[A-Z][A-Z_]+\b|format_\w+\(|_number\(|_power_of_ten\(|dtype$|_shared_memory\(|2 \* |^rising$"
)
"""Constants, numbers that are texts already, and values that are no count."""


def plurals_by_hand(source: str) -> Iterator[str]:
    """Yield each number in a formatted text that a plural follows, whatever the number is."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for number, text in pairwise(node.values):
            if not isinstance(number, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            spec = ast.unparse(number.format_spec) if number.format_spec else "''"
            word = re.match(r" (\w+)\b(?!-)", str(text.value))
            value = ast.unparse(number.value)
            is_number = number.conversion == -1 and spec[1:].strip("'\"") in ("", ",") and not value.startswith("'")
            if word and word[1] in NOUNS and is_number and not NEVER_ONE.search(value):
                yield f"{value} {word[1]}"


def test_counts_in_messages_are_in_words() -> None:
    package = REPOSITORY / "megatron_kaiyuan"
    found = {str(path): list(plurals_by_hand(path.read_text(encoding="utf-8"))) for path in package.rglob("*.py")}
    assert {path: texts for path, texts in found.items() if texts} == {}


def test_a_plural_spelled_by_hand_is_seen() -> None:
    assert list(plurals_by_hand("f\"{len(x):,} shards and {n} documents of {MOST} files, {counted(n, 'row')}\"")) == [
        "len(x) shards",
        "n documents",
    ]


def test_the_verb_follows_the_number() -> None:
    assert [agreed(number, "is", "are") for number in (0, 1, 2)] == ["are", "is", "are"]
