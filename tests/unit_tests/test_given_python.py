"""KAIYUAN_PYTHON: what a Python that is used as it is has and lacks, and that nothing is installed into it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kaiyuan.host.devices import Gpu
from tools.dev import gpu_check, versions

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_python_with_all_packages_is_used_and_its_versions_are_said() -> None:
    done = run("bash", "tools/dev/env.sh", KAIYUAN_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert f"nothing is installed: Python {sys.version.split()[0]}, torch {versions.version_of('torch')}" in done.stdout
    assert "apex none" in done.stdout or versions.version_of("apex") != "none"


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_a_python_that_does_not_run_is_refused(python: str) -> None:
    done = run("bash", "tools/dev/env.sh", KAIYUAN_PYTHON=python)
    assert done.returncode == 1
    assert done.stderr == f"env: KAIYUAN_PYTHON={python} does not run or is older than Python 3.12; name another one.\n"


def test_what_is_lacking_is_named_with_a_remedy_that_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"plotly": "none", "pydantic": "1.10.2", "pytest": "8.1.1"}
    known = versions.version_of
    monkeypatch.setattr(versions, "version_of", lambda name: found.get(name) or known(name))
    lacking = versions.missing_requirements(tests=True)
    assert lacking == {"plotly>=6": "none", "pydantic>=2": "1.10.2", "pytest>=9": "8.1.1"}
    assert "pytest>=9" not in versions.missing_requirements(tests=False)
    monkeypatch.setenv("KAIYUAN_PYTHON", "python3")
    told = versions.advice(lacking)
    assert "python3 lacks plotly>=6 (found: none), pydantic>=2 (found: 1.10.2)" in told
    assert "python3 -m pip install --constraint <(python3 -m pip list --format=freeze) 'plotly>=6'" in told


def test_the_torch_of_nvidias_containers_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    known = versions.version_of
    monkeypatch.setattr(
        versions, "version_of", lambda name: "2.11.0a0+eb65b36914.nv26.2" if name == "torch" else known(name)
    )
    assert versions.missing_requirements(tests=False) == {}


def test_a_package_without_a_record_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "apex", raising=False)  # hidden from tests of the CPU
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert versions.version_of("apex") == "of unknown version"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"test": "tests/gpu/test_models.py::test_a_step[local, FP16]@models", "outcome": "passed", "seconds": 1.25,
             "why": ""},
            "passed      1.2 s  test_models.py::test_a_step[local, FP16]",
        ),
        (
            {"test": "tests/gpu/test_two_gpus.py::test_runs", "outcome": "skipped", "seconds": 0.0,
             "why": "needs 2 GPUs,\n here is 1"},
            "skipped     0.0 s  test_two_gpus.py::test_runs: needs 2 GPUs, here is 1",
        ),
    ],
)  # fmt: skip
def test_a_check_is_one_line(entry: dict[str, object], expected: str) -> None:
    assert gpu_check.line_of(entry) == expected


def test_without_a_gpu_the_check_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--where-there-is-one"]
    broken = ([], "error: this machine has an NVIDIA GPU that torch cannot use")
    none = ([], gpu_check.NO_GPU)
    for found, flags, code in ((none, [], 1), (none, where, 0), (broken, where, 1)):
        monkeypatch.setattr(gpu_check, "visible_gpus", lambda found=found: found)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path), *flags])
        assert gpu_check.main() == code
        assert f"gpu-check: {found[1]}; the tests that need a GPU are left out" in capsys.readouterr().out


def test_the_files_of_the_check_are_those_that_have_a_place_in_its_order() -> None:
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert names == set(gpu_check.LONGEST_FIRST)


def test_results_are_read_while_they_are_written(tmp_path: Path) -> None:
    code = """
import json, sys, time
for number in range(3):
    with open(sys.argv[1], "a") as stream:
        stream.write(json.dumps({"number": number}) + "\\n")
    time.sleep(0.1)
"""
    results = tmp_path / "results.jsonl"
    results.touch()
    process = subprocess.Popen([sys.executable, "-c", code, str(results)])
    assert [entry["number"] for entry in gpu_check.followed(results, process)] == [0, 1, 2]


def test_the_gpus_are_described_as_the_module_of_devices_tells_them() -> None:
    one = {"name": "NVIDIA H200", "capability": [9, 0], "total_bytes": 139 * 2**30}
    assert gpu_check.describe([one, one]) == "2 x NVIDIA H200 (139 GiB, compute capability 9.0)"
    assert set(one) == set(Gpu.__dataclass_fields__)
