"""What holds for the repository as a whole: sizes, versions, scripts, and what the documents promise."""

import ast
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

import megatron_kaiyuan

ROOT = Path(__file__).resolve().parents[2]
ROOMS = [".ci", "benchmarks", "docs", "examples", "megatron_kaiyuan", "studies", "tests", "tools"]
TOP_LEVEL = ["setup.py", "pyproject.toml", "constraints.txt", "Makefile", "Dockerfile", ".dockerignore", ".gitignore"]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 100

# Written with character classes so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.}$])/(?:[w]ork|[r]oot|[h]ome|[U]sers|[m]nt)/\w|(?<![\w.}$])/[t]mp/(?!cache)\w")
REGISTRY = re.compile(r"[p]ypi\.|[p]ythonhosted|[a]rtifactory|[n]exus\.|[i]ndex-url|[f]ind-links|//(?:10|192)\.\d")


def text_files() -> Iterator[Path]:
    """Every file written by hand, tracked yet or not."""
    for name in [*TOP_LEVEL, *sorted(path.name for path in ROOT.glob("*.md"))]:
        yield ROOT / name
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.is_file() and path.suffix != ".png" and "__pycache__" not in path.parts:
                yield path


def python_files() -> list[Path]:
    return [path for path in text_files() if path.suffix == ".py"]


def shell_scripts() -> list[Path]:
    return [path for path in text_files() if path.suffix in (".sh", ".sbatch")] + [ROOT / ".ci" / "run"]


def documents() -> list[Path]:
    return [path for path in text_files() if path.suffix == ".md"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    received: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", received.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return received


@pytest.fixture(scope="module")
def pins() -> dict[str, list[str]]:
    """Versions by lower-case name; constraints.txt may name each once."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            found.setdefault(canonical(name), []).append(version)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_source_file_is_longer_than_the_limit() -> None:
    sizes = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}

    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}
    assert sizes, "no Python file was found, so nothing was checked"


def test_no_function_is_longer_than_the_limit() -> None:
    too_long = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=relative(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long[f"{relative(path)}:{node.name}"] = lines

    assert too_long == {}


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "megatron_kaiyuan").rglob("*.py")}

    assert [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("forbidden", [MACHINE_PATH, REGISTRY], ids=["machine path", "package registry"])
def test_no_file_names_a_machine_path_or_a_package_registry(forbidden: re.Pattern[str]) -> None:
    hits = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if forbidden.search(line):
                hits.append(f"{relative(path)}:{number}: {line.strip()}")

    assert hits == []


@pytest.mark.parametrize("line", ["see /{}ork/x", 'cd "/{}ome/me"'])
def test_the_search_for_machine_paths_finds_them(line: str) -> None:
    assert MACHINE_PATH.search(line.format("w" if "ork" in line else "h"))


def test_the_version_of_the_distribution_is_that_of_the_package(setup_arguments: dict[str, Any]) -> None:
    assert setup_arguments["version"] == megatron_kaiyuan.__version__


def test_megatron_core_is_pinned_once_and_to_one_minor_version(
    setup_arguments: dict[str, Any], pins: dict[str, list[str]]
) -> None:
    ranges = [Requirement(line) for line in setup_arguments["install_requires"]]
    megatron = [requirement for requirement in ranges if requirement.name == "megatron-core"]

    assert len(megatron) == 1
    assert pins["megatron-core"] == ["0.19.2"]
    assert megatron[0].specifier.contains("0.19.2")
    assert not megatron[0].specifier.contains("0.20.0")


def test_torch_of_the_nvidia_containers_satisfies_the_range(setup_arguments: dict[str, Any]) -> None:
    ranges = [Requirement(line) for line in setup_arguments["install_requires"]]

    assert next(r for r in ranges if r.name == "torch").specifier.contains("2.11.0a0+eb65b36914.nv26.03")


def test_constraints_name_each_package_once(pins: dict[str, list[str]]) -> None:
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}


def test_what_make_env_installs_is_pinned_within_its_range(
    setup_arguments: dict[str, Any], pins: dict[str, list[str]]
) -> None:
    extras = setup_arguments["extras_require"]
    asked = [Requirement(line) for line in setup_arguments["install_requires"] + extras["test"] + extras["preprocess"]]

    assert [r.name for r in asked if canonical(r.name) not in pins] == []
    assert [r.name for r in asked if not r.specifier.contains(pins[canonical(r.name)][0], prereleases=True)] == []


@pytest.mark.parametrize("script", shell_scripts(), ids=relative)
def test_shell_scripts_are_valid_and_stop_at_the_first_error(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)

    assert (checked.returncode, checked.stderr) == (0, "")
    assert "\nset -euo pipefail\n" in script.read_text()


def test_commands_that_the_documents_name_exist_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        (relative(path), command)
        for path in documents()
        for command in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }

    assert {(path, command) for path, command in named if command not in targets} == set()
    assert ("CONTRIBUTING.md", "env") in named


def test_files_that_the_documents_name_exist() -> None:
    named = {
        (relative(path), name)
        for path in documents()
        for name in re.findall(r"\b((?:tools|examples|benchmarks|docs)/[\w/]+\.\w+)", path.read_text(encoding="utf-8"))
    }

    assert {(path, name) for path, name in named if not (ROOT / name).exists()} == set()
