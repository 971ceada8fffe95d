#!/usr/bin/env python3
"""Kill the build of a rank index at random moments: what is left under its name is the whole index, or nothing.

python -m benchmarks.killed_builds --documents 20000000 --kills 50
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

from benchmarks.data_engine import write_shard

TOOL = Path(__file__).parents[1] / "tools" / "rank_data.py"


def main() -> int:
    """Kill builds, count what they leave, and return 1 if anything but nothing or the whole index is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000, help="documents to rank (default 20 million)")
    parser.add_argument("--kills", type=int, default=50, help="builds to kill (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    args = parser.parse_args()
    found = {"absent": 0, "identical": 0, "wrong": 0, "temporary files": 0}
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard"
        index = Path(f"{shard}.score.rank")
        write_shard(shard, args.documents, sparse=True)
        began = time.perf_counter()
        if start(shard).wait():
            raise SystemExit("the undisturbed build failed")
        duration, whole = time.perf_counter() - began, digest(index)
        moments = random.Random(args.seed)
        for _ in track(range(args.kills), "killing"):
            index.unlink(missing_ok=True)
            kill_after(start(shard), duration * moments.uniform(0.2, 1.6))
            found["absent" if not index.exists() else "identical" if digest(index) == whole else "wrong"] += 1
            for temporary in Path(folder).glob(".*"):
                found["temporary files"] += 1
                temporary.unlink()
        if start(shard).wait() or digest(index) != whole:
            found["wrong"] += 1
    print(f"{args.kills} builds of {duration:.1f} s killed: {', '.join(f'{n} {what}' for what, n in found.items())}")
    return 1 if found["wrong"] else 0


def start(shard: Path) -> "subprocess.Popen[bytes]":
    """Start building the index of a shard."""
    return subprocess.Popen([sys.executable, str(TOOL), str(shard)], stdout=subprocess.DEVNULL)


def kill_after(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Send SIGKILL, which a process cannot catch.

    It may have ended before.
    """
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def digest(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
