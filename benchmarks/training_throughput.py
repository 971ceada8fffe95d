#!/usr/bin/env python3
"""Training throughput of the Kaiyuan-2B shape on one GPU: stock Megatron-Core and ours, through the real entry point.

    python -m benchmarks.training_throughput --limit 540 --te-site te_site --tar results.tgz    # the headline rows
    python -m benchmarks.training_throughput --rows monitor,micro       # groups, keys or all
    python -m benchmarks.training_throughput --smoke --rows ours        # a tiny shape, invented text, any CPU

Each row is `examples/pretrain_kaiyuan_2b.sh` in a process of its own, with real tokens from shards, 16 sequences of
4096 tokens a step. Tokens a second are the median of the steps after the first four. The formula of MFU is printed
under the table. Stock rows are Megatron's model without QK-norm, sandwich norm and soft-cap. Only rows that say so have
Transformer Engine on their path: Megatron takes its fused Adam wherever it can be imported, and torch's otherwise; the
table names it. Memory is torch's peak of allocated bytes. Rows that cannot run are named with their error. "Data" is
the time that the training loop waits for batches, Megatron's timer `batch-generator`, over the time of the step; only
that row has timers, which synchronise. `--profile` adds where the time of a step of one row goes. Finished rows are
kept in results.json and not repeated.
"""

import argparse
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.benchmark_data import large_plan, plan_digest, require_shards, smoke_plan
from benchmarks.packing import pack
from benchmarks.scaling_jobs import default_micro_batch, end_family, stop_family
from benchmarks.throughput_report import OUT_OF_MEMORY, is_unfinished, print_profile, print_table, read_row
from benchmarks.throughput_rows import GROUPS, KAIYUAN, ROWS, TINY, Row, Size
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.cli import run_tool

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 110
FIRST_PORT = 29500
SAFETY = 1.2
"""A row starts if this many times the longest row of the call is left."""
PROFILE = "--profile --use-pytorch-profiler --profile-step-start 5 --profile-step-end 7 --profile-ranks 0"
SOFTWARE = """
import json, warnings
warnings.simplefilter("ignore")
told = {}
try:
    import transformer_engine.pytorch
    told["engine"] = transformer_engine.__version__
except Exception as error:
    told["engine_error"] = f"{type(error).__name__}: {error}"
from megatron_kaiyuan.host import cpu_platform
cpu_platform.install()
from megatron_kaiyuan.host.quiet import quiet_megatron_import
with quiet_megatron_import():
    from megatron.core.optimizer import Adam
told["optimizer"] = f"{Adam.__module__}.{Adam.__qualname__}"
print(json.dumps(told))
"""
"""What Megatron can import on the path of a row: its imports are the ones that the training makes."""


def main() -> None:
    """Run the rows that are not finished, print the table.

    Raises:
        StudyError: a row failed or was not started.
    """
    args = parsed_arguments()
    args.logs = args.logs.resolve()
    args.logs.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a rank that is stopped must not write its memory to the disk
    session = Session(args, TINY if args.smoke else KAIYUAN)
    rows = chosen_rows(args.rows)
    session.prepare(rows)
    session.measure_all(rows)
    results = [session.results[row.key] for row in rows]
    print_table(results, session.size, session.setting["device"])
    if args.profile:
        session.profile(chosen_rows(args.profile)[0])
    if failed := [str(result["key"]) for result in results if is_unfinished(result)]:
        raise StudyError(f"no numbers of {', '.join(failed)}; the same command tries these alone again")


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks/one_gpu_plan.yaml")
    groups = "; ".join(f"{name}: {', '.join(row.key for row in rows)}" for name, rows in GROUPS.items())
    parser.add_argument("--rows", default="headline", help=f"all, or groups or keys joined by commas. {groups}")
    parser.add_argument("--micro-batch-size", type=int, help="default: 4, or 2 on GPUs below 100 GiB")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--te-site", type=Path, help="folder with Transformer Engine, for the rows that want it alone")
    parser.add_argument("--data-gigabytes", type=float, default=4.0, help="of the shard of the row `data`")
    parser.add_argument("--at-once", type=int, default=1, help="rows that run side by side, each on a GPU of its own")
    parser.add_argument("--row-seconds", type=float, default=LIMIT_SECONDS, help="a row is stopped after so long")
    parser.add_argument("--limit", type=float, default=7200, help="no row starts that would end after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on invented text, made on the spot")
    parser.add_argument("--profile", metavar="KEY", help="also profile two steps of this row")
    parser.add_argument("--logs", type=Path, default=Path("runs/throughput"), help="folder for logs and results.json")
    parser.add_argument("--tar", type=Path, metavar="FILE", help="pack results and logs there after every row")
    return parser.parse_args()


def chosen_rows(names: str) -> list[Row]:
    """The rows of groups and keys, in the order asked for."""
    if names == "all":
        return list(ROWS)
    known = GROUPS | {row.key: (row,) for row in ROWS}
    if unknown := [name for name in names.split(",") if name not in known]:
        raise StudyError(f"--rows {names}: {', '.join(unknown)} is unknown; use {', '.join(known)} or all")
    return list({row.key: row for name in names.split(",") for row in known[name]}.values())


def search_path(row: Row, te_site: Path | None, inherited: str) -> str:
    """Return the `PYTHONPATH` of a row, with Transformer Engine on it or not.

    An installed one cannot be removed.
    """
    folders = [folder for folder in inherited.split(os.pathsep) if folder]
    if not row.engine:
        folders = [folder for folder in folders if not (Path(folder) / "transformer_engine").is_dir()]
    elif te_site is not None:
        folders.insert(0, str(te_site.resolve()))
    return os.pathsep.join([str(ROOT), *folders])


@dataclass
class Session:
    """One call: what it measures with, and what is known so far."""

    args: argparse.Namespace
    size: Size
    setting: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    software: dict[str, dict[str, str]] = field(default_factory=dict)
    """By `PYTHONPATH`."""
    started: float = field(default_factory=time.monotonic)
    longest: float = 0.0
    """Seconds of a row of this call."""
    free: "queue.SimpleQueue[int]" = field(default_factory=queue.SimpleQueue)
    """Numbers of the GPUs on which no row runs."""
    writing: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, rows: Sequence[Row]) -> None:
        """Data, the setting, and the rows of earlier calls.

        Raises:
            StudyError: shards or GPUs are missing, or the folder holds rows of another setting.
        """
        args = self.args
        self.count_gpus()
        if args.smoke:
            args.plan = smoke_plan(args.logs, 65536, 1, {"start": 0, "end": 1.0e-3, "shape": "warmup"})
        elif not all(row.large_data for row in rows):
            require_shards(args.plan)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        self.setting = {
            "device": device, "torch": torch.__version__, "parameters": self.size.parameters, "steps": args.steps,
            "sequences": self.size.sequences, "micro_batch": args.micro_batch_size or default_micro_batch(),
            "at_once": args.at_once, "plan": plan_digest(args.plan),
        }  # fmt: skip
        path = args.logs / "results.json"
        if not path.is_file():
            return
        known: dict[str, Any] = json.loads(path.read_text())
        if known["setting"] != self.setting:
            raise StudyError(f"{path}: was measured with {known['setting']}, not {self.setting}; name another --logs")
        self.results = {result["key"]: result for result in known["rows"]}

    def count_gpus(self) -> None:
        """Each row that runs at the same time gets one of its own."""
        wanted, there = self.args.at_once, torch.cuda.device_count()
        if wanted < 1 or (there and wanted > there):
            raise StudyError(f"--at-once {wanted}: from 1 to the number of GPUs, {max(1, there)}")
        for gpu in range(wanted):
            self.free.put(gpu)

    def measure_all(self, rows: Sequence[Row]) -> None:
        """Measure so many side by side as were asked for.

        Errors as `measure`.
        """
        with ThreadPoolExecutor(self.args.at_once) as pool:
            list(pool.map(self.measure, rows))

    def measure(self, row: Row) -> None:
        """Measure a row that is not finished.

        What it gave is on disk afterwards.

        Raises:
            StudyError: it was measured in another way before.
        """
        if row.key in self.results and not is_unfinished(self.results[row.key]):
            known = {name: self.results[row.key].get(name) for name in self.told(row)}
            if known != self.told(row):
                raise StudyError(f"{row.key} was measured as {known}, not as {self.told(row)}; name another --logs")
            print(f"{row.key}: known from {self.args.logs / 'results.json'}", flush=True)
            return
        gpu = self.free.get()
        try:
            began = time.monotonic()
            found = self.outcome(row, gpu)
        finally:
            self.free.put(gpu)
        with self.writing:
            self.results[row.key] = self.told(row) | found
            self.longest = max(self.longest, time.monotonic() - began)
            print(json.dumps({"key": row.key} | found), flush=True)
            self.write()

    def told(self, row: Row) -> dict[str, Any]:
        """What a row is, for its result."""
        return {
            "key": row.key, "name": row.name, "flags": list(row.flags), "environment": row.environment,
            "micro_batch": row.micro_batch or self.setting["micro_batch"],
        }  # fmt: skip

    def outcome(self, row: Row, gpu: int) -> dict[str, Any]:
        """Numbers of a row, or its error."""
        left = self.args.limit - (time.monotonic() - self.started)
        if left < max(SAFETY * self.longest, self.args.row_seconds / 2):
            return {"optimizer": "", "error": f"not started: {left:.0f} s are left"}
        found = self.found_by(row)
        told = {"optimizer": found["optimizer"], "engine": found.get("engine")}
        if "error" in found:  # a broken Transformer Engine, say: the other rows do not have it on their path
            return told | {"error": found["error"]}
        if row.engine and told["engine"] is None:
            return told | {"error": f"needs Transformer Engine (--te-site): {found['engine_error']}"}
        seconds = min(self.args.row_seconds, self.args.limit - (time.monotonic() - self.started))
        return told | self.run(row, gpu, seconds)

    def found_by(self, row: Row) -> dict[str, str]:
        """Adam's class and Transformer Engine's version, or why it cannot be imported, on the path of a row."""
        path = search_path(row, self.args.te_site, os.environ.get("PYTHONPATH", ""))
        if path not in self.software:
            done = subprocess.run(
                [sys.executable, "-c", SOFTWARE], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            broken = {"optimizer": "", "error": f"Megatron cannot be imported: {done.stderr.strip()[-300:]}"}
            self.software[path] = broken if done.returncode else json.loads(done.stdout.splitlines()[-1])
        return self.software[path]

    def run(self, row: Row, gpu: int, seconds: float, extra: Sequence[str] = ()) -> dict[str, Any]:
        """Train one configuration and read what it left."""
        log, metrics = (self.args.logs / f"{row.key}.{suffix}" for suffix in ("log", "jsonl"))
        metrics.unlink(missing_ok=True)  # lines are appended
        with log.open("w") as file:
            process = subprocess.Popen(
                self.command(row, metrics, extra), env=self.environment(row, gpu), cwd=ROOT, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            stopped = False
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                stopped = True
                stop_family(process)
            finally:
                end_family(process)
        result = read_row(log, metrics, self.size)
        if stopped and "error" in result and result["error"] != OUT_OF_MEMORY:
            result["error"] = f"stopped after {seconds:.0f} s; {result['error']}"
        return result

    def command(self, row: Row, metrics: Path, extra: Sequence[str] = ()) -> list[str]:
        """Of the example's script."""
        args, size = self.args, self.size
        return [
            "bash", str(ROOT / "examples/pretrain_kaiyuan_2b.sh"), *size.flags,
            "--global-batch-size", str(size.sequences), "--micro-batch-size", str(self.told(row)["micro_batch"]),
            "--exit-interval", str(args.steps), "--log-interval", "1", "--log-memory-interval", "1",
            "--tokenizer-type", "NullTokenizer", "--vocab-size", str(size.vocabulary - (not args.smoke)),
            "--save", "", "--load", "", "--eval-iters", "0", "--kaiyuan-metrics", str(metrics), *row.flags, *extra,
        ]  # fmt: skip

    def environment(self, row: Row, gpu: int) -> dict[str, str]:
        """Of the example's script."""
        own = {
            "NPROC_PER_NODE": "1", "PLAN": str(self.plan(row).resolve()), "RUN": str(self.args.logs / row.key),
            "PYTHONPATH": search_path(row, self.args.te_site, os.environ.get("PYTHONPATH", "")),
            "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1",
            # Nothing is saved here, and the script's default of keeping two is refused then.
            "KEEP_CHECKPOINTS": "",
        }  # fmt: skip
        if self.args.at_once > 1:
            own |= {"CUDA_VISIBLE_DEVICES": str(gpu), "MASTER_PORT": str(FIRST_PORT + gpu)}
        return os.environ | row.environment | own

    def plan(self, row: Row) -> Path:
        """Real text, or a shard of gigabytes."""
        if not row.large_data:
            return Path(self.args.plan)
        size, gigabytes = self.size, 0.01 if self.args.smoke else self.args.data_gigabytes
        samples = size.sequences * (self.args.steps + 1)
        return large_plan(self.args.logs / "large", size.seq_length, size.vocabulary, gigabytes, samples)

    def write(self) -> None:
        """Results, and the archive."""
        content = {"setting": self.setting, "formula": self.size.formula(), "rows": list(self.results.values())}
        write_text_atomically(self.args.logs / "results.json", json.dumps(content, indent=1) + "\n")
        if self.args.tar:
            found = [path for kind in ("*.json", "*.jsonl", "*.log") for path in self.args.logs.glob(kind)]
            pack(self.args.tar, self.args.logs, found)

    def profile(self, row: Row) -> None:
        """Profile two steps of a row with torch's profiler.

        Its own result stays.
        """
        row = replace(row, key=f"{row.key}_profile")
        told = self.run(row, 0, self.args.row_seconds, PROFILE.split())
        trace = self.args.logs / row.key / "torch_profile" / "rank-0.json.gz"
        if "error" in told or not trace.is_file():
            raise StudyError(f"no profile of {row.key}: {told.get('error', 'no trace was written')}")
        print_profile(trace, steps=2)


if __name__ == "__main__":
    sys.exit(run_tool(main))
