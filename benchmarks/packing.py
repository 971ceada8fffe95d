"""Results of a machine that keeps nothing: packed again whenever there is one more, and whole at any time."""

import tarfile
from collections.abc import Iterable
from pathlib import Path

from megatron_kaiyuan.host.atomic import atomic_file

__all__ = ["pack"]


def pack(archive: Path, folder: Path, files: Iterable[Path]) -> None:
    """Put the files that exist into one compressed archive, under their paths below `folder`."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(archive) as stream, tarfile.open(fileobj=stream, mode="w:gz") as packed:
        for path in sorted(set(files)):
            if path.is_file():
                packed.add(path, str(path.relative_to(folder)))
