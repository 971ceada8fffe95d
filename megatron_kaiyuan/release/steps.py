"""The commands of a release as words: what preprocessed, trained and averaged."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["average_command", "preprocess_commands", "train_command"]


def preprocess_commands(source: Mapping[str, Any], name: str, seed: int) -> list[list[str]]:
    """Return the commands that make the shards of a source, and its rank index where it is scored.

    Args:
        source: Facts of it; its shards have manifests.
        name: Of the source.
        seed: Of the plan.
    """
    tokenizer, score = source["tokenizer"], source["score"]
    words = ["kaiyuan", "preprocess", "--input", *source["inputs"], "--output-prefix", f"{name}/{name}"]
    words += ["--json-keys", *source["json_keys"], "--tokenizer-type", tokenizer["type"]]
    words += [] if tokenizer["model"] is None else ["--tokenizer-model", tokenizer["model"]]
    words += ["--score-key", score] if score else []
    words += ["--append-eod"] if True in source["append_eod"] else []
    ranks = ["kaiyuan", "rank", name, "--score", score or "", "--seed", str(seed)]
    return [words, *([ranks] if score else [])]


def train_command(flags: Sequence[str]) -> list[list[str]]:
    """Return the command of a start, as one command for `bash`."""
    return [["torchrun", "...", "-m", "megatron_kaiyuan.pretrain", *flags]]


def average_command(average: Mapping[str, Any]) -> list[list[str]]:
    """Return the command that makes an average again, from its manifest."""
    members = [str(member["iteration"]) for member in average["checkpoints"]]
    words = ["kaiyuan", "average", "SAVE", "--weights", average["weights"]]
    return [[*words, "--iterations", *members, "--output", "AVERAGED"]]
