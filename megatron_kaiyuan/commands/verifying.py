"""The look at a checkpoint before a command reads it, with its progress."""

import sys
from pathlib import Path

from megatron_kaiyuan.checkpoints.damage import Verified, Verifier, verify
from megatron_kaiyuan.host.cli import say
from megatron_kaiyuan.reporting.progress import ConsoleMeter

__all__ = ["shown_on"]


def shown_on(meter: ConsoleMeter) -> Verifier:
    """Return a verifier that shows its progress, and says when a checkpoint has no checksums."""

    def look(folder: Path) -> Verified:
        files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        meter.start(f"verifying {folder.name}", sum(path.stat().st_size for path in files))
        found = verify(folder, meter.advance)
        if found.damage is None and not found.files:
            say(f"{folder} is {found}", file=sys.stderr)
        return found

    return look
