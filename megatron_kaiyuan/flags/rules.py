"""The rows of the table of flags, and the refusal of every flag that would otherwise have no effect.

A table is a tuple of `Rule`. Each rule gives several flags one fate, in words that the documentation repeats. Tests
compare the tables with Megatron's own parser, so a new version cannot bring a flag that nobody decided on.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.spelling import Spelling

__all__ = [
    "ALWAYS",
    "Condition",
    "Fate",
    "Rule",
    "by_name",
    "flag_of",
    "only_with",
    "only_with_package",
    "refuse_flags",
]


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


def only_with(
    master: str, holds: Callable[[argparse.Namespace], bool], names: tuple[str, ...], acts: str
) -> list[Rule]:
    """Return the rules of flags that are read only where another one is given.

    Args:
        master: The other flag, as a user would give it: "--optimizer muon".
        holds: Whether it is given.
        names: Of the flags that depend on it.
        acts: Who acts on them then.
    """
    without = Condition(f"without {master}", lambda args: not holds(args))
    return [
        Rule(Fate.REFUSED, names, f"nothing reads it then; give {master} too, or leave it out", without),
        Rule(Fate.PASSED_ON, names, acts),
    ]


def only_with_package(package: str, names: tuple[str, ...], acts: str) -> list[Rule]:
    """Return the rules of flags that need a package.

    `package` is the name under which it is imported.
    """
    without = Condition(f"without the package {package}", lambda _args: importlib.util.find_spec(package) is None)
    return [
        Rule(Fate.REFUSED, names, f"it needs that; install {package}, or leave it out", without),
        Rule(Fate.PASSED_ON, names, acts),
    ]


def by_name(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Return the rules of each flag. Only conditional refusals may name a flag that another rule names too."""
    table: dict[str, list[Rule]] = {}
    for rule in rules:
        for name in rule.names:
            table.setdefault(name, []).append(rule)
    return table


def refuse_flags(
    args: argparse.Namespace,
    defaults: Mapping[str, Any],
    rules: Iterable[Rule],
    flags: Mapping[str, Spelling] | None = None,
) -> None:
    """Refuse every flag that the table refuses and that has another value than its default.

    Args:
        args: Parsed, not yet validated.
        defaults: The parser's default of each.
        rules: The table.
        flags: How the parser spells them; without it, as `flag_of` does.

    Raises:
        ConfigError: names all such flags, each with what is wrong and what to do.
    """
    complaints = [
        complaint
        for rule in rules
        if rule.fate is Fate.REFUSED
        for complaint in _complaints(args, defaults, rule, flags or {})
    ]
    if complaints:
        raise ConfigError("; ".join(complaints))


def _complaints(
    args: argparse.Namespace, defaults: Mapping[str, Any], rule: Rule, spelled: Mapping[str, Spelling]
) -> Iterator[str]:
    given = [name for name in rule.names if hasattr(args, name) and getattr(args, name) != defaults.get(name)]
    if given and rule.where.holds(args):
        values = {name: getattr(args, name) for name in given}
        flags = ", ".join(
            spelled[name].written(value) if name in spelled else _written(name, value) for name, value in values.items()
        )
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
