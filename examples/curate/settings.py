"""The settings of a curation run.

They need nothing but Python, so they can be checked anywhere.
"""

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CurationSettings", "parse_arguments"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurationSettings:
    """One corpus from JSONL to shards."""

    input: Path
    output: Path
    tokenizer: Path
    classifier: str
    """`fasttext` or `huggingface`."""
    model: str
    """fastText `.bin`, or a Hugging Face model with one output or one label for good text."""
    label: str
    """fastText: the label whose probability is the score."""
    language: str
    """Splits words for the n-grams, as datatrove names it (`eng`, `zho`)."""
    tasks: int
    """Pieces of each stage; a local run does them one after another on `workers` processes."""
    workers: int
    executor: str
    """`local` or `slurm`."""
    partition: str
    qos: str | None
    """None: the cluster's default."""
    time: str
    project_python: str
    """Interpreter in which megatron_kaiyuan is installed; datatrove lives in another environment."""
    permutations: int = 128
    bands: int = 14
    rows_per_band: int = 9
    n_grams: int = 5
    """MinHash as in the Kaiyuan-2B paper: 14 bands of 9 rows use 126 of the 128 permutations."""

    def __post_init__(self) -> None:
        if self.bands * self.rows_per_band > self.permutations:
            raise ValueError(
                f"--bands {self.bands} x --rows-per-band {self.rows_per_band} needs more than the {self.permutations} "
                "permutations; lower one of them"
            )
        if self.classifier not in ("fasttext", "huggingface"):
            raise ValueError(f"--classifier {self.classifier}: choose fasttext or huggingface")

    @property
    def threshold(self) -> float:
        """Return the Jaccard similarity near which pairs begin to be detected, (1 / bands) ^ (1 / rows)."""
        return float((1 / self.bands) ** (1 / self.rows_per_band))

    def probability(self, similarity: float) -> float:
        """Return how likely a pair of this Jaccard similarity is detected."""
        return float(1 - (1 - similarity**self.rows_per_band) ** self.bands)

    def folder(self, stage: str) -> str:
        """Where a stage writes."""
        return str(self.output / stage)

    def complaints(self) -> list[str]:
        """What is missing for a run, before hours of it are spent."""
        found = []
        if not any(self.input.glob("**/*.jsonl*")):
            found.append(f"--input {self.input}: holds no .jsonl or .jsonl.gz; give the folder of the raw text")
        if not (self.tokenizer / "tokenizer.json").is_file():
            found.append(
                f"--tokenizer {self.tokenizer}: holds no tokenizer.json; give a Hugging Face tokenizer's folder"
            )
        if self.classifier == "fasttext" and not Path(self.model).is_file():
            found.append(f"--model {self.model}: no such file; give a fastText model, or --classifier huggingface")
        if not _has_our_package(self.project_python):
            found.append(
                f"--project-python {self.project_python}: cannot import megatron_kaiyuan; give the interpreter of the "
                "environment that `make env` prepared, such as .venv/bin/python"
            )
        return found


def _has_our_package(python: str) -> bool:
    try:
        return (
            subprocess.run([python, "-c", "import megatron_kaiyuan"], capture_output=True, check=False).returncode == 0
        )
    except OSError:
        return False


def parse_arguments(argv: list[str] | None = None) -> CurationSettings:
    """Flags of curate.py."""
    parser = argparse.ArgumentParser(description="JSONL to deduplicated, scored shards, on datatrove.")
    parser.add_argument("--input", type=Path, required=True, help="folder of .jsonl or .jsonl.gz with a field text")
    parser.add_argument("--output", type=Path, required=True, help="folder; the shards go to its shards/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer.json")
    parser.add_argument("--classifier", choices=["fasttext", "huggingface"], default="fasttext")
    parser.add_argument("--model", required=True, help="fastText .bin, or a Hugging Face model")
    parser.add_argument("--label", default="__label__hq", help="fastText label of good text (default: __label__hq)")
    parser.add_argument("--language", default="eng", help="splits words for the n-grams (default: eng)")
    parser.add_argument("--tasks", type=int, default=8, help="pieces of each stage (default: 8)")
    parser.add_argument("--workers", type=int, default=2, help="processes of a local run, tasks at once of a Slurm one")
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument("--partition", default="cpu", help="Slurm partition (default: cpu)")
    parser.add_argument("--qos", help="Slurm quality of service (default: the cluster's)")
    parser.add_argument("--time", default="12:00:00", help="Slurm time limit of a task (default: 12:00:00)")
    parser.add_argument("--project-python", default="python", help="interpreter that has megatron_kaiyuan")
    try:
        return CurationSettings(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))
