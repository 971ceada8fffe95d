"""Every flag that works was verified somehow, and the tests that are named for it are there."""

import ast
from functools import cache

from megatron_kaiyuan.flags.effects import EFFECTS
from megatron_kaiyuan.flags.evidence import EFFECTS_TEST, NOT_RUN, TESTS, evidence
from megatron_kaiyuan.flags.rules import Fate, by_name
from megatron_kaiyuan.flags.table import TABLE
from megatron_kaiyuan.training.parsing import known_flags
from tests import REPOSITORY


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_flag_that_works_was_verified() -> None:
    works = {name for name, rules in by_name(TABLE).items() if any(rule.fate is not Fate.REFUSED for rule in rules)}
    assert sorted(works - evidence(known_flags()).keys()) == []
    assert sorted(evidence(known_flags()).keys() - works) == []


def test_every_test_that_is_named_is_there() -> None:
    named = [test.split("::") for test in (*TESTS, EFFECTS_TEST)]
    assert [f"{file}::{name}" for file, name in named if name not in functions_of(file)] == []


def test_what_was_run_is_not_said_to_be_unrun() -> None:
    flags = {word: name for name, flag in known_flags().items() for word in flag.flags}
    unrun = {name for names in NOT_RUN.values() for name in names.split()}
    run = {flags[effect.name] for effect in EFFECTS} | {name for names in TESTS.values() for name in names.split()}
    assert sorted(unrun & run) == []


def test_every_line_names_flags_and_shows_something_known() -> None:
    words = {word for flag in known_flags().values() for word in flag.flags}
    given = {word for effect in EFFECTS for word in f"{effect.flag} {effect.given}".split() if word.startswith("--")}
    assert sorted(given - words) == []
    assert {show for effect in EFFECTS for show in effect.shows} <= {"model", "loss", "steps", "files", "refused"}
    assert len(set(EFFECTS)) == len(EFFECTS)
