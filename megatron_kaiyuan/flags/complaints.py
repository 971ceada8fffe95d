"""Megatron's own checks as one sentence: which flags with which values, what is wrong, and where Megatron says so.

Megatron checks a command line with assertions, often without a message, and with exceptions of many kinds; some checks
print a line and leave with exit code 0. Here the failing check itself is read: its condition, those it stands under and
the arguments they name show which flags are at fault. So no list of checks is kept, and none can be missing.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from megatron_kaiyuan.errors import ConfigError, KaiyuanError
from megatron_kaiyuan.flags.failed_check import FailedCheck
from megatron_kaiyuan.flags.spelling import Spelling, flags_among

__all__ = ["megatron_checks", "no_silent_end", "sentence"]


@contextmanager
def megatron_checks(flags: Mapping[str, Spelling]) -> Iterator[None]:
    """Turn what Megatron raises in the block into a `ConfigError`.

    Only checks of the command line may run in it.

    Args:
        flags: The parser's flags, keyed with the attribute that argparse stores them in.

    Raises:
        ConfigError: Megatron raised an error, or left with an exit code that says that all is well.
    """
    try:
        yield
    except KaiyuanError:
        raise
    except SystemExit as stopped:
        if stopped.code not in (None, 0) or {"-h", "--help"} & set(sys.argv):
            raise
        raise ConfigError(sentence(stopped, flags, sys.argv[1:])) from stopped
    except Exception as error:
        raise ConfigError(sentence(error, flags, sys.argv[1:])) from error


@contextmanager
def no_silent_end(flags: Mapping[str, Spelling], may_end: Collection[str] = ()) -> Iterator[None]:
    """Turn an exit of Megatron's with code 0 into a `ConfigError`, but for those that have done what was asked.

    Args:
        flags: The parser's flags by the name that argparse stores them under.
        may_end: Names of Megatron's functions that end the program when all is done.

    Raises:
        ConfigError: Megatron left with an exit code that says that all is well.
    """
    try:
        yield
    except SystemExit as stopped:
        checks = _checks_of(stopped.__traceback__)
        if stopped.code not in (None, 0) or not checks or checks[0].function in may_end:
            raise
        raise ConfigError(sentence(stopped, flags, sys.argv[1:])) from stopped


def sentence(error: BaseException, flags: Mapping[str, Spelling], words: list[str]) -> str:
    """Say which flags an error of Megatron's is about, and what it complains of.

    Args:
        error: As raised, with its traceback.
        flags: The parser's flags by the name that argparse stores them under.
        words: The command line.
    """
    checks = _checks_of(error.__traceback__)
    given = flags_among(words, flags)
    at_fault = next((found for check in checks if (found := check.arguments(given))), {})
    written = [flags[name].written(value) for name, value in at_fault.items() if name in flags]
    named = f"{', '.join(written)}: " if written else ""
    where = f" ({checks[0].place})" if checks else ""
    return f"{named}{_message(error, checks, flags)}{where}; {_remedy(len(written))}"


def _remedy(count: int) -> str:
    if count == 0:
        return "change the flags that it speaks of, or leave them out"
    return "give it another value, or leave it out" if count == 1 else "change one of them, or leave it out"


def _checks_of(traceback: TracebackType | None) -> list[FailedCheck]:
    """Megatron's own lines in a traceback, the innermost first."""
    found = []
    while traceback is not None:
        if str(traceback.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "megatron":
            found.append(FailedCheck(traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return found[::-1]


def _message(error: BaseException, checks: list[FailedCheck], flags: Mapping[str, Spelling]) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.split('.')[0]} is needed and not installed: install it"
    if isinstance(error, SystemExit):
        return (checks[0].text_before if checks else "") or "Megatron ends the run without doing anything"
    told = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, AssertionError):
        condition = checks[0].condition({name: spelling.usual for name, spelling in flags.items()}) if checks else ""
        return told or f"Megatron requires {condition}"
    if checks and checks[0].intended_message:
        return checks[0].intended_message
    if not told or isinstance(error, LookupError | AttributeError | TypeError):
        return f"{type(error).__name__}: {told}".rstrip(": ")
    return told
