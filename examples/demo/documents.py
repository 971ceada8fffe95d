"""Documents of the demo: what Python and its installed packages say about themselves, without a download."""

import ast
import hashlib
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Document", "SourceFile", "docstring_documents", "find_files", "parse_python", "read_text", "text_pieces"]

_PACKAGE_FILE = re.compile(
    r"(metadata|licen[cs]e|copying|notice|authors|readme|changelog|changes|news|history|contributing|third)",
    re.IGNORECASE,
)
_PROSE_SUFFIXES = frozenset({".rst", ".md", ".txt"})
_NOT_PROSE = frozenset({"top_level.txt", "entry_points.txt", "sources.txt", "requires.txt", "cmakelists.txt"})
_PIECE_CHARACTERS = 6000
"""Longest piece of a text file that is one document: the licences of all the parts of a package can be one file."""
_SHORTEST_DOCSTRING = 200
"""Characters; shorter docstrings say little that the name does not."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the environment."""

    path: Path
    relative: str
    """Path below its root, with forward slashes: the same on every machine."""
    kind: str
    """`python`, `package` (descriptions, licences, readmes) or `prose` (other documentation)."""

    @property
    def order_key(self) -> bytes:
        """Position in the seeded order in which files are taken: a hash of the relative path."""
        return hashlib.sha256(self.relative.encode()).digest()


@dataclass(frozen=True, slots=True)
class Document:
    """One document before scoring."""

    text: str
    origin: str
    """Relative path of its file, and `:name` of the definition for docstrings."""


def find_files() -> list[SourceFile]:
    """Files of the standard library and of site-packages, in a fixed pseudo-random order."""
    paths = sysconfig.get_paths()
    roots = dict.fromkeys(Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib"))
    found = {file.relative: file for root in roots for file in _walk(root)}
    return sorted(found.values(), key=lambda file: file.order_key)


def _walk(root: Path) -> Iterator[SourceFile]:
    for directory, children, names in os.walk(root):
        nested = ("__pycache__", "site-packages", "dist-packages")
        children[:] = sorted(child for child in children if child not in nested)
        for name in names:
            kind = _kind_of(name)
            if kind is not None and "__editable__" not in name:
                path = Path(directory, name)
                yield SourceFile(path, path.as_posix().removeprefix(f"{root.as_posix()}/"), kind)


def _kind_of(name: str) -> str | None:
    stem, dot, ending = name.lower().rpartition(".")
    stem, suffix = (stem, dot + ending) if stem else (ending, "")
    if suffix == ".py":
        return "python"
    if suffix in ("", *_PROSE_SUFFIXES) and _PACKAGE_FILE.match(stem):
        return "package"
    if suffix in _PROSE_SUFFIXES and name.lower() not in _NOT_PROSE:
        return "prose"
    return None


def read_text(path: Path) -> str | None:
    """Text of a UTF-8 file with Unix line ends, None when it is something else."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def parse_python(source: str) -> ast.Module | None:
    """Syntax tree of a file, None when this Python cannot parse it (test data holds such files)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def docstring_documents(tree: ast.Module, relative: str) -> Iterator[Document]:
    """One document for the module's docstring, and one for each definition with a docstring worth reading."""
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name, node in _named_nodes(tree, module):
        docstring = ast.get_docstring(node, clean=True)
        if docstring is None or len(docstring) < _SHORTEST_DOCSTRING:
            continue
        head = f"module {name}" if isinstance(node, ast.Module) else _signature(node, name)
        yield Document(f"{head}\n\n{textwrap.indent(docstring, '    ')}\n", f"{relative}:{name}")


def _named_nodes(
    tree: ast.Module, module: str
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    yield module, tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.{member.name}", member


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{name}({ast.unparse(node.args)}){result}"


def text_pieces(file: SourceFile, text: str) -> Iterator[Document]:
    """Yield a text file as documents of at most about 6000 characters, cut at empty lines.

    Headers of METADATA are left out.
    """
    if file.path.name.upper() == "METADATA":
        text = text.partition("\n\n")[2]
    piece: list[str] = []
    number = size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        if piece and size + len(paragraph) > _PIECE_CHARACTERS:
            yield Document("\n\n".join(piece).strip("\n") + "\n", f"{file.relative}:{number}")
            piece, size, number = [], 0, number + 1
        piece.append(paragraph)
        size += len(paragraph)
    yield Document("\n\n".join(piece).strip("\n") + "\n", f"{file.relative}:{number}")
