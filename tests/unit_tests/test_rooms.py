"""Hold the house together: which room may import which, no circles, few files a room, the tree in the README."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_kaiyuan"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MOST_FILES = 25
FREE = {"errors", "__init__", "__main__"}
"""Modules that every room may import."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_modules(tree: ast.AST) -> set[str]:
    """Names below the package that a file imports, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_kaiyuan"):
            inner = (node.module or "").removeprefix("megatron_kaiyuan").removeprefix(".")
            for alias in node.names:
                full = f"{inner}.{alias.name}".lstrip(".")
                names.add(full if full in MODULES else inner)
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("megatron_kaiyuan.") for a in node.names if a.name.startswith("megatron_kai")}
    return names - {""}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return {name: imported_modules(ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}


def allowed() -> dict[str, set[str]]:
    """The table of CONTRIBUTING.md, section Layout: of each room the rooms that it may import."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|[^|]*\| ([^|]*) \|", text, flags=re.MULTILINE)
    table = {room: set(re.findall(r"\w+", may)) for room, may in rows}
    return {room: set(table) - {room} if "everything" in may else may - {"nothing"} for room, may in table.items()}


def test_the_table_names_every_room() -> None:
    top = {path.stem for path in PACKAGE.glob("*.py")} - FREE
    assert set(allowed()) == {*ROOMS, *top}


def test_imports_go_the_way_that_the_table_allows(imports: dict[str, set[str]]) -> None:
    table = allowed()
    against = {
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if (there := other.split(".")[0]) != (here := module.split(".")[0])
        and there not in FREE
        and here not in FREE
        and there not in table[here]
    }

    assert against == set()


def test_the_table_itself_has_one_direction() -> None:
    table = {room: may - {room} for room, may in allowed().items()}

    assert set(TopologicalSorter(table).static_order()) == set(table)


def test_no_files_import_each_other_in_a_circle(imports: dict[str, set[str]]) -> None:
    # A room's __init__ hands names on; files inside name each other directly.
    faces = {name for name in imports if name in ROOMS}
    graph = {
        name: {other for other in others if other not in faces} for name, others in imports.items() if name not in faces
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_model_and_data_do_not_know_each_other(imports: dict[str, set[str]]) -> None:
    rooms = {"model": "data", "data": "model"}
    met = {
        name
        for name, others in imports.items()
        for other in others
        if rooms.get(name.split(".")[0]) == other.split(".")[0]
    }

    assert met == set()


def test_a_room_has_at_most_so_many_files() -> None:
    sizes = {room: len(list((PACKAGE / room).glob("*.py"))) for room in ROOMS}

    assert {room: size for room, size in sizes.items() if size > MOST_FILES} == {}


def test_rooms_are_no_deeper_than_one_floor() -> None:
    assert [
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 2
    ] == []


def test_the_unit_tests_mirror_the_rooms() -> None:
    folders = {path.name for path in (ROOT / "tests" / "unit_tests").iterdir() if (path / "__init__.py").exists()}

    assert set(ROOMS) - folders <= {"commands"}, "commands are tested by what they do, in the room that does it"


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## What is where", 1)[1].split("```")[1]
    inside = set(re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE))
    outside = set(re.findall(r"^(\w+)/", tree, flags=re.MULTILINE))
    folders = {
        path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("**/*.*")) and path.name[0] != "."
    }
    made = {"runs", "build", "dist", "wandb"}

    assert inside == set(ROOMS)
    assert outside == {name for name in folders if not name.endswith(".egg-info") and name not in made}


@pytest.mark.parametrize(
    ("what", "pattern", "place"),
    [
        ("a YAML loader that takes a key twice", r"yaml\.(safe_|full_|unsafe_)load\(", None),
        ("attributes of a frozen object that are set later", r"__dict__(\[\w+\] = |\.update)", "host/maps.py"),
        ("setting attributes of a frozen object", r"object\.__setattr__", None),
        ("the grammar of averages", r"ema:\(", "data/learning_rate.py"),
        ("the weighted sum of checkpoints", r"add_\(.*alpha=", "checkpoints/averaging.py"),
        ("the name of a run's planned average", r"\"kaiyuan_averaging\"", "checkpoints/identity.py"),
    ],
)
def test_there_is_one(what: str, pattern: str, place: str | None) -> None:
    """Two copies of a rule drift apart, and a user meets the one that was not mended."""
    places = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }

    assert places == ({place} if place else set()), what
