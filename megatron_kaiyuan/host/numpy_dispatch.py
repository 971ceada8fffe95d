"""Choice of the vector instructions that numpy sorts with, made before numpy is imported.

numpy 2 has sorts for AVX2 and for AVX-512. On AMD processors with AVX-512 it is as slow as its scalar sort: 39 to 69 ns
a 64-bit key, against 9 to 13 with its sort for AVX2 (numpy 2.1, 2.3 and 2.5 on an EPYC with AVX-512). With AVX-512
switched off it takes that one. The results are the same.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

__all__ = ["prefer_fast_sort"]

_VARIABLE = "NPY_DISABLE_CPU_FEATURES"


def prefer_fast_sort(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Switch numpy's use of AVX-512 off on AMD processors, for tools that mostly sort.

    Child processes inherit the setting. Does nothing once numpy is imported, where the variable is set already, and on
    processors of other kinds.

    Returns:
        Whether the variable was set.
    """
    if "numpy" in sys.modules or _VARIABLE in os.environ or not _is_amd_with_avx512(cpu_info):
        return False
    major, minor = (int(part) for part in version("numpy").split(".")[:2])
    if major < 2:
        return False
    os.environ[_VARIABLE] = "X86_V4" if (major, minor) >= (2, 4) else "AVX512F"  # the names changed in 2.4
    return True


def _is_amd_with_avx512(cpu_info: Path) -> bool:
    try:
        words = set(cpu_info.read_text(encoding="utf-8").split())
    except OSError:
        return False
    return {"AuthenticAMD", "avx512f"} <= words
