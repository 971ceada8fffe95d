"""How the flags of a parser are written: for messages and for the documentation."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Spelling", "flags_among", "spellings"]


@dataclass(frozen=True, slots=True)
class Spelling:
    """One argument of a parser, which may have several flags."""

    flags: tuple[str, ...]
    """All of them, as on the command line; those of deprecated aliases too."""
    default: object
    off: tuple[str, ...] = ()
    """Those that set a value of False."""
    group: str = ""
    """Title of the parser's group."""

    @property
    def usual(self) -> str:
        """The first flag, which is the one that the documentation names."""
        return self.flags[0]

    def written(self, value: object) -> str:
        """Return the flag with a value, as somebody would have given it."""
        if value is None or (isinstance(value, bool) and value is self.default):
            return f"{self.usual} (not given)"
        if isinstance(value, bool):
            return self.usual if value or not self.off else self.off[0]
        words = value if isinstance(value, list | tuple) else [value]
        return " ".join([self.usual, *(str(getattr(word, "name", word)) for word in words)])


def spellings(parser: argparse.ArgumentParser) -> Mapping[str, Spelling]:
    """Return every argument of a parser by the name that it is stored under."""
    found: dict[str, Spelling] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            if not action.option_strings or action.dest in ("help", "version"):
                continue
            off = tuple(flag for flag in action.option_strings if _switches_off(action, flag))
            before = found.get(action.dest)
            flags, default = tuple(action.option_strings), action.default
            if before is not None:  # of two with different defaults, argparse takes the first one's
                flags, off, default = before.flags + flags, before.off + off, before.default
            found[action.dest] = Spelling(flags, default, off, group.title or "")
    return found


def _switches_off(action: argparse.Action, flag: str) -> bool:
    if isinstance(action, argparse.BooleanOptionalAction):
        return flag.startswith("--no-")
    return getattr(action, "const", None) is False and action.nargs == 0


def flags_among(words: Iterable[str], flags: Mapping[str, Spelling]) -> set[str]:
    """Return the names of the arguments that a command line gives."""
    given = {word.split("=")[0] for word in words}
    return {name for name, spelling in flags.items() if not given.isdisjoint(spelling.flags)}
