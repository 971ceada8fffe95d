"""Command lines without their secrets: a checkpoint is copied, and a release is read by everybody.

One rule decides what a secret is, where a command is recorded and again where it is published. When in doubt a value is
a secret: a command with one `***` too many can still be read.
"""

import re
from collections.abc import Iterable, Sequence

__all__ = ["HIDDEN", "hide_folders", "hide_secrets", "redact", "without_places"]

HIDDEN = "***"
"""Stands for a secret."""
_ALWAYS = "apikey|auth|authorization|bearer|credential|credentials|passphrase|passwd|password|pwd|secret|secrets"
_LAST = "cookie|key|pat|sig|signature|token|hf_token"
_SECRET_NAME = re.compile(rf"(?:.*[^a-z])?(?:(?:{_ALWAYS})(?:[^a-z].*)?|(?:{_LAST})[0-9]*)", re.DOTALL)
"""Of a name in lower case: `--moe-token-dispatcher-type` is none, for only a token at its end is one."""
_NO_SECRET = re.compile(
    r"(?:.*[^a-z])?(?:file|path|dir|folder|name|type|(?:bos|eos|eod|pad|mask|unk|prefix|middle|suffix)[_-]token)"
)
"""Says where a secret lies, or names a token of the vocabulary."""
_NAMED = re.compile(r"""([A-Za-z][\w.-]*)["']?\s*(?:=|:(?!//))\s*["']?""")
_VALUE = re.compile(r"""(?:Bearer\s+|Basic\s+)?[^\s"'&;,}]+""")
_IN_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]+@")
_KNOWN = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[a-z]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|wandb_v\d\w{16,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]*"
    r"|(?<![0-9a-fA-F-])[0-9a-f]{40}(?![0-9a-fA-F]))"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*",
    re.DOTALL,
)
"""Keys that services give out; 40 hexadecimal digits are one of wandb's."""
_PLACE = re.compile(r"(?<![\w.:/~$*])(?:file://)?(?:~[\w.-]*|(?=/))(?:/[^/\s'\"`,;:=()\[\]{}<>|]+)*/(?=[^/\s'\"`])")
_HOST = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"]+")
_OF_PEOPLE_OR_HOSTS = re.compile(r".*-(?:addr|address|host|hostname|entity|user|username)")
ELSEWHERE = "..."
"""Stands for the folder, the host or the account that a published text does not name."""


def _is_secret(name: str) -> bool:
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower().lstrip("-")
    return bool(_SECRET_NAME.fullmatch(plain)) and not _NO_SECRET.fullmatch(plain)


def redact(words: Sequence[str]) -> list[str]:
    """Return the words of a command with `***` for every secret.

    A secret is the value of a flag or a variable whose name says so (`--wandb-api-key K`, `HF_TOKEN=K`), what stands
    before the host of an address, or a text of the form in which a service gives out its keys.

    Args:
        words: As in `sys.argv`, one a word.
    """
    shown: list[str] = []
    hiding = False
    for word in words:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            hiding = _is_secret(name) and not equals
            shown.append(f"{name}={HIDDEN}" if equals and _is_secret(name) else hide_secrets(word))
        else:
            shown.append(HIDDEN if hiding else hide_secrets(word))
    return shown


def hide_secrets(text: str) -> str:
    """Return a text with `***` for what `redact` calls a secret inside a word."""
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    shown, place = "", 0
    for named in _NAMED.finditer(text):
        if named.start() >= place and _is_secret(named[1]) and (value := _VALUE.match(text, named.end())):
            shown += text[place : named.end()] + HIDDEN
            place = value.end()
    return _KNOWN.sub(HIDDEN, shown + text[place:])


def without_places(words: Iterable[str]) -> list[str]:
    """Return the words of a command without the folders, hosts and accounts of the machine that ran it.

    `/data/somebody/plan.yaml` becomes `.../plan.yaml`, `https://wandb.example.org/x` becomes `https://.../x`, and the
    value of a flag such as `--master-addr` becomes `...`.
    """
    shown: list[str] = []
    hiding = False
    for word in words:
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            hiding = bool(_OF_PEOPLE_OR_HOSTS.fullmatch(name))
            if hiding and equals:
                word = f"{name}={ELSEWHERE}"
            elif equals:
                word = f"{name}={_elsewhere(value)}"
            shown.append(word)
        else:
            shown.append(ELSEWHERE if hiding else _elsewhere(word))
    return shown


def _elsewhere(value: str) -> str:
    if value.startswith(("/", "~")):  # a path, spaces and all
        return f"{ELSEWHERE}/{value.rstrip('/').rpartition('/')[2]}"
    return hide_folders(_HOST.sub(rf"\1{ELSEWHERE}", value))


def hide_folders(text: str) -> str:
    """Return a text in which `.../name` stands for each absolute path and each path below a home folder."""
    return _PLACE.sub(f"{ELSEWHERE}/", text)
