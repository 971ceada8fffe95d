"""The tests are the same on every machine: no foreign plugin, no GPU, and the packages of the Python that runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

FOREIGN = """
import os, pathlib
pathlib.Path(os.environ["FOREIGN_LOADED"]).touch()
raise RuntimeError("a plugin that nobody asked for")
"""
ONE_TEST = "def test_nothing(): pass\n"
GPU_AND_OTHER = """
import os, pytest
@pytest.mark.gpu
def test_marked(): assert os.environ.get("CUDA_VISIBLE_DEVICES") == {visible!r}
def test_other(): assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with a plugin that announces itself to pytest as an installed package does, and ends pytest."""
    folder = tmp_path / "foreign"
    announced = folder / "foreign-1.0.dist-info"
    announced.mkdir(parents=True)
    (announced / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (announced / "entry_points.txt").write_text("[pytest11]\nforeign = foreign_plugin\n")
    (folder / "foreign_plugin.py").write_text(FOREIGN)
    return folder


def run_pytest(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pytest` on the tests of a folder, from the checkout."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *options, str(folder)]
    environment = {"FOREIGN_LOADED": str(folder / "loaded"), **os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["pytest", "xdist"])
def test_a_plugin_that_we_do_not_name_is_not_loaded(workers: list[str], foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(ONE_TEST)
    path = os.pathsep.join([str(foreign), os.environ["PYTHONPATH"]])
    finished = run_pytest(tmp_path, "-c", str(ROOT / "pyproject.toml"), *workers, PYTHONPATH=path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not (tmp_path / "loaded").exists()


def test_without_our_settings_that_plugin_would_be_loaded(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(ONE_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join([str(foreign), os.environ["PYTHONPATH"]])
    assert run_pytest(tmp_path, "-c", str(tmp_path / "pytest.ini"), PYTHONPATH=path).returncode != 0
    assert (tmp_path / "loaded").exists()


@pytest.mark.parametrize(
    ("chosen", "visible", "passed"), [("", "", "test_other"), ("cpu", "", "test_marked"), ("cuda", "7", "test_marked")]
)
def test_tests_marked_gpu_and_all_others_never_share_a_process(
    chosen: str, visible: str, passed: str, tmp_path: Path
) -> None:
    """The conftest is ours; a GPU of the user stays visible to the marked tests alone."""
    (tmp_path / "test_two.py").write_text(GPU_AND_OTHER.format(visible=visible))
    options = ("-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-v")
    finished = run_pytest(tmp_path, *options, KAIYUAN_GPU_TESTS=chosen, CUDA_VISIBLE_DEVICES="7")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"::{passed} PASSED" in finished.stdout
    assert "1 passed, 1 deselected" in finished.stdout


def test_an_unknown_choice_of_gpu_tests_is_refused(tmp_path: Path) -> None:
    finished = run_pytest(tmp_path, "-p", "tests.conftest", KAIYUAN_GPU_TESTS="yes")
    assert finished.returncode != 0
    assert "KAIYUAN_GPU_TESTS=yes: give cuda or cpu, or leave it out" in finished.stdout + finished.stderr


def test_no_gpu_is_seen_here_and_in_what_is_started_from_here() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 0


def test_commands_import_this_checkout_and_keep_the_folders_that_were_given() -> None:
    code = "import tests, os; print(os.environ['PYTHONPATH'])"
    given = os.pathsep.join(["carried", str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": given}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == os.pathsep.join([str(ROOT), "carried"])


def test_no_test_replaces_the_folders_that_packages_are_imported_from() -> None:
    """A Python that was named with KAIYUAN_PYTHON may have its packages on PYTHONPATH; a command without them fails."""
    replaced = '"PYTHON' + 'PATH": str('
    found = [path.name for path in sorted((ROOT / "tests").rglob("*.py")) if replaced in path.read_text()]
    assert found == []
