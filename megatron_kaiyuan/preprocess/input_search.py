"""Which files a folder or a glob of `--input` names, and which entries it leaves out.

A linked folder is searched like any other, once. Nothing is passed over in silence: what is left out is listed with
its reason, and a folder that cannot be opened is an unreadable file.
"""

import fnmatch
import glob as globbing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["DOCUMENT_SUFFIXES", "Search", "search"]

DOCUMENT_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4")
OTHER_SUFFIX = "other_suffix"
HIDDEN = "hidden"
SEARCHED_ALREADY = "searched_already"


@dataclass(slots=True)
class Search:
    """The result of a search for input files."""

    files: list[str] = field(default_factory=list)
    """Paths in the order in which they are read."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Entries that are not read, by reason; folders end with a slash."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Folders that cannot be searched, with the reason."""
    folders: list[str] = field(default_factory=list)
    """Every folder that was searched, links followed."""
    behind_links: set[str] = field(default_factory=set)
    """Files that lie behind a linked folder; one that is named otherwise too is read there."""

    def leave_out(self, reason: str, name: str) -> None:
        """Note an entry that is not read."""
        names = self.left_out.setdefault(reason, [])
        if name not in names:
            names.append(name)

    def add(self, other: "Search") -> None:
        """Append the result of another pattern."""
        self.files += other.files
        self.unreadable |= other.unreadable
        self.folders += other.folders
        self.behind_links |= other.behind_links
        for reason, names in other.left_out.items():
            for name in names:
                self.leave_out(reason, name)


def search(pattern: str) -> Search:
    """Return what one path, folder or glob names, which may be nothing.

    A folder is searched for documents, and so is a folder that a glob matches, as it is when the shell expands the
    glob. Hidden entries are left out unless they are named outright, as a shell does.
    """
    found = Search()
    if os.path.isdir(pattern):  # noqa: PTH112
        _search_folders([pattern], found)
    elif os.path.lexists(pattern):
        found.files.append(pattern)
    elif globbing.has_magic(pattern):
        path = Path(pattern)
        parts = path.parts[1:] if path.anchor else path.parts
        names = list(dict.fromkeys(_matches(path.anchor, parts, found)))
        folders = [name for name in names if os.path.isdir(name)]  # noqa: PTH112
        found.files += sorted(set(names) - set(folders))
        _search_folders(folders, found)
    found.files = sorted(set(found.files))
    return found


def is_document_name(name: str) -> bool:
    """Whether a file of a searched folder is read, by its suffix in lower or upper case."""
    name = name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix).endswith(DOCUMENT_SUFFIXES)
    return name.endswith((*DOCUMENT_SUFFIXES, ".parquet"))


def _search_folders(roots: Sequence[str], found: Search) -> None:
    for _, entries, behind_link in _folders(roots, found):
        for entry in entries:
            if entry.name.startswith(".") or _is_folder(entry):
                continue  # folders are noted, or entered, by `_folders`
            name = entry.path.removeprefix("./")
            if not is_document_name(entry.name):
                found.leave_out(OTHER_SUFFIX, name)
                continue
            found.files.append(name)
            if behind_link:
                found.behind_links.add(name)


def _folders(roots: Sequence[str], found: Search) -> Iterator[tuple[str, list[os.DirEntry[str]], bool]]:
    """Yield these folders and those below, with their entries, and whether a link led there.

    Each real folder comes once. What folders hold themselves comes before what they link to.
    """
    searched: set[str] = set()
    own = deque((root, False) for root in roots if not os.path.islink(root) or len(roots) == 1)  # noqa: PTH114
    linked = deque((root, True) for root in roots if (root, False) not in own)
    while own or linked:
        folder, behind_link = own.popleft() if own else linked.popleft()
        real = os.path.realpath(folder)
        if real in searched:
            found.leave_out(SEARCHED_ALREADY, f"{folder.removeprefix('./')}/")
            continue
        searched.add(real)
        found.folders.append(real)
        entries = _entries(folder, found)
        yield folder, entries, behind_link
        for entry in entries:
            is_folder = _is_folder(entry)
            if entry.name.startswith("."):
                name = entry.path.removeprefix("./")
                found.leave_out(HIDDEN, f"{name}/" if is_folder else name)
            elif is_folder and entry.is_symlink():
                linked.append((entry.path, True))
            elif is_folder:
                own.append((entry.path, behind_link))


def _entries(folder: str, found: Search) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        found.unreadable[folder] = error.strerror or str(error)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _matches(base: str, parts: Sequence[str], found: Search) -> Iterator[str]:
    """Paths that a glob matches, with its folders by `_folders`."""
    if not parts:
        yield base or "."
        return
    first, rest = parts[0], parts[1:]
    if first == "**" and not rest:
        yield base or "."
    elif first == "**":
        for folder, _, _ in _folders([base or "."], found):
            yield from _matches(folder if base else folder.removeprefix(".").removeprefix("/"), rest, found)
    elif globbing.has_magic(first):
        for path in _matching_entries(base, first, found):
            yield from _matches(path, rest, found)
    elif os.path.lexists(path := os.path.join(base, first)):  # noqa: PTH118
        yield from _matches(path, rest, found)


def _matching_entries(folder: str, pattern: str, found: Search) -> Iterator[str]:
    if not os.path.isdir(folder or "."):  # noqa: PTH112
        return
    for entry in _entries(folder, found):
        if not fnmatch.fnmatchcase(entry.name, pattern):
            continue
        path = os.path.join(folder, entry.name)  # noqa: PTH118
        if entry.name.startswith(".") and not pattern.startswith("."):
            found.leave_out(HIDDEN, path)
        else:
            yield path
