#!/usr/bin/env python3
"""Text, tokenizer and ranked shards for the quantile studies, from text that is already on this machine.

    .venv/bin/python examples/quantile/prepare.py planted      # for examples/quantile/study.yaml
    .venv/bin/python examples/quantile/prepare.py domains      # for studies/quantile_study.yaml

`planted`: docstrings of the installed packages, in which a share of the words has its letters shuffled. In `graded`
the score falls as that share grows; in `blind` the same kind of text has scores drawn at random. `code` is pieces of
Python files without comments and docstrings, undamaged and with scores drawn at random: a specialist, poor at prose and
the best at code. `clean` and
`clean_code` are never trained on.
`domains`: Python files and docstrings with the demo's own quality scores, as they are.
"""

import argparse
import ast
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples" / "demo"))

from bpe import train_tokenizer  # noqa: E402
from corpus import CorpusBudget, build_corpus  # noqa: E402
from tasks import write_task  # noqa: E402

WORD = re.compile(r"[A-Za-z]{3,}")
MOST_SHUFFLED = 0.9
"""Share of the words whose letters are shuffled in the worst documents."""
CLEAN_EVERY = 12
"""One document in so many is kept clean and held out."""
CODE_BYTES = 9_000_000
PIECE = 1500
"""Characters of a document of code."""


@dataclass(frozen=True, slots=True)
class Row:
    """One document."""

    text: str
    score: float


def main() -> None:
    """Build one of the two corpora."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["planted", "domains"])
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/quantile or runs/quantile_domains")
    parser.add_argument("--megabytes", type=float, help="of docstrings (default 9, or all there are for domains)")
    parser.add_argument("--vocab-size", type=int, help="default 1024, or 8192 for domains")
    args = parser.parse_args()
    planted = args.what == "planted"
    output = args.output or Path("runs/quantile" if planted else "runs/quantile_domains")
    budget = int((args.megabytes or (9 if planted else 60)) * 1e6)
    rows = planted_rows(output, budget) if planted else domain_rows(output, budget)
    vocabulary = args.vocab_size or (1024 if planted else 8192)
    write_shards(output, rows, vocabulary, clean=("clean", "clean_code") if planted else ())


def planted_rows(output: Path, budget: int) -> dict[str, list[Row]]:
    """`graded`, `blind`, `code`, `clean` and `clean_code` documents."""
    sizes = CorpusBudget(code=CODE_BYTES, reference=budget, packages=1)
    _, reference, _ = build_corpus(output / "corpus", sizes)
    if reference.bytes < budget:
        raise SystemExit(
            f"prepare.py: asked for {budget / 1e6:g} MB of docstrings, and the packages of this Python hold "
            f"{reference.bytes / 1e6:.1f} MB; use the environment of `make env`, or give a smaller --megabytes and "
            "lower slices.tokens of the study in proportion"
        )
    found: dict[str, list[Row]] = {"graded": [], "blind": [], "code": [], "clean": [], "clean_code": []}
    chance = random.Random(1234)
    for number, text in enumerate(texts_of(output / "corpus" / "reference.parquet")):
        if number % CLEAN_EVERY == 0:
            found["clean"].append(Row(text, 0.0))
            continue
        quality = chance.random()
        damaged = damage(text, MOST_SHUFFLED * (1.0 - quality), chance)
        name = "graded" if chance.random() < 0.5 else "blind"
        found[name].append(Row(damaged, quality if name == "graded" else chance.random()))
    for number, text in enumerate(texts_of(output / "corpus" / "code.jsonl")):
        # whole files, so that no held-out piece has its sister among those that are trained on
        name = "clean_code" if number % CLEAN_EVERY == 0 else "code"
        found[name] += [Row(piece, chance.random()) for piece in pieces(without_prose(text))]
    return found


def without_prose(text: str) -> str:
    """A Python file without its comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def pieces(text: str) -> list[str]:
    """Return a file in runs of lines of about `PIECE` characters, without short rests."""
    found, lines = [], []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= PIECE:
            found.append("".join(lines))
            lines = []
    return found


def damage(text: str, share: float, chance: random.Random) -> str:
    """The text with the letters of this share of its words in random order."""

    def change(match: re.Match[str]) -> str:
        letters = list(match.group())
        if chance.random() < share:
            chance.shuffle(letters)
        return "".join(letters)

    return WORD.sub(change, text)


def domain_rows(output: Path, budget: int) -> dict[str, list[Row]]:
    """`code`, `reference` and `packages` with the demo's scores."""
    build_corpus(output / "corpus", CorpusBudget(code=30_000_000, reference=budget, packages=4_000_000))
    files = {"code": "code.jsonl", "reference": "reference.parquet", "packages": "packages.jsonl"}
    return {name: list(scored_rows(output / "corpus" / file)) for name, file in files.items()}


def texts_of(path: Path) -> Iterator[str]:
    """Column `text` of a corpus file."""
    return (row.text for row in scored_rows(path))


def scored_rows(path: Path) -> Iterator[Row]:
    """Documents of a corpus file with their scores."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["text", "score"])
        yield from (Row(*pair) for pair in zip(*(table[name].to_pylist() for name in ("text", "score")), strict=True))
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            yield Row(row["text"], row["score"])


def write_shards(output: Path, rows: Mapping[str, list[Row]], vocabulary: int, clean: Sequence[str]) -> None:
    """Tokenizer, shards and rank indexes through the tools that a user would run."""
    train_on = [row for name in clean or rows for row in rows[name]]
    train_tokenizer((row.text for row in train_on), output / "tokenizer", vocabulary)
    for name, some in rows.items():
        write_jsonl(output / "text" / f"{name}.jsonl", some)
        shard = output / "shards" / name
        shard.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", output / "tokenizer"]
        paths = ["--input", output / "text" / f"{name}.jsonl", "--output-prefix", shard]
        tool("preprocess_data.py", *paths, *tokenizer, "--score-key", "score", "--append-eod", "--overwrite")
        if name not in clean:
            tool("rank_data.py", f"{shard}_text_document", "--score", "score")
        tokens = Path(f"{shard}_text_document.bin").stat().st_size // 2
        print(f"{name}: {len(some):,} documents, {tokens:,} tokens")
    if clean:
        write_task(output / "tasks", [row.text for row in rows[clean[0]]])


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One document a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": row.text, "score": row.score}) + "\n" for row in rows)


def tool(name: str, *arguments: object) -> None:
    """Run one of the tools, and show its output when it fails."""
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{name} failed:\n{finished.stdout}{finished.stderr}")


if __name__ == "__main__":
    main()
