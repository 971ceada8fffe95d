"""tools/dev/env.sh with a Python that only pretends: what it finds, when it installs, and what it says if it cannot."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_TOOLS = ["awk", "bash", "cat", "cksum", "cut", "dirname", "du", "grep", "ls", "mkdir", "rm", "tail", "tee"]

# Answers the questions env.sh asks a Python: is it new, can it make environments, make one, install.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *version_info*) exit {too_old} ;;
    *ensurepip*) exit {lacks_ensurepip} ;;
    "-m venv "*) mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python"
        echo "VIRTUAL_ENV=$PWD/$3" >"$3/bin/activate" ;;
    "-m pip "*) echo "$*" >>pip_calls; [ ! -e break_installing ] ;;
    -V) echo "Python 3.12.99" ;;
esac
"""


@dataclass
class Clone:
    """A folder with what env.sh reads, in a path with a space, and a PATH of its own."""

    root: Path
    bin: Path

    def add_python(self, name: str, *, too_old: bool = False, lacks_ensurepip: bool = False) -> None:
        text = FAKE_PYTHON.format(too_old=int(too_old), lacks_ensurepip=int(lacks_ensurepip))
        self.add_program(self.bin / name, text)

    def add_program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def prepare(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / "tools/dev/env.sh")],
            env={"PATH": str(self.bin), "HOME": str(self.root.parent / "home"), **environment},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def installs(self) -> int:
        """How often the package itself was installed."""
        calls = self.root / "pip_calls"
        return calls.read_text().count("-e .[") if calls.exists() else 0


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    made = Clone(tmp_path / "a clone", tmp_path / "bin")
    for name in ["setup.py", "pyproject.toml", "constraints.txt"]:
        made.add_program(made.root / name, name)
    made.add_program(made.root / "tools/dev/env.sh", (ROOT / "tools/dev/env.sh").read_text())
    made.bin.mkdir()
    for tool in [*SYSTEM_TOOLS, "env", "chmod"]:
        place = shutil.which(tool)
        assert place is not None
        (made.bin / tool).symlink_to(place)
    return made


def test_a_second_run_installs_nothing(clone: Clone) -> None:
    clone.add_python("python3.12")

    first, second = clone.prepare(), clone.prepare()

    assert (first.returncode, second.returncode, clone.installs()) == (0, 0, 1)
    assert "installed in" in first.stdout
    assert second.stdout == "env: .venv is ready, nothing to install\n"


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml", "constraints.txt"])
def test_a_change_in_what_to_install_is_installed(clone: Clone, name: str) -> None:
    clone.add_python("python3.12")
    clone.prepare()
    (clone.root / name).write_text("changed")

    clone.prepare()

    assert clone.installs() == 2


def test_an_install_that_broke_off_starts_afresh(clone: Clone) -> None:
    clone.add_python("python3.12")
    (clone.root / "break_installing").touch()
    failed = clone.prepare()
    (clone.root / ".venv/left_over").touch()
    (clone.root / "break_installing").unlink()

    assert clone.prepare().returncode == 0
    assert not (clone.root / ".venv/left_over").exists()
    assert failed.returncode == 1
    assert "Running this again starts afresh" in failed.stderr


def test_an_environment_that_was_moved_is_made_again(clone: Clone) -> None:
    clone.add_python("python3.12")
    clone.prepare()
    moved = Clone(clone.root.rename(clone.root.parent / "elsewhere"), clone.bin)
    (moved.root / ".venv/left_over").touch()

    assert moved.prepare().returncode == 0
    assert not (moved.root / ".venv/left_over").exists()


def test_a_shim_that_does_not_run_is_passed_over(clone: Clone) -> None:
    clone.add_program(clone.bin / "python3.12", "#!/usr/bin/env bash\nexit 127\n")
    clone.add_python("python3", too_old=False)

    found = clone.prepare()

    assert found.stdout.splitlines()[0] == f"env: Python 3.12.99 ({clone.bin / 'python3'})"


def test_python_of_a_version_manager_is_found_beside_an_old_one_on_path(clone: Clone) -> None:
    clone.add_python("python3", too_old=True)
    inside = clone.root.parent / "home/.pyenv/versions/3.12.9/bin/python3.12"
    clone.add_program(inside, FAKE_PYTHON.format(too_old=0, lacks_ensurepip=0))

    assert f"({inside})" in clone.prepare().stdout


@pytest.mark.parametrize(
    ("pythons", "environment", "message"),
    [
        ({}, {}, "no Python 3.12 or later was found; install one"),
        ({"python3": {"too_old": True}}, {}, "no Python 3.12 or later was found; install one"),
        ({"python3": {"lacks_ensurepip": True}}, {}, "lacks ensurepip; install that part"),
        ({"python3": {}}, {"PYTHON": "nowhere/python"}, "PYTHON=nowhere/python does not run"),
    ],
    ids=["none", "too old", "without ensurepip", "named but absent"],
)
def test_without_a_usable_python_one_sentence_says_what_to_do(
    clone: Clone, pythons: dict[str, dict[str, bool]], environment: dict[str, str], message: str
) -> None:
    for name, flaws in pythons.items():
        clone.add_python(name, **flaws)

    failed = clone.prepare(**environment)

    assert failed.returncode == 1
    assert message in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert not (clone.root / ".venv").exists()
