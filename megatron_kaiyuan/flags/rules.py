"""The rows of the table of flags, and the refusal of every flag that would otherwise have no effect.

A table is a tuple of `Rule`. Each rule gives several flags one fate, in words that the documentation repeats. Tests
compare the tables with Megatron's own parser, so a new version cannot bring a flag that nobody decided on.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_kaiyuan.errors import ConfigError

__all__ = ["ALWAYS", "Condition", "Fate", "Rule", "by_name", "flag_of", "refuse_flags"]


class Fate(StrEnum):
    """What becomes of a flag."""

    HONOURED = "honoured"
    """Our own code acts on it."""
    PASSED_ON = "passed on"
    """Megatron's code acts on it, and ours does not stand between."""
    REFUSED = "refused"
    """Any other value than the default stops the run before it starts."""


@dataclass(frozen=True, slots=True)
class Condition:
    """When a refusal holds."""

    says: str
    """Follows the flag in the message and in the documentation: "with --transformer-impl local"."""
    holds: Callable[[argparse.Namespace], bool]
    """Receives the arguments, parsed but not yet validated."""


ALWAYS = Condition("", lambda _args: True)


@dataclass(frozen=True, slots=True)
class Rule:
    """The fate of some flags."""

    fate: Fate
    names: tuple[str, ...]
    """As argparse stores them: `num_experts` for `--num-experts`."""
    says: str
    """Who acts on them and how. For refused flags: what is wrong, and what to do instead."""
    where: Condition = ALWAYS
    """Of a refusal; elsewhere the flag is passed on."""


def by_name(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Return the rules of each flag. Only conditional refusals may name a flag that another rule names too."""
    table: dict[str, list[Rule]] = {}
    for rule in rules:
        for name in rule.names:
            table.setdefault(name, []).append(rule)
    return table


def refuse_flags(args: argparse.Namespace, defaults: Mapping[str, Any], rules: Iterable[Rule]) -> None:
    """Refuse every flag that the table refuses and that has another value than its default.

    Args:
        args: Parsed, not yet validated.
        defaults: The parser's default by name.
        rules: The table.

    Raises:
        ConfigError: names all such flags, each with what is wrong and what to do.
    """
    complaints = [
        complaint for rule in rules if rule.fate is Fate.REFUSED for complaint in _complaints(args, defaults, rule)
    ]
    if complaints:
        raise ConfigError("; ".join(complaints))


def _complaints(args: argparse.Namespace, defaults: Mapping[str, Any], rule: Rule) -> Iterator[str]:
    given = [name for name in rule.names if hasattr(args, name) and getattr(args, name) != defaults.get(name)]
    if given and rule.where.holds(args):
        flags = ", ".join(_written(name, getattr(args, name)) for name in given)
        yield f"{flags}{' ' * bool(rule.where.says)}{rule.where.says}: {rule.says}"


def flag_of(name: str) -> str:
    """Return the usual spelling of the flag that argparse stores under a name."""
    return _SPELLED.get(name, "--" + name.replace("_", "-"))


def _written(name: str, value: object) -> str:
    return flag_of(name) if isinstance(value, bool) else f"{flag_of(name)} {value}"


_SPELLED = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "layernorm_epsilon": "--norm-epsilon",
    "add_bias_linear": "--disable-bias-linear",
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
}
"""Flags that argparse stores under another name than their own."""
