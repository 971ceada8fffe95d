"""numpy's choice of instructions is changed where that is known to help, before its import, and nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f sha_ni\n"
CODE = """
import os, sys
from pathlib import Path
from megatron_kaiyuan.host.numpy_dispatch import prefer_fast_sort
done = prefer_fast_sort(Path(sys.argv[1]))
import numpy as np
keys = np.random.default_rng(0).integers(0, 1 << 63, 100_000, dtype=np.uint64)
assert np.sort(keys).tolist() == sorted(keys.tolist())
print(done, os.environ.get("NPY_DISABLE_CPU_FEATURES"))
"""


def decide(tmp_path: Path, cpu: str, before: str = "", **environment: str) -> str:
    (tmp_path / "cpuinfo").write_text(cpu)
    kept = {name: value for name, value in os.environ.items() if name != "NPY_DISABLE_CPU_FEATURES"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", before + CODE, str(tmp_path / "cpuinfo")],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_avx512_is_off_on_amd(tmp_path: Path) -> None:
    assert decide(tmp_path, AMD) == "True X86_V4"


@pytest.mark.parametrize("cpu", [AMD.replace("AuthenticAMD", "GenuineIntel"), AMD.replace("avx512f ", "")])
def test_other_processors_keep_it(tmp_path: Path, cpu: str) -> None:
    assert decide(tmp_path, cpu) == "False None"


def test_a_choice_of_the_user_stands(tmp_path: Path) -> None:
    assert decide(tmp_path, AMD, NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL") == "False X86_V4 AVX512_ICL"


def test_it_is_too_late_once_numpy_is_there(tmp_path: Path) -> None:
    assert decide(tmp_path, AMD, before="import numpy\n") == "False None"
