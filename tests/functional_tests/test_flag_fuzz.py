"""Random command lines end as they should, and each flag changes what it says; all of it is a benchmark too."""

import re
import subprocess
import sys

import pytest

from tests.functional_tests.training_run import REPOSITORY


@pytest.mark.slow
def test_no_random_command_line_ends_in_a_traceback_or_never() -> None:
    command = [sys.executable, "-m", "benchmarks.flag_fuzz", "--trials", "60", "--seed", "5"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    counts = {name: int(number) for name, number in re.findall(r"'(\w+)': (\d+)", done.stdout.splitlines()[-1])}
    assert sum(counts.values()) == 60
    assert counts["trained"] >= 3


@pytest.mark.slow
def test_each_flag_changes_what_its_line_says() -> None:
    """Of the parameters, the losses and the files: nothing less and nothing more."""
    command = [sys.executable, "-m", "benchmarks.flag_effects"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(" tried, 0 wrong")
