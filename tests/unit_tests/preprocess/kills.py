"""Kill `tools/preprocess_data.py` again and again, and finish its work.

The long version: `python -m tests.unit_tests.preprocess.kills 50`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.unit_tests.preprocess.corpus import REPOSITORY, folder_bytes, number_rows, write_jsonl

TOOL = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass
class Killed:
    """What the kills met."""

    kills: int = 0
    states: Counter[str] = field(default_factory=Counter)


def run_to_end(command: Sequence[str]) -> float:
    """Run undisturbed; seconds."""
    began = time.monotonic()
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return time.monotonic() - began


def kill_once(command: Sequence[str], seconds: float) -> bool:
    """Start, wait, SIGKILL; whether it was still running."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def kill_and_finish(
    command: Sequence[str], out: Path, whole: dict[str, bytes], seconds: float, seed: int, most: int = 100
) -> Killed:
    """Kill the command at random times until it once gets through; check what is visible after each kill."""
    generator = random.Random(seed)
    report = Killed()
    while report.kills < most and kill_once(command, generator.uniform(0.2, 1.1) * seconds):
        report.kills += 1
        report.states[check_visible(out, whole)] += 1
    run_to_end(command)  # the one that got through may have failed at a dying worker's lock
    assert folder_bytes(out) == whole
    return report


def check_visible(out: Path, whole: dict[str, bytes]) -> str:
    """Every file with a final name must hold its final bytes; says how far the run had come."""
    if not out.is_dir():
        return "nothing yet"
    names = [path.name for path in out.iterdir()]
    final = [name for name in names if not name.endswith(".partial") and not name.startswith(".")]
    for name in final:
        assert (out / name).read_bytes() == whole[name], f"{name} is torn"
    manifests = sum(name.endswith(".manifest.json") for name in final)
    torn = any(name.endswith(".bin") and name[:-4] + ".manifest.json" not in final for name in final)
    return f"{manifests} shards published" + (", one in the middle of it" if torn else "")


def main(kills: int) -> None:
    """The long version of the test."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = write_jsonl(folder / "rows.jsonl", number_rows(60_000))
        flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000", "--score-key", "score", "--workers", "2"]
        targets = {
            "folder": ["--output-dir", str(folder / "out"), "--shard-size", "1MB"],
            "pair": ["--output-prefix", str(folder / "out" / "p")],
        }
        for name, target in targets.items():
            command = [*TOOL, "--input", str(path), *target, *flags]
            seconds = run_to_end(command)
            whole = folder_bytes(folder / "out")
            done, rounds, states = 0, 0, Counter[str]()
            while done < kills:
                shutil.rmtree(folder / "out")
                report = kill_and_finish(command, folder / "out", whole, seconds, seed=rounds)
                done, rounds, states = done + report.kills, rounds + 1, states + report.states
            print(f"{name}: {done} kills in {rounds} builds of {seconds:.1f} s, every result byte-identical")
            print("  state when killed:", dict(sorted(states.items())))
            shutil.rmtree(folder / "out")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
