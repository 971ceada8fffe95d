"""Text and shards of the curriculum study: real text, part of it damaged by a known amount, and scores that know of it.

`collect` runs where the packages are: Python files and docstrings of the environment, undamaged, and a tokenizer, in a
folder small enough to carry to a GPU. `build` runs where training does: it damages, scores and tokenizes, the same
everywhere, because every random choice is keyed by the number of a document.

A document has a quality drawn evenly from [0, 1]; of its words, `MOST_SHUFFLED x (1 - quality)` have their letters in
random order. Seed `s` of the study ranks by `noisy_s`, the quality with noise of its own (a scorer that errs), or by
`lot_s`, a lot. Held-out text comes from other folders of the environment and is never damaged.
"""

import hashlib
import json
import lzma
import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.documents.rank_index import index_path, write_rank_index
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.shards.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "demo"), str(ROOT / "examples" / "quantile")]

from bpe import train_tokenizer  # noqa: E402
from documents import SourceFile, docstring_documents, find_files, parse_python, read_text, text_pieces  # noqa: E402
from prepare import MOST_SHUFFLED, damage, tool  # noqa: E402

__all__ = ["DOMAINS", "SEEDS", "StudyData", "build", "collect", "open_data"]

DOMAINS = ("code", "prose")
SEEDS = tuple(range(1, 6))
"""Seeds that shards carry scores for."""
SCORE_NOISE = 0.1
"""Standard deviation of what a scorer errs by, beside qualities between 0 and 1."""
HELD_OUT_ONE_IN = 14
"""One folder in so many is held out, with everything in it."""
LONGEST_FILE, SHORTEST_DOCUMENT = 60_000, 200
"""Characters; longer files are tables, shorter documents say nothing."""
TOKENIZER_BYTES = 16_000_000
"""Text that the tokenizer is trained on, at most."""
_CHUNK = 256
_CORPUS = "corpus.jsonl.xz"


@dataclass(frozen=True, slots=True)
class StudyData:
    """Shards, ready to train on."""

    shards: Path
    tokenizer: Path
    digest: str
    """Of the text, the tokenizer and the way both become shards."""
    tokens: dict[str, int]
    """Trained on, by domain."""
    rank_correlation: float
    """Spearman's, of quality and the first seed's score."""

    @property
    def total_tokens(self) -> int:
        """Of all domains."""
        return sum(self.tokens.values())


@dataclass(slots=True)
class _Collected:
    """Documents so far."""

    megabytes: dict[str, float]
    size: Counter[str] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)
    rows: list[tuple[str, str]] = field(default_factory=list)

    def full(self, kind: str) -> bool:
        """Whether a kind has what it may take."""
        domain = kind.removeprefix("clean_")
        share = 1.0 / HELD_OUT_ONE_IN if kind != domain else 1.0
        return self.size[kind] >= self.megabytes[domain] * 1e6 * share

    def add(self, kind: str, text: str) -> None:
        """Keep a document that is new, long enough and within what its kind may take."""
        key = hashlib.sha256(text.encode()).digest()
        if self.full(kind) or key in self.seen or len(text) < SHORTEST_DOCUMENT:
            return
        self.seen.add(key)
        self.size[kind] += len(text.encode())
        self.rows.append((kind, text))


def collect(
    folder: Path, megabytes: dict[str, float], vocab_size: int, files: Sequence[SourceFile] | None = None
) -> dict[str, int]:
    """Write the undamaged text and a tokenizer.

    Args:
        folder: Receives `corpus.jsonl.xz` and `tokenizer/`.
        megabytes: Of each domain, at most; held-out text comes on top.
        vocab_size: Of the tokenizer.
        files: Where the text is from; by default the environment of this Python.

    Returns:
        Bytes of `code`, `prose`, `clean_code` and `clean_prose`.
    """
    found = _Collected(megabytes)
    for file in find_files() if files is None else files:
        kind = _kind_of(file)
        for text in () if found.full(kind) else _texts_of(file, kind):
            found.add(kind, text)
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(_tokenizer_text(found.rows), folder / "tokenizer", vocab_size)
    unfinished = folder / f"{_CORPUS}.tmp"
    with lzma.open(unfinished, "wt", encoding="utf-8", preset=6) as stream:
        stream.writelines(json.dumps([kind, text], ensure_ascii=False) + "\n" for kind, text in found.rows)
    unfinished.replace(folder / _CORPUS)
    return dict(found.size)


def _kind_of(file: SourceFile) -> str:
    """A folder is held out as a whole, and its Python files feed either code or docstrings."""
    lot = int.from_bytes(hashlib.sha256(str(Path(file.relative).parent).encode()).digest()[:8])
    prefix = "clean_" if lot % HELD_OUT_ONE_IN == 0 else ""
    return prefix + ("code" if file.kind == "python" and lot // HELD_OUT_ONE_IN % 2 else "prose")


def _texts_of(file: SourceFile, kind: str) -> Iterator[str]:
    """The documents of a file."""
    text = read_text(file.path)
    if text is None:
        return
    if file.kind != "python":
        yield from (piece.text for piece in text_pieces(file, text))
        return
    tree = parse_python(text) if len(text) <= LONGEST_FILE else None
    if tree is None:
        return
    if kind.endswith("code"):
        yield text
    else:
        yield from (piece.text for piece in docstring_documents(tree, file.relative))


def _tokenizer_text(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Undamaged text of the trained-on documents, as much of each domain."""
    size: Counter[str] = Counter()
    for kind, text in rows:
        if kind in DOMAINS and size[kind] < TOKENIZER_BYTES / len(DOMAINS):
            size[kind] += len(text.encode())
            yield text


def build(carried: Path, folder: Path, workers: int) -> StudyData:
    """Damage, score, tokenize and rank.

    What is there already is used.

    Args:
        carried: What `collect` wrote.
        folder: Receives `text/` and `shards/`.
        workers: Processes.

    Raises:
        StudyError: `carried` is empty, or `folder` holds shards of other text.
    """
    if not (carried / _CORPUS).is_file():
        raise StudyError(f"{carried / _CORPUS}: no such file; run with --collect first, on a machine with the packages")
    digest = _digest(carried)
    stamp = folder / "data.json"
    if stamp.is_file():
        return open_data(carried, folder)
    correlation = _write_text(carried, folder / "text", workers)
    for name in [*DOMAINS, *(f"clean_{domain}" for domain in DOMAINS)]:
        _write_shards(carried / "tokenizer", folder, name, workers)
    tokens = {domain: load_manifest(str(_prefix(folder, domain))).tokens for domain in DOMAINS}
    told = {"digest": digest, "tokens": tokens, "rank_correlation": correlation}
    write_text_atomically(stamp, json.dumps(told, indent=1) + "\n")
    return open_data(carried, folder)


def open_data(carried: Path, folder: Path) -> StudyData:
    """Shards that `build` wrote.

    Raises:
        StudyError: they are of other text.
    """
    told = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    if told["digest"] != _digest(carried):
        raise StudyError(f"{folder}: holds shards of other text than {carried}; remove it, or name another --output")
    return StudyData(folder / "shards", carried / "tokenizer", told["digest"], told["tokens"], told["rank_correlation"])


def _prefix(folder: Path, name: str) -> Path:
    return folder / "shards" / f"{name}_text_document"


def _digest(carried: Path) -> str:
    """Of everything that the shards follow from."""
    total = hashlib.sha256(f"{MOST_SHUFFLED} {SCORE_NOISE} {SEEDS}".encode())
    for path in (carried / _CORPUS, carried / "tokenizer" / "tokenizer.json"):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _write_text(carried: Path, folder: Path, workers: int) -> float:
    """Write one JSONL file a kind, and return the rank correlation of quality and score."""
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(carried / _CORPUS, "rt", encoding="utf-8") as stream:
        rows = [(number, *json.loads(line)) for number, line in enumerate(stream)]
    streams = {kind: (folder / f"{kind}.jsonl").open("w", encoding="utf-8") for kind in {row[1] for row in rows}}
    pairs = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for kind, line in pool.imap(_finished_row, rows, chunksize=_CHUNK):
            streams[kind].write(line + "\n")
            row = json.loads(line) if kind in DOMAINS and len(pairs) < 20_000 else None
            if row is not None:
                pairs.append((row["quality"], row[f"noisy_{SEEDS[0]}"]))
    for stream in streams.values():
        stream.close()
    ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0)
    return float(np.corrcoef(ranks[:, 0], ranks[:, 1])[0, 1])


def _finished_row(row: tuple[int, str, str]) -> tuple[str, str]:
    """Kind and JSON line of a document: damaged and scored, or as it is if it is held out."""
    number, kind, text = row
    if kind not in DOMAINS:
        return kind, json.dumps({"text": text})
    chance = random.Random(f"damage {number}")
    quality = chance.random()
    scores: dict[str, object] = {"text": damage(text, MOST_SHUFFLED * (1.0 - quality), chance), "quality": quality}
    for seed in SEEDS:
        own = random.Random(f"score {seed} {number}")
        scores |= {f"noisy_{seed}": quality + own.gauss(0.0, SCORE_NOISE), f"lot_{seed}": own.random()}
    return kind, json.dumps(scores)


def _write_shards(tokenizer: Path, folder: Path, name: str, workers: int) -> None:
    """Through the tool that a user would run."""
    keys = [f"{what}_{seed}" for what in ("noisy", "lot") for seed in SEEDS] if name in DOMAINS else []
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    paths = ["--input", folder / "text" / f"{name}.jsonl", "--output-prefix", folder / "shards" / name]
    how = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod", "--overwrite"]
    scores = ["--score-key", *keys] if keys else []
    tool("preprocess_data.py", *paths, *how, *scores, "--workers", workers)
    source = open_source(name, [str(_prefix(folder, name))])
    for key in keys:  # not through the tool: it would take longer to start than to rank
        write_rank_index(source, key, index_path(source, key))
