"""What leaves the machine: facts without secrets, folders and hosts, and the commands as words."""

import shlex
from collections.abc import Mapping
from typing import Any

from megatron_kaiyuan.checkpoints.redaction import hide_folders, hide_secrets, redact, without_places

__all__ = ["published", "published_command", "published_file_settings"]


def published[Data](data: Data) -> Data:
    """Return plain data in which no text holds a secret or an absolute path; names of keys stay."""
    made: object = data
    if isinstance(data, str):
        made = hide_folders(hide_secrets(data))
    elif isinstance(data, Mapping):
        made = {key: published(value) for key, value in data.items()}
    elif isinstance(data, list | tuple):
        made = [published(value) for value in data]
    return made  # type: ignore[return-value]


def published_command(line: str | None) -> list[str] | None:
    """Return the words of a recorded command that everybody may read, None where none was recorded.

    A command that no shell could read, because somebody wrote it into the checkpoint, is one word.
    """
    if line is None:
        return None
    try:
        words = shlex.split(line)
    except ValueError:  # no closing quotation
        words = [line]
    return without_places(redact(words))


def published_file_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a tokenizer without those that name a place on the machine that wrote them."""
    return {name: value for name, value in settings.items() if not (_names_a_file(name) and _is_place(value))}


def _names_a_file(name: str) -> bool:
    return name == "name_or_path" or name.endswith(("_file", "_dir", "_path"))


def _is_place(value: object) -> bool:
    return isinstance(value, str) and hide_folders(value) != value
