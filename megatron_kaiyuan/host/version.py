"""Which code this is: the version, and the commit it was taken from."""

import contextlib
import subprocess
from functools import cache
from pathlib import Path

from megatron_kaiyuan import __version__

__all__ = ["code_commit", "code_version"]

PACKAGE = Path(__file__).resolve().parents[1]
RECORD = "commit.txt"
"""Beside the package's `__init__.py`; setup.py writes it into what is installed, where there is no git any more."""


@cache
def code_commit(package: Path = PACKAGE) -> str | None:
    """Return the commit of the code in 12 hexadecimal digits, with `-dirty` after it where tracked files were changed.

    None: neither the record of an installation nor a checkout with git says it.
    """
    with contextlib.suppress(OSError):
        return (package / RECORD).read_text(encoding="ascii").strip()
    checkout = package.parent
    if not (checkout / ".git").exists():  # a file in a worktree
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


def code_version() -> str:
    """Return the version with its commit, such as `0.1.0 (commit 0123456789ab)`."""
    return f"{__version__} (commit {code_commit() or 'unknown'})"
