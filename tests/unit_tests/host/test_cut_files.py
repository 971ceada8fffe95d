"""A mapped file that is cut short is named, by who reads it and by who sees a reader die."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kaiyuan.host import cut_files
from megatron_kaiyuan.host.cut_files import note_size, why_bus_error
from megatron_kaiyuan.host.rank_failures import failure_of

REPOSITORY = Path(__file__).parents[3]
READ = """
import os, sys, threading
import numpy as np
from megatron_kaiyuan.host.cut_files import name_cut_files
from megatron_kaiyuan.host.maps import look_up, map_array
name_cut_files()
numbers = map_array(sys.argv[1], np.dtype(np.int32), 1 << 16, 0, random=False)
os.truncate(sys.argv[1], 4096)
places = np.arange(1 << 15, 1 << 16)
reads = {
    "slice": lambda: numbers[1 << 15 :].sum(),
    "element": lambda: int(numbers[60000]),
    "look-up": lambda: look_up(numbers, places),
    "copy": lambda: np.empty(100, np.int64).__setitem__(slice(None), numbers[50000:50100]),
}
reader = threading.Thread(target=reads[sys.argv[2]])
if sys.argv[3] == "thread":
    reader.start()
    reader.join()
else:
    reads[sys.argv[2]]()
print("went on")
"""


@pytest.mark.parametrize("read", ["slice", "element", "look-up", "copy"])
@pytest.mark.parametrize("where", ["main", "thread"])
def test_who_reads_a_file_that_was_cut_short_names_it(tmp_path: Path, read: str, where: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1 << 18))
    command = [sys.executable, "-c", READ, str(path), read, where]
    reason = tmp_path / "reason.json"
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        timeout=60,
        env={"TORCHELASTIC_ERROR_FILE": str(reason)},
    )
    told = f"BusError: {path} has 4,096 bytes and had 262,144: cut short while the run read it. Copy it again, leave"
    assert finished.returncode == 1
    assert finished.stderr.startswith(told)
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""
    assert told in reason.read_text()


def test_a_rank_names_the_file_that_ended_its_loader_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_files, "_sizes", {})
    error = RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit."
    )
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(10))
    note_size(path, 10)
    assert "every file of the data is as long as it was" in failure_of(error).text
    path.write_bytes(bytes(9))
    assert failure_of(error).text.startswith(
        f"a data loader worker (process 7) ended: {path} has 9 bytes and had 10: cut short while the run read it"
    )
    unseen = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    assert f"(process 7) ended: {path} has 9 bytes and had 10" in failure_of(unseen).text
    path.unlink()
    assert f"{path} cannot be read (No such file or directory)" in why_bus_error()
