"""The demo's corpus: three domains of real text that is on every machine that can run it.

`code` are Python files; `reference` are docstrings of *other* files, so that the two do not share documents by
construction, and plain documentation; `packages` are descriptions, readmes and licences of the installed packages.
Files are taken in the order of a hash of their path until a domain's budget is reached, so the corpus is a function of
the environment alone.
"""

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from documents import Document, SourceFile, docstring_documents, find_files, parse_python, read_text, text_pieces
from quality import code_score, novelty, prose_score

__all__ = ["CorpusBudget", "DomainReport", "build_corpus"]


@dataclass(frozen=True, slots=True)
class CorpusBudget:
    """Bytes of text of each domain, and which files count."""

    code: int = 14_000_000
    reference: int = 9_000_000
    packages: int = 6_000_000
    """An upper bound: an ordinary environment holds 2 to 3 MB."""
    shortest: int = 200
    """Characters below which a document is left out."""
    longest_file: int = 60_000
    """Characters above which a Python file is left out: such files are tables."""


@dataclass(frozen=True, slots=True)
class DomainReport:
    """What became of one domain."""

    file: str
    documents: int
    bytes: int
    mean_score: float
    left_out: dict[str, int]
    """Documents or files left out, by reason."""


@dataclass(slots=True)
class _Domain:
    """Documents of one domain up to its budget, without exact duplicates."""

    budget: int
    shortest: int
    documents: list[Document] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    size: int = 0
    seen: set[bytes] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.size >= self.budget

    def accepts(self, document: Document) -> bool:
        """Return whether a document is long enough and new, and count a refusal by reason."""
        digest = hashlib.sha256(document.text.encode()).digest()
        if len(document.text) < self.shortest:
            self.left_out["too short"] += 1
            return False
        if digest in self.seen:
            self.left_out["exact duplicate"] += 1
            return False
        self.seen.add(digest)
        return True

    def keep(self, document: Document, score: float) -> None:
        """Add an accepted document."""
        self.documents.append(document)
        self.scores.append(score)
        self.size += len(document.text.encode())


def build_corpus(output: Path, budget: CorpusBudget, files: Sequence[SourceFile] | None = None) -> list[DomainReport]:
    """Write `code.jsonl`, `reference.parquet` and `packages.jsonl` with columns `text`, `score` and `origin`.

    Args:
        output: Folder to write to; made when missing.
        budget: Sizes.
        files: Files to choose from, in this order; by default all of the environment.

    Returns:
        One report a domain.
    """
    files = find_files() if files is None else files
    output.mkdir(parents=True, exist_ok=True)
    code, reference = _python_domains([file for file in files if file.kind == "python"], budget)
    _add_text_files(reference, (file for file in files if file.kind == "prose"))
    packages = _Domain(budget.packages, budget.shortest)
    _add_text_files(packages, (file for file in files if file.kind == "package"))
    fresh = novelty([document.text for document in packages.documents])
    packages.scores = [score * share for score, share in zip(packages.scores, fresh, strict=True)]
    return [
        _write(code, output / "code.jsonl", _write_jsonl),
        _write(reference, output / "reference.parquet", _write_parquet),
        _write(packages, output / "packages.jsonl", _write_jsonl),
    ]


def _python_domains(files: Sequence[SourceFile], budget: CorpusBudget) -> tuple[_Domain, _Domain]:
    """Fill `code` from the first files and `reference` from the docstrings of those that follow."""
    code = _Domain(budget.code, budget.shortest)
    reference = _Domain(budget.reference, budget.shortest)
    most_code_files = (len(files) + 1) // 2  # a small environment must still feed both domains
    for number, file in enumerate(files):
        domain = code if not code.full and number < most_code_files else reference
        if domain.full:
            break
        text = _usable_text(file, budget.longest_file)
        tree = None if text is None else parse_python(text)
        if text is None or tree is None:
            domain.left_out["unreadable, unparsable or too long file"] += 1
        elif domain is code:
            _add_code(code, Document(text, file.relative), tree)
        else:
            _add_scored_prose(reference, docstring_documents(tree, file.relative))
    return code, reference


def _usable_text(file: SourceFile, longest: int) -> str | None:
    text = read_text(file.path)
    return None if text is None or len(text) > longest else text


def _add_code(domain: _Domain, document: Document, tree: ast.Module) -> None:
    if domain.accepts(document):
        domain.keep(document, code_score(document.text, tree, document.origin))


def _add_scored_prose(domain: _Domain, documents: Iterable[Document]) -> None:
    for document in documents:
        if not domain.full and domain.accepts(document):
            domain.keep(document, prose_score(document.text))


def _add_text_files(domain: _Domain, files: Iterable[SourceFile]) -> None:
    for file in files:
        text = read_text(file.path)
        if text is None:
            domain.left_out["unreadable, unparsable or too long file"] += 1
        else:
            _add_scored_prose(domain, text_pieces(file, text))


def _write(domain: _Domain, path: Path, writer: Callable[[_Domain, Path], None]) -> DomainReport:
    unfinished = path.with_name(path.name + ".tmp")
    writer(domain, unfinished)
    unfinished.replace(path)
    mean = sum(domain.scores) / max(1, len(domain.scores))
    return DomainReport(path.name, len(domain.documents), domain.size, mean, dict(sorted(domain.left_out.items())))


def _write_jsonl(domain: _Domain, path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for document, score in zip(domain.documents, domain.scores, strict=True):
            row = {"text": document.text, "score": score, "origin": document.origin}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(domain: _Domain, path: Path) -> None:
    columns = {
        "text": pa.array([document.text for document in domain.documents], pa.string()),
        "score": pa.array(domain.scores, pa.float64()),
        "origin": pa.array([document.origin for document in domain.documents], pa.string()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=4096, compression="zstd")
