#!/usr/bin/env python3
"""Tokens per second of training the demo's model, beside a plain-torch GPT of the same shape, in the same run.

    python -m benchmarks.demo_throughput --rounds 3 --json throughput.json

Each row trains both for some steps, one after the other, several rounds of this. A speed is tokens of a step over the
median seconds of the steps after the warm-up, of all rounds; it means nothing on a machine that does other work too.
The ratio by CPU time does: it compares what a long run costs more than a short one, in CPU seconds of all processes.
One thread a process. Both read random tokens that cost nothing to make, so that training is compared;
`benchmarks/data_engine.py` compares the reading.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.plain_torch_gpt import Job, Shape
from megatron_kaiyuan.host.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[1]
STEP_SECONDS = re.compile(r"iteration +\d+/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+)")
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table, with speeds in tokens per second of all processes together."""

    dtype: str
    processes: int
    ours: float
    plain: float
    cpu_ratio: float
    """CPU seconds of a step, plain over ours; above 1: ours costs less."""

    @property
    def ratio(self) -> float:
        """Above 1: faster than plain torch."""
        return self.ours / self.plain


def demo_model(steps: int) -> tuple[Shape, Job, list[str]]:
    """The demo's model and batch, and Megatron's flags for this model."""
    # The demo is a folder of scripts, not a package.
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from settings import FULL

    plan = read_yaml(ROOT / "examples" / "demo" / "plan.yaml")
    model = FULL.model
    shape = Shape(
        layers=model.layers,
        hidden=model.hidden,
        ffn=model.ffn,
        heads=model.heads,
        groups=model.query_groups,
        head_size=model.hidden // model.heads,
        vocabulary=FULL.vocab_size,
        sequence=plan["seq_length"],
        softcap=model.softcap,
    )
    accumulation = FULL.global_batch // (FULL.micro_batch * FULL.processes)
    job = Job(dtype="float16", micro_batch=FULL.micro_batch, accumulation=accumulation, steps=steps)
    return shape, job, model.flags()


def ours_command(shape: Shape, job: Job, processes: int, model_flags: list[str]) -> list[str]:
    """The demo's model through `megatron_kaiyuan.pretrain`, on made-up data."""
    values = {
        "seq-length": shape.sequence,
        "max-position-embeddings": shape.sequence,
        "micro-batch-size": job.micro_batch,
        "global-batch-size": job.micro_batch * job.accumulation * processes,
        "train-iters": job.steps,
        "lr": 1e-3,
        "weight-decay": 0.1,
        "adam-beta2": 0.95,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": shape.vocabulary - 1,  # Megatron adds one for the end of a document
        "padded-vocab-size": shape.vocabulary,
        "num-workers": 0,
        "log-interval": 1,
        "eval-iters": 0,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    flags += ["--mock-data", "--use-distributed-optimizer"]
    if job.dtype == "float16":
        flags += ["--fp16", "--initial-loss-scale", "65536"]
    return [*torchrun(processes), "-m", "megatron_kaiyuan.pretrain", *model_flags, *flags]


def plain_command(shape: Shape, job: Job, processes: int) -> list[str]:
    """The same model and steps in plain torch."""
    values = asdict(shape) | asdict(job)
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*torchrun(processes), "-m", "benchmarks.plain_torch_gpt", *flags]


def torchrun(processes: int) -> list[str]:
    """The launcher on this machine alone."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def cpu_seconds() -> float:
    """CPU time of all processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(command: list[str]) -> tuple[str, float]:
    """Return the output of a command and its CPU seconds.

    If it fails, the end of its output is raised.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = cpu_seconds()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout, cpu_seconds() - before


def ours_seconds(output: str) -> list[float]:
    """Seconds of each step from Megatron's log."""
    return [float(milliseconds) / 1000 for milliseconds in STEP_SECONDS.findall(output)]


def plain_seconds(output: str) -> list[float]:
    """Seconds of each step from the JSON line."""
    seconds: list[float] = json.loads(output.strip().splitlines()[-1])["seconds"]
    return seconds


def measure(
    command: Callable[[Job], list[str]], step_seconds: Callable[[str], list[float]], job: Job
) -> tuple[list[float], float]:
    """Seconds of each step after the warm-up, and CPU seconds of a step: a long run's less a short one's."""
    short = replace(job, steps=WARM_UP_STEPS)
    _, short_cpu = run(command(short))
    output, long_cpu = run(command(job))
    return step_seconds(output)[WARM_UP_STEPS:], (long_cpu - short_cpu) / (job.steps - WARM_UP_STEPS)


def measure_row(shape: Shape, job: Job, processes: int, flags: list[str], rounds: int) -> Row:
    """Alternate between the two, so that what else the machine does hits both."""
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(measure(lambda it: ours_command(shape, it, processes, flags), ours_seconds, job))
        plain.append(measure(lambda it: plain_command(shape, it, processes), plain_seconds, job))
    tokens = job.micro_batch * job.accumulation * processes * shape.sequence
    medians = [statistics.median(second for seconds, _ in side for second in seconds) for side in (ours, plain)]
    costs = [statistics.median(cpu for _, cpu in side) for side in (ours, plain)]
    return Row(
        dtype=job.dtype,
        processes=processes,
        ours=tokens / medians[0],
        plain=tokens / medians[1],
        cpu_ratio=costs[1] / costs[0],
    )


def measure_rows(shape: Shape, job: Job, flags: list[str], processes: list[int], rounds: int) -> list[Row]:
    """One row for each precision and number of processes."""
    cases = [(replace(job, dtype=dtype), count) for count in processes for dtype in ("float16", "float32")]
    return [
        measure_row(shape, case, count, flags, rounds)
        for case, count in track(cases, "training", console=Console(stderr=True))
    ]


def print_table(rows: list[Row], shape: Shape) -> None:
    """The result for people."""
    title = f"{shape.layers} layers, hidden {shape.hidden}, vocabulary {shape.vocabulary}, sequence {shape.sequence}"
    headings = ["precision", "processes", "ours, tokens/s", "plain torch, tokens/s", "ratio", "ratio by CPU time"]
    table = Table(*headings, title=title)
    for row in rows:
        speeds = [f"{row.ours:.0f}", f"{row.plain:.0f}", f"{row.ratio:.2f}", f"{row.cpu_ratio:.2f}"]
        table.add_row(row.dtype, str(row.processes), *speeds)
    Console().print(table)


def main() -> None:
    """Measure, print, and write the JSON file if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often each is run (default 2)")
    parser.add_argument("--steps", type=int, default=16, help="steps of a run (default 16)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="process counts (default 1 2)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS or options.rounds < 1:
        parser.error(f"--steps must be above {WARM_UP_STEPS} (the warm-up) and --rounds at least 1")
    shape, job, flags = demo_model(options.steps)
    rows = measure_rows(shape, job, flags, options.processes, options.rounds)
    print_table(rows, shape)
    if options.json:
        report = {"shape": asdict(shape), "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
