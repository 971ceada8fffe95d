"""What reaches a terminal: text of others with its control characters shown, commands quoted, counts in words."""

import os
import re
import shlex
from collections.abc import Mapping

__all__ = ["agreed", "counted", "shell_command", "visible", "visible_data"]

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but newline and tab; C1 has one-byte forms of ESC [
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of what follows
    "\u2028\u2029\ud800-\udfff]"  # other line ends, and halves of surrogate pairs, which no terminal can be sent
)


def visible(text: object) -> str:
    r"""Return a text whose control characters are written out, such as `\x1b` for ESC.

    Newlines and tabs stay. A document, a name or a manifest may hold any character. Sent to a terminal as they are,
    some of them move the cursor, change the title or hide what follows.
    """
    return _UNSEEN.sub(_written_out, str(text))


def _written_out(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def visible_data[Data](data: Data) -> Data:
    """Return plain data (mappings, lists, tuples, texts, numbers) with every text in it `visible`, keys included."""
    made: object = data
    if isinstance(data, str):
        made = visible(data)
    elif isinstance(data, Mapping):
        made = {visible_data(key): visible_data(value) for key, value in data.items()}
    elif isinstance(data, list | tuple):
        made = type(data)(visible_data(value) for value in data)
    return made  # type: ignore[return-value]


def shell_command(*words: str | os.PathLike[str]) -> str:
    """Return a command that a shell reads as these words, whatever characters they hold."""
    return shlex.join(os.fspath(word) for word in words)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return `1 shard` or `2,000 shards`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def agreed(number: int, one: str, several: str) -> str:
    """Return the form of a verb that follows a `counted` noun: `is` or `are`."""
    return one if number == 1 else several
