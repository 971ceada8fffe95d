"""Memory of a run does not grow with a Parquet file, nor with its row groups."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.unit_tests.preprocess.corpus import REPOSITORY
from tests.unit_tests.preprocess.kills import ENVIRONMENT

DOCUMENT = "7" + "\n" * 1_999  # one id to the NullTokenizer, 2 KB to the reader; a page of Arrow's writer is 2 MB
SMALL, LARGE, GROUP = 10_000, 100_000, 2_500
MIB = 1 << 20
ROOM = 40 * MIB
"""What an allocator may keep; the large file has 180 MB more than the small one."""
PEAK_OF_A_BUILD = """
import sys
from pathlib import Path
from tests.unit_tests.preprocess.corpus import build
summary = build([Path(sys.argv[1])], Path(sys.argv[2]))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(summary.rows, int(peak.split()[1]) * 1024)
"""


def write_documents(path: Path, rows: int, group: int) -> Path:
    """Neither compressed nor in a dictionary, so the file is as large as its text."""
    table = pa.table({"text": pa.array([DOCUMENT] * min(group, rows))})
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(max(rows // group, 1)):
            writer.write_table(table, row_group_size=group)
    assert path.stat().st_size > rows * len(DOCUMENT)
    return path


def peak_bytes(path: Path, rows: int) -> int:
    """Largest resident memory of a process that builds one shard of the file."""
    command = [sys.executable, "-c", PEAK_OF_A_BUILD, str(path), str(path.with_suffix(""))]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    read, peak = map(int, done.stdout.split())
    assert read == rows
    return peak


def test_memory_does_not_grow_with_a_parquet_file_or_its_row_groups(tmp_path: Path) -> None:
    small = peak_bytes(write_documents(tmp_path / "small.parquet", SMALL, GROUP), SMALL)
    large = peak_bytes(write_documents(tmp_path / "large.parquet", LARGE, GROUP), LARGE)
    single = peak_bytes(write_documents(tmp_path / "single.parquet", LARGE, LARGE), LARGE)
    assert large - small < ROOM, f"{small // MIB} MiB for the small file, {large // MIB} for one ten times as large"
    assert single - small < ROOM, f"{small // MIB} MiB for small row groups, {single // MIB} for a single large one"
