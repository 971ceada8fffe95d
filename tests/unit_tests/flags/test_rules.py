"""A flag that the table refuses stops the run where it has another value than its default, with its sentence."""

import argparse

import pytest

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.rules import Condition, Fate, Rule, by_name, refuse_flags

LOCAL = Condition("with --transformer-impl local", lambda args: bool(args.transformer_impl == "local"))
RULES = (
    Rule(Fate.PASSED_ON, ("hidden_size",), "Megatron's config"),
    Rule(Fate.REFUSED, ("num_classes", "vision"), "belongs to vision models; remove it"),
    Rule(Fate.REFUSED, ("fp8",), "has no effect there; use --transformer-impl transformer_engine", LOCAL),
    Rule(Fate.PASSED_ON, ("fp8",), "Transformer Engine's layers"),
)
DEFAULTS = {"hidden_size": None, "num_classes": 1000, "vision": False, "fp8": None, "transformer_impl": "local"}


def refuse(**values: object) -> None:
    refuse_flags(argparse.Namespace(**(DEFAULTS | values)), DEFAULTS, RULES)


def test_defaults_and_flags_that_are_passed_on_are_accepted() -> None:
    refuse()
    refuse(hidden_size=64)


def test_a_refused_flag_is_named_with_its_value_and_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"^--num-classes 10, --vision: belongs to vision models; remove it$"):
        refuse(num_classes=10, vision=True)


def test_a_conditional_refusal_holds_under_its_condition_alone() -> None:
    with pytest.raises(ConfigError, match=r"^--fp8-format hybrid with --transformer-impl local: has no effect there"):
        refuse(fp8="hybrid")
    refuse(fp8="hybrid", transformer_impl="transformer_engine")


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--num-classes 10.*--fp8-format hybrid"):
        refuse(num_classes=10, fp8="hybrid")


def test_the_table_by_name() -> None:
    assert [rule.fate for rule in by_name(RULES)["fp8"]] == [Fate.REFUSED, Fate.PASSED_ON]
