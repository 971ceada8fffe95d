"""Text of others in Markdown and in a shell's words, so that no name, command or value becomes markup.

Every value that a card shows passes through `cell`, `code` or `bash`. YAML is written by PyYAML alone.
"""

import re
import shlex
from collections.abc import Iterable

from megatron_kaiyuan.host.terminal import visible

__all__ = ["address", "bash", "cell", "code"]

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|~$#&!@])")
_AT_START = re.compile(r"^(|\d+(?=[.)](?:\s|$)))([-+=.)])")
_LINK = re.compile(r"(?<=[A-Za-z])(?=://)|(?<=[wW]{3})(?=\.)")
_UNQUOTED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ADDRESS = re.compile(r"https?://[A-Za-z0-9.-]+(?::\d+)?(?:/[\w./~%+,=-]*)?(?:\?[\w./~%+,=&-]*)?(?:#[\w-]*)?", re.ASCII)
_NOT_IN_CODE = re.compile(r"[`|\\]")
_LONGEST_LINE = 100


def cell(value: object) -> str:
    """Return a value as plain text for a table, a heading or a line of Markdown.

    None is `unknown`, a list its members with commas, an empty one `none`. Markup, HTML and addresses of a text are
    shown as they were typed: they are no links.
    """
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or "none"
    text = _MARKUP.sub(r"\\\1", _one_line(value))
    text = _LINK.sub(r"\\", text)
    return _AT_START.sub(r"\1\\\2", text)  # else a list, a heading or a number


def address(value: object) -> str:
    """Return where something comes from, as a link if all of it is an address of the web and as `cell` otherwise."""
    return f"<{value}>" if isinstance(value, str) and _ADDRESS.fullmatch(value) else cell(value)


def code(value: object) -> str:
    """Return a value in back-ticks, or as `cell` where it holds what would end them or the cell around."""
    text = _one_line(value)
    return cell(value) if not text.strip() or _NOT_IN_CODE.search(text) else f"`{text}`"


def bash(commands: Iterable[Iterable[str]]) -> str:
    """Return commands as a fenced block that a shell reads as these words, whatever characters they hold."""
    text = "\n".join(_command([str(word) for word in words]) for words in commands)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{text}\n{fence}"


def _command(words: list[str]) -> str:
    """One line, broken before a flag where it becomes long."""
    lines = [""]
    for word in map(_word, words):
        starts_flag = word.startswith("-") and len(lines[-1]) + len(word) > _LONGEST_LINE
        if starts_flag:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _word(word: str) -> str:
    """A word for a shell, on one line, with control characters written out."""
    if word == "...":
        return word
    if not _UNQUOTED.search(word):
        return shlex.quote(word)
    escaped = word.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + _UNQUOTED.sub(lambda match: _escape(match[0]), escaped) + "'"


def _escape(character: str) -> str:
    return {"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(character, f"\\u{ord(character):04x}")


def _one_line(value: object) -> str:
    return re.sub(r"[\n\t]+", " ", visible(value))
