"""What lies under the final names of a shard: whole, of which build, and how it is taken away."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from megatron_kaiyuan.errors import ConfigError, ShardError
from megatron_kaiyuan.preprocess.partial import list_partials, partial_path
from megatron_kaiyuan.shards.manifest import Manifest, load_manifest, manifest_path

__all__ = ["is_complete", "is_of_build", "refuse_existing", "remove_existing", "retire"]


def is_of_build(prefix: str, build: str | None) -> bool:
    """Whether what lies under the final names of `prefix` was put there by this very command.

    The manifest tells, or, where a kill came between two renames, the partial manifest that was written before them.
    """
    if build is None:
        return False
    if manifest_path(prefix).exists():
        try:
            return load_manifest(prefix).build == build
        except ShardError:
            return False
    for path in list_partials(prefix):
        if ".manifest." in path.name:
            try:
                if Manifest.model_validate_json(path.read_bytes()).build == build:
                    return True
            except (ValidationError, FileNotFoundError):  # torn while it was written: nothing was renamed yet
                continue
    return False


def is_complete(prefix: str, build: str) -> bool:
    """Whether the shard of this build is there: its manifest, and every file with the size that it tells."""
    try:
        manifest = load_manifest(prefix)
    except ShardError:
        return False
    folder = manifest_path(prefix).parent
    return manifest.build == build and all(
        (path := folder / file.name).is_file() and path.stat().st_size == file.bytes for file in manifest.files.values()
    )


def refuse_existing(prefix: str, score_keys: Sequence[str] = ()) -> None:
    """Raise ConfigError if any final file of the shard `prefix` exists."""
    names = [f"{prefix}.bin", f"{prefix}.idx", *(f"{prefix}.scores.{key}.npy" for key in score_keys)]
    for path in [*map(Path, names), manifest_path(prefix)]:
        if path.exists():
            whole = "" if manifest_path(prefix).exists() else " (without a manifest: interrupted, or another tool's)"
            raise ConfigError(
                f"output: {path} exists{whole} and comes from other input, other flags or another tool; give "
                "--overwrite to replace this shard, or another output"
            )


def retire(prefix: str, keep: Callable[[Manifest], bool]) -> bool:
    """Take a whole shard out of sight unless `keep`; whether it went. Other tasks may be at work on it meanwhile.

    Only its manifest is certain to go: without it the folder counts as unfinished. The manifest is moved before it is
    judged, so one that another task publishes at this moment is seen, and put back. Where somebody has partial files
    of the shard, what else lies under its names is theirs to replace.
    """
    manifest = manifest_path(prefix)
    if not manifest.exists() or _is_kept(manifest, keep):
        return False
    busy = bool(list_partials(prefix))
    taken = partial_path(manifest)
    try:
        manifest.rename(taken)
    except FileNotFoundError:  # another task was faster
        return False
    if _is_kept(taken, keep):
        taken.rename(manifest)
        return False
    taken.unlink()
    if not busy:
        remove_existing(prefix)
    return True


def _is_kept(manifest: Path, keep: Callable[[Manifest], bool]) -> bool:
    """A manifest that is damaged is not; one that has just gone is nobody's to take."""
    try:
        return keep(Manifest.model_validate_json(manifest.read_bytes()))
    except FileNotFoundError:
        return True
    except ValidationError:
        return False


def remove_existing(prefix: str) -> None:
    """Remove a shard; manifest and index go first, so that no reader can open a mixture of the old and the new one."""
    manifest_path(prefix).unlink(missing_ok=True)
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    name = re.escape(Path(prefix).name)
    for path in Path(prefix).parent.iterdir():
        # a score key or an id key of the earlier run may not be written again
        if re.fullmatch(rf"{name}\.(bin|documents\.parquet|scores\..+\.npy)", path.name):
            path.unlink(missing_ok=True)
