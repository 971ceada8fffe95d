#!/usr/bin/env python3
"""Everything that only a GPU shows: the tests of tests/gpu, one line each, and a short row of training throughput.

    make gpu-check                                  # or, with a Python that has its own torch:
    make gpu-check KAIYUAN_PYTHON=python3

Each line is printed when its check ends, and stands in DIR/results.jsonl from then on; DIR/results.json holds all of
them with versions and times at the end, DIR/pytest.log the details of failures. Nothing is fetched. On one H200 it
takes under eight minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_kaiyuan.errors import DeviceError  # noqa: E402
from megatron_kaiyuan.host import machine  # noqa: E402
from megatron_kaiyuan.host.atomic import write_text_atomically  # noqa: E402
from megatron_kaiyuan.host.version import code_commit  # noqa: E402
from tools.dev.versions import versions  # noqa: E402

NO_GPU = "this machine shows no GPU, or KAIYUAN_DEVICE=cpu leaves it alone"
POLL_SECONDS = 0.3
LONGEST_FIRST = ("two_gpus", "demo", "runs", "examples", "models", "large_kernels", "kernels")
"""Files of tests/gpu, so that the last to end is a short one."""
THROUGHPUT_GIB = 60
"""Of GPU memory, for the 2B shape at micro-batch 2."""


def main() -> int:
    """Run the checks, and return 1 where one failed."""
    args = parsed_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    gpus, why = ([], "") if args.device == "cpu" else visible_gpus()
    if not gpus and args.device != "cpu":
        print(f"gpu-check: {why}; the tests that need a GPU are left out", flush=True)
        return 0 if args.where_there_is_one and why == NO_GPU else 1
    setting = {"device": describe(gpus), "versions": versions(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    print("gpu-check: " + "; ".join(setting.values()), flush=True)
    entries, complete = run_tests(args)
    if gpus and not args.without_throughput:
        entries.append(throughput(args.output, gpus[0]["total_bytes"] / 2**30))
        print(line_of(entries[-1]), flush=True)
    seconds = time.monotonic() - started
    counts = Counter(entry["outcome"] for entry in entries)
    result = setting | {"seconds": round(seconds, 1), "complete": complete, "checks": entries}
    write_text_atomically(args.output / "results.json", json.dumps(result, indent=1) + "\n")
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    print(f"gpu-check: {told} in {seconds:.0f} s; {args.output / 'results.json'}", flush=True)
    return 0 if complete and counts["passed"] and not counts["failed"] else 1


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), metavar="DIR")
    parser.add_argument("-k", dest="expression", default="", metavar="NAMES", help="choose tests, as pytest does")
    parser.add_argument("--workers", type=int, default=min(5, max(1, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the same tests without a GPU")
    parser.add_argument("--without-throughput", action="store_true", help="leave out the row of training throughput")
    parser.add_argument("--where-there-is-one", action="store_true", help="without a GPU: say so, exit code 0")
    args = parser.parse_args()
    args.output = args.output.resolve()
    if args.output.is_relative_to(Path.cwd()):
        args.output = args.output.relative_to(Path.cwd())
    return args


def visible_gpus() -> tuple[list[dict[str, Any]], str]:
    """Return the GPUs, or why there are none.

    Another process is asked, so that this one starts no CUDA.
    """
    if not machine.has_gpu() or os.environ.get("KAIYUAN_DEVICE") == "cpu":
        return [], NO_GPU
    try:
        return machine.ask_torch(environment_with_checkout())[1], NO_GPU
    except DeviceError as error:
        return [], str(error)


def describe(gpus: list[dict[str, Any]]) -> str:
    """How many of which."""
    if not gpus:
        return "no GPU: the twins of the tests"
    one = gpus[0]
    capability = ".".join(map(str, one["capability"]))
    return f"{len(gpus)} x {one['name']} ({one['total_bytes'] / 2**30:.0f} GiB, compute capability {capability})"


def commit() -> str:
    """Of this checkout, if it is one."""
    return f"commit {code_commit() or 'unknown'}"


def run_tests(args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Results of the tests in the order in which they ended, and whether pytest came to its own end."""
    results, log = args.output / "results.jsonl", args.output / "pytest.log"
    results.write_text("")
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"), key=lambda path: LONGEST_FIRST.index(path.stem[5:]))
    command = [
        *[sys.executable, "-m", "pytest", *map(str, files), "-p", "tests.gpu.lines", "-p", "no:cacheprovider"],
        *["--numprocesses", str(args.workers), "--dist", "loadscope", "--no-loadscope-reorder", "-k", args.expression],
    ]
    environment = os.environ | {
        "KAIYUAN_GPU_TESTS": args.device, "KAIYUAN_GPU_RESULTS": str(results.resolve()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    entries = []
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        for entry in followed(results, process):
            entries.append(entry)
            print(line_of(entry), flush=True)
    complete = process.returncode in (0, 1, 5)
    if not complete:
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:]), flush=True)
        print(f"gpu-check: pytest ended with code {process.returncode}; {log}", flush=True)
    return entries, complete


def followed(results: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The lines of a file as they are written, until the process that writes them has ended."""
    with results.open(encoding="utf-8") as stream:
        while True:
            ended = process.poll() is not None
            while line := stream.readline():
                yield json.loads(line)
            if ended:
                return
            time.sleep(POLL_SECONDS)


def line_of(entry: dict[str, Any]) -> str:
    """One check."""
    name = str(entry["test"]).removeprefix("tests/gpu/").rpartition("@")
    shown = name[0] or name[2]
    why = " ".join(str(entry["why"]).split())[:300]
    return f"{entry['outcome']:<8}{entry['seconds']:7.1f} s  {shown}{': ' + why if why else ''}"


def throughput(output: Path, gibibytes: float) -> dict[str, Any]:
    """Nine steps of the 2B shape through its launch script, on invented tokens."""
    entry: dict[str, Any] = {"test": "throughput of the 2B shape, FP16, local spec", "outcome": "skipped", "seconds": 0}
    if gibibytes < THROUGHPUT_GIB:
        return entry | {"why": f"needs {THROUGHPUT_GIB} GiB of GPU memory, there are {gibibytes:.0f}"}
    started = time.monotonic()
    folder = output / "throughput"
    made = (
        "from pathlib import Path; from benchmarks.benchmark_data import large_plan; import sys; "
        "print(large_plan(Path(sys.argv[1]), 4096, 151_936, 0.05, 160))"
    )
    plan = subprocess.run(
        [sys.executable, "-c", made, str(folder / "data")], cwd=ROOT, env=environment_with_checkout(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    (folder / "results.json").unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.training_throughput",
        "--rows",
        "ours",
        "--logs",
        str(folder.resolve()),
    ]
    command += ["--plan", plan.stdout.strip()]
    done = subprocess.run(
        command, cwd=ROOT, env=environment_with_checkout(), capture_output=True, text=True, check=False
    )
    seconds = round(time.monotonic() - started, 1)
    try:
        row = json.loads((folder / "results.json").read_text())["rows"][0]
        told = f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}, peak {row['peak_gib']:.1f} GiB"
    except (OSError, KeyError, IndexError):
        told = " ".join((plan.stderr + done.stdout + done.stderr).split())[-300:]
        return entry | {"outcome": "failed", "seconds": seconds, "why": told}
    return entry | {"outcome": "passed", "seconds": seconds, "why": told, "row": row}


def environment_with_checkout() -> dict[str, str]:
    """This checkout before whatever else packages are imported from."""
    folders = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)}


if __name__ == "__main__":
    sys.exit(main())
