"""What one run of the shard builder is asked to do."""

from dataclasses import dataclass
from typing import Literal

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.preprocess.inputs import STDIN
from megatron_kaiyuan.preprocess.readers import BLOCK_BYTES
from megatron_kaiyuan.shards.tokenizer import TokenizerConfig

__all__ = ["SHARD_BYTES", "PreprocessConfig"]

SHARD_BYTES = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """One run of the shard builder."""

    inputs: tuple[str, ...]
    """Files, globs, directories; or `-` alone, for standard input."""
    tokenizer: TokenizerConfig
    output_prefix: str | None = None
    """One shard for each text key, `<output_prefix>_<key>_document`; or else `output_dir`."""
    output_dir: str | None = None
    """A folder of many shards, which is a source as it is: `<output_dir>/shard_00000_<key>_document`, and so on."""
    shard_bytes: int = SHARD_BYTES
    """Input of one shard of `output_dir`, in bytes on disk."""
    num_tasks: int = 1
    """So many processes, on any machines, share the shards of `output_dir`; task k builds each num_tasks-th one."""
    task_id: int = 0
    json_keys: tuple[str, ...] = ("text",)
    score_keys: tuple[str, ...] = ()
    id_key: str | None = None
    append_eod: bool = False
    workers: int = 1
    """1 works in this process; more start that many others."""
    on_error: Literal["stop", "skip"] = "stop"
    max_document_tokens: int | None = None
    """Longer documents (without the end-of-document id) follow `on_error`; None: no limit."""
    backend: Literal["auto", "reference"] = "auto"
    """auto: gigatoken where it gives the same ids; reference: never."""
    overwrite: bool = False
    """Replace what another command left under the names of the output."""
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        _check_keys(self)
        _check_output(self)
        limits = {"--workers": self.workers, "--max-document-tokens": self.max_document_tokens}
        limits |= {"--shard-size": self.shard_bytes, "--num-tasks": self.num_tasks}
        for flag, value in limits.items():
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value}: must be at least 1")
        if not 0 <= self.task_id < self.num_tasks:
            raise ConfigError(f"--task-id {self.task_id}: must lie in [0, {self.num_tasks}), by --num-tasks")


def _check_keys(config: PreprocessConfig) -> None:
    if not config.json_keys:
        raise ConfigError("--json-keys: name at least one field that holds text")
    for flag, keys in (("--json-keys", config.json_keys), ("--score-key", config.score_keys)):
        if len(set(keys)) != len(keys):
            raise ConfigError(f"{flag} {' '.join(keys)}: a key is given twice; give each once")
        for key in keys:
            if not key or "/" in key or "\0" in key:
                raise ConfigError(
                    f"{flag} {key!r}: the key becomes part of a file name and cannot hold '/' or be empty"
                )


def _check_output(config: PreprocessConfig) -> None:
    paths = {"--output-prefix": (config.output_prefix,), "--output-dir": (config.output_dir,), "--input": config.inputs}
    for flag, given in paths.items():
        if "" in given:
            raise ConfigError(f"{flag} '': names nothing; give a path (is a variable of the command unset?)")
    if (config.output_prefix is None) == (config.output_dir is None):
        raise ConfigError("give one of --output-prefix (one shard) and --output-dir (a folder of shards)")
    if config.output_dir is not None:
        if STDIN in config.inputs:
            raise ConfigError("--input -: standard input cannot be read twice or cut; give --output-prefix, or files")
    elif config.num_tasks > 1:
        raise ConfigError(f"--num-tasks {config.num_tasks}: tasks share a folder of shards; give --output-dir")
