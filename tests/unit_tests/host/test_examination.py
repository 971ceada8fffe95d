"""A package that does not import is broken with its reason; one that is not there is only absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kaiyuan.host import examination
from tests import REPOSITORY


@pytest.mark.parametrize(
    ("code", "state", "part"),
    [
        ("__version__ = '7.1'", "ok", "7.1"),
        ("raise OSError('libcuda.so.1: cannot open')", "broken", "OSError: libcuda.so.1: cannot open"),
        ("import os; os.abort()", "broken", "signal 6 ends the process"),
    ],
)
def test_packages_are_imported_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, state: str, part: str
) -> None:
    (tmp_path / "one_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(examination, "PACKAGES", {"one_package": ("a", "b", False), "no_package": ("c", "d", True)})
    found, absent = examination.examine_packages()
    assert (found.state, part in found.value) == (state, True)
    assert (absent.state, absent.remedy) == ("broken", "d")


def test_two_ranks_measure_their_bandwidth() -> None:
    command = ["-m", "megatron_kaiyuan.host.torchrun", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "megatron_kaiyuan.host.bandwidth"],
        cwd=REPOSITORY, env=os.environ | {"KAIYUAN_DEVICE": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ranks"] == 2
    assert told["bytes_a_second"] > 1e6
