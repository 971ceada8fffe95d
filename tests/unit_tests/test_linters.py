"""ShellCheck over all shell scripts, hadolint over the Dockerfile, where these programs are installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit_tests.test_repository import ROOT, relative, shell_scripts

SHELLCHECK = shutil.which("shellcheck")
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
REASON = "is not installed; tools/dev/install_test_tools.sh installs it"


@pytest.mark.skipif(SHELLCHECK is None, reason=f"shellcheck {REASON}")
@pytest.mark.parametrize("script", shell_scripts(), ids=relative)
def test_shellcheck_finds_nothing(script: Path) -> None:
    checked = subprocess.run([str(SHELLCHECK), str(script)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.skipif(HADOLINT is None, reason=f"hadolint {REASON}")
def test_hadolint_finds_nothing() -> None:
    checked = subprocess.run([str(HADOLINT), "Dockerfile"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")
