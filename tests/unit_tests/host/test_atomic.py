"""What is renamed is on disk: its content before the name changes, and the name at the end."""

import ast
import errno
import os
from pathlib import Path

import pytest

from megatron_kaiyuan.host.atomic import (
    atomic_file,
    folder_appearing_whole,
    publish_folder,
    rename_durably,
    sync_folder,
    write_text_atomically,
)

PACKAGE = Path(__file__).parents[3] / "megatron_kaiyuan"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every `fsync` and `rename` in order, each with the path that it concerns."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        seen.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        seen.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return seen


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    write_text_atomically(tmp_path / "new" / "name", "text")
    (first, temporary), *rest = calls
    assert (first, temporary[:6]) == ("fsync", ".name.")
    assert rest == [("rename", "name"), ("fsync", "new")]


def test_a_rename_syncs_both_folders(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from" / "file").write_text("text")
    assert rename_durably(tmp_path / "from" / "file", tmp_path / "to" / "file").read_text() == "text"
    assert calls == [("rename", "file"), ("fsync", "to"), ("fsync", "from")]


def test_a_folder_is_published_with_its_files_on_disk(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("a", "b"):
        (unfinished / name).write_text("text")
    publish_folder(unfinished, tmp_path / "final")
    assert sorted(calls[:2]) == [("fsync", "a"), ("fsync", "b")]
    assert calls[2:] == [("fsync", "unfinished"), ("rename", "final"), ("fsync", tmp_path.name)]


def test_a_file_whose_data_cannot_be_synced_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"), atomic_file(tmp_path / "name") as stream:
        stream.write(b"data")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_does_not_sync_folders_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)


def test_nothing_in_the_package_is_renamed_in_another_way() -> None:
    """A rename elsewhere would be lost in a power failure: `Path.rename`, `Path.replace` and their kin in `os`."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "host" / "atomic.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and renames(node)
    ]
    assert found == []


def renames(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("rename", "replace", "renames", "move"):
        return False
    owner = ast.unparse(call.func.value)
    if owner in ("os", "shutil"):
        return True
    return owner != "dataclasses" and len(call.args) == 1 and not call.keywords  # text.replace has two


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("path.rename(target)", True),
        ("path.replace(target)", True),
        ("os.replace(path, target)", True),
        ("shutil.move(path, target)", True),
        ("text.replace('a', 'b')", False),
        ("dataclasses.replace(value)", False),
    ],
)
def test_the_search_for_renames_finds_them(code: str, expected: bool) -> None:  # noqa: FBT001
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert renames(call) is expected


def test_a_new_folder_appears_whole_and_removes_nothing_of_others(tmp_path: Path) -> None:
    beside = tmp_path / ".model.unfinished"
    beside.mkdir()
    (beside / "notes.txt").write_text("of somebody else")
    with folder_appearing_whole(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text("whole")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model/weights").read_text() == "whole"
    assert (beside / "notes.txt").read_text() == "of somebody else"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.unfinished", "model"]


def test_a_folder_that_fails_leaves_nothing_and_a_taken_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), folder_appearing_whole(tmp_path / "model") as unfinished:
        (unfinished / "missing/half").write_text("x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError), folder_appearing_whole(tmp_path / "link"):
        pass
    with pytest.raises(FileExistsError), folder_appearing_whole(tmp_path / "late") as unfinished:
        (tmp_path / "late").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "link"]
