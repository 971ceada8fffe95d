#!/usr/bin/env python3
"""How training scales over the GPUs of one host, and whether it survives their loss. One command, three parts.

    python -m benchmarks.scaling --out runs/scaling --minutes 9          # on all GPUs
    python -m benchmarks.scaling --smoke                                 # the same code, two processes on a CPU
    python -m benchmarks.scaling --project runs/scaling/measured.json --network-gigabytes 25 --hop-microseconds 10

`throughput`: the Kaiyuan-2B shape in FP16 through the project's entry point; tokens a second, MFU, peak memory and the
collectives' share of a step at DP 1, 2, 4, 8 (as many samples a GPU, and as many in all), TP 2, PP 2, and without the
distributed optimizer or overlap. `elastic`: a checkpoint of all ranks continued on half of them with TP 2 and on a
quarter: recorded sample numbers equal, losses within a derived tolerance. `lost`: one process is killed; the job must
end in time, name the rank, and continue. Finished rows are not repeated. `--project` is arithmetic on measured values
(benchmarks/scaling_model.py). docs/scaling.md says what each number means.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.packing import pack
from benchmarks.scaling_faults import as_data, elastic_proof, lost_rank_proof, resume_layouts, undisturbed
from benchmarks.scaling_jobs import (
    FULL,
    MIDDLE,
    PROFILED,
    SMOKE,
    Budget,
    Job,
    Layout,
    communication_of,
    default_micro_batch,
    default_processes,
    read_steps,
    run_job,
    write_data,
)
from benchmarks.scaling_model import Measured, Network, as_json, load_measured, project
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.cli import run_tool

PEAK_FLOPS = 989e12
"""Of one H100 or H200, FP16 without sparsity, by the data sheet."""
PARTS = ("throughput", "elastic", "lost")
SHARES = ("communication_ms", "exposed_ms")
NODES = (1, 2, 4, 8, 16, 32, 64)
WARM_UP_STEPS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration to be timed."""

    key: str
    layout: Layout
    global_batch: int


def rows_for(processes: int, samples: int) -> list[Row]:
    """All configurations, the ones that say most first.

    Args:
        processes: GPUs.
        samples: Of a GPU and step in weak scaling; strong scaling shares twice as many among all.
    """
    sizes = [size for size in (1, 2, 4, 8) if size < processes] + [processes]
    whole = samples * processes
    rows = [Row(f"weak{size}", Layout(size), samples * size) for size in dict.fromkeys((processes, *sizes[:-1]))]
    rows += [Row(f"strong{size}", Layout(size), 2 * samples) for size in (sizes[0], *sizes[1:][::-1]) if size != 2]
    if processes % 2 == 0:
        rows[2:2] = [
            Row("exposed", Layout(processes, overlap=False), whole),
            Row("tensor", Layout(processes, tensor=2), whole),
            Row("pipeline", Layout(processes, pipeline=2), whole),
        ]
        rows += [
            Row("replicated", Layout(processes, distributed_optimizer=False), whole),
            Row("replicated_exposed", Layout(processes, distributed_optimizer=False, overlap=False), whole),
        ]
    return rows


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: runs/scaling, or runs/scaling_smoke")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, for two CPU processes")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of throughput,elastic,lost")
    parser.add_argument("--rows", default="all", help="of throughput, joined by commas (default: all)")
    parser.add_argument("--processes", type=int, help="default: all GPUs, or 2")
    parser.add_argument("--steps", type=int, default=10, help="of a timed job, profiled ones included")
    parser.add_argument("--samples", type=int, help="of a GPU and step (default 16; 4 with --smoke)")
    parser.add_argument("--micro-batch-size", type=int, help="default: 4, or 2 on GPUs below 100 GiB")
    parser.add_argument("--proof-steps", type=int, default=20, help="steps before and after the checkpoint")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a job may live on without one of its ranks")
    parser.add_argument("--limit", type=float, default=150, help="seconds of a job")
    parser.add_argument("--minutes", type=float, help="of this call: no job starts without time, or lives longer")
    parser.add_argument("--tar", type=Path, metavar="FILE", help="pack results and logs there after every step")
    parser.add_argument("--project", type=Path, metavar="measured.json", help="project to more nodes; run nothing")
    parser.add_argument("--network-gigabytes", type=float, help="a second, between nodes, of one GPU: an assumption")
    parser.add_argument("--hop-microseconds", type=float, help="of one hop of a ring between nodes: an assumption")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--micro-batches", type=int, default=8, help="of a GPU and step, in a projection")
    parser.add_argument("--global-micro-batches", type=int, help="of a step in place of it: strong scaling")
    return parser


def main() -> None:
    """Run the parts asked for, or project."""
    args = build_parser().parse_args()
    if args.project:
        print_projection(args)
        return
    if unknown := set(args.parts.split(",")) - set(PARTS):
        raise StudyError(f"--parts {args.parts}: {', '.join(unknown)} is unknown; name some of {', '.join(PARTS)}")
    args.out = args.out or Path("runs/scaling_smoke" if args.smoke else "runs/scaling")
    args.processes = args.processes or default_processes()
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    args.budget = Budget(args.limit, deadline)
    args.precision = "fp16" if torch.cuda.is_available() else "fp32"
    problems = []
    for part in args.parts.split(","):
        try:
            problems += {"throughput": throughput, "elastic": elastic, "lost": lost}[part](args)
        except StudyError as error:  # the other parts are worth having all the same
            problems.append(f"{part}: {error}")
        save(args)
    if problems:
        raise StudyError("\n".join(problems))


def save(args: argparse.Namespace) -> None:
    """Pack what there is."""
    if args.tar:
        logs = [*args.out.rglob("log.txt"), *args.out.rglob("metrics.jsonl")]
        pack(args.tar, args.out, [*args.out.glob("*.json"), *logs])


def throughput(args: argparse.Namespace) -> list[str]:
    """Time every row that is not timed yet."""
    shape = SMOKE if args.smoke else FULL
    samples = args.samples or (4 if args.smoke else 16)
    chosen = rows_for(args.processes, samples)
    if args.rows != "all":
        wanted = args.rows.split(",")
        if unknown := set(wanted) - {row.key for row in chosen}:
            raise StudyError(
                f"--rows: {', '.join(unknown)} is unknown; there are {', '.join(row.key for row in chosen)}"
            )
        chosen = [row for row in chosen if row.key in wanted]
    plan = write_data(shape, args.out / "data", args.steps * max(row.global_batch for row in chosen))
    micro = micro_batch(args)
    setting = {"device": device_name(), "processes": args.processes, "shape": shape.name, "micro_batch": micro,
               "steps": args.steps, "samples": samples, "torch": torch.__version__}  # fmt: skip
    path = args.out / "throughput.json"
    known = json.loads(path.read_text()) if path.is_file() else {"setting": setting, "rows": {}}
    if known["setting"] != setting:
        raise StudyError(f"{path}: was measured with {known['setting']}, not {setting}; name another --out")
    for row in chosen:
        if "error" in known["rows"].get(row.key, {"error": ""}):
            known["rows"][row.key] = timed(args, row, plan, micro)
            write_text_atomically(path, json.dumps(known, indent=1) + "\n")
            save(args)
    print_rows(known)
    measured = measured_from(known, args.processes)
    if measured is not None:
        write_text_atomically(args.out / "measured.json", as_json(measured))
        print(f"{args.out / 'measured.json'}: for --project")
    return [f"{row.key}: {known['rows'][row.key]['error']}" for row in chosen if "error" in known["rows"][row.key]]


def micro_batch(args: argparse.Namespace) -> int:
    """Samples of a micro-batch."""
    if args.micro_batch_size:
        return int(args.micro_batch_size)
    return 2 if args.smoke else default_micro_batch()


def device_name() -> str:
    """What trains."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def timed(args: argparse.Namespace, row: Row, plan: Path, micro: int) -> dict[str, Any]:
    """Return one row.

    A failure is its error, so that the others are timed all the same.
    """
    shape = SMOKE if args.smoke else FULL
    profiled = args.steps - PROFILED
    profile = f"--profile --use-pytorch-profiler --profile-step-start {profiled} --profile-step-end {args.steps}"
    # The loop stops the profiler after its last step, so it runs one step further.
    folder = args.out / "throughput" / row.key
    job = Job(
        shape, row.layout, plan, folder, micro, row.global_batch, args.steps, args.precision,
        (*profile.split(), "--profile-ranks", "0"),
    )  # fmt: skip
    told = {"name": row.layout.name, "layout": asdict(row.layout), "global_batch": row.global_batch}
    (folder / "log.txt").unlink(missing_ok=True)
    try:
        args.budget.require(1, row.key)
        seconds = run_job(job, args.budget.seconds())
        # From the step before the profiled ones on, the profiler is warming up.
        steps = read_steps(folder / "log.txt", WARM_UP_STEPS, profiled - 1)
        communication = communication_of(folder / "torch_profile" / "rank-0.json.gz", PROFILED)
    except (StudyError, OSError) as error:
        return told | {"error": str(error)}
    tokens = row.global_batch * shape.seq_length / steps["milliseconds"] * 1000
    mfu = tokens * shape.flops_per_token / PEAK_FLOPS / row.layout.processes if torch.cuda.is_available() else None
    result = told | steps | asdict_communication(communication) | {"tokens_per_second": tokens, "mfu": mfu}
    print(json.dumps({"row": row.key, **result, "seconds": round(seconds, 1)}), flush=True)
    return result


def asdict_communication(communication: Any) -> dict[str, float]:
    """Names that say what they are of."""
    return {"communication_ms": communication.milliseconds, "exposed_ms": communication.exposed}


def print_rows(known: dict[str, Any]) -> None:
    """Print what docs/scaling.md shows.

    Ratios are to one GPU with as many samples a GPU, or in all.
    """
    setting, rows = known["setting"], known["rows"]
    on_cpu = setting["device"] == "CPU"
    title = f"{setting['shape']}, {setting['device']}, micro-batch {setting['micro_batch']}"
    title += "; a smoke test, no measurement" if on_cpu else ""
    table = Table(title=title, title_justify="left")
    columns = ("row", "layout", "optimizer", "overlap", "samples", "tokens/s", "of ideal", "MFU", "GiB", "collectives",
               "exposed")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:4] else "right")
    for key, row in rows.items():
        if "error" in row:
            table.add_row(key, row["name"], row["error"][:60])
            continue
        layout, ms = Layout(**row["layout"]), row["milliseconds"]
        alone = rows.get("strong1" if key.startswith("strong") else "weak1", {}).get("tokens_per_second")
        ideal = f"{row['tokens_per_second'] / alone / layout.processes:.1%}" if alone else "-"
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        table.add_row(
            key, row["name"], "distributed" if layout.distributed_optimizer else "replicated",
            "yes" if layout.overlap else "no", str(row["global_batch"]), f"{row['tokens_per_second']:,.0f}", ideal, mfu,
            f"{row['peak_gib']:.1f}", *("-" if on_cpu else f"{row[what] / ms:.1%}" for what in SHARES),
        )  # fmt: skip
    Console(width=150).print(table)


def measured_from(known: dict[str, Any], processes: int) -> Measured | None:
    """Return what a projection needs, from the rows.

    None where one of them is missing or it was a CPU.
    """
    rows = known["rows"]
    needed = ("weak1", "strong1", f"weak{processes}", "exposed")
    if known["setting"]["device"] == "CPU" or any("milliseconds" not in rows.get(key, {}) for key in needed):
        return None
    micro = known["setting"]["micro_batch"]
    one, two = (rows[key]["milliseconds"] / 1000 for key in ("weak1", "strong1"))
    counts = [rows[key]["global_batch"] // micro for key in ("weak1", "strong1")]
    seconds = (two - one) / (counts[1] - counts[0])
    moved = 6 * FULL.parameters * (processes - 1) / processes
    overlapped = rows[f"weak{processes}"]
    hidden = (overlapped["communication_ms"] - overlapped["exposed_ms"]) / 1000
    return Measured(
        parameters=FULL.parameters,
        micro_batch_tokens=micro * FULL.seq_length,
        micro_batch_seconds=seconds,
        step_overhead_seconds=one - counts[0] * seconds,
        host_bytes_per_second=moved / (rows["exposed"]["communication_ms"] / 1000),
        gpus_per_node=processes,
        hidden_share=max(0.0, min(1.0, hidden / seconds)),
        flops_per_token=FULL.flops_per_token,
    )


def proof_run(args: argparse.Namespace) -> Job:
    """The run that both proofs compare with.

    Raises:
        StudyError: one process cannot prove anything here, or it was not started or did not end.
    """
    if args.processes < 2 or args.processes % 2:
        raise StudyError(f"--processes {args.processes}: the proofs need an even number, at least 2")
    shape = SMOKE if args.smoke else MIDDLE
    batch = 8 * args.processes
    plan = write_data(shape, args.out / "proof_data", 2 * args.proof_steps * batch)
    folder = args.out / "undisturbed"
    return undisturbed(shape, plan, folder, args.processes, args.precision, args.proof_steps, batch, args.budget)


def known_proofs(args: argparse.Namespace, name: str) -> tuple[Path, dict[str, Any]]:
    """Finished proofs of an earlier call, and where they are.

    Raises:
        StudyError: they are of another setting.
    """
    setting = {"device": device_name(), "processes": args.processes, "steps": args.proof_steps, "smoke": args.smoke,
               "precision": args.precision, "torch": torch.__version__}  # fmt: skip
    path = args.out / f"{name}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"setting": setting, "proofs": {}}
    if known["setting"] != setting:
        raise StudyError(f"{path}: is of {known['setting']}, not {setting}; name another --out")
    return path, known


def elastic(args: argparse.Namespace) -> list[str]:
    """Resume on other ranks, and return the problems.

    A proof that holds is not repeated.
    """
    path, known = known_proofs(args, "elastic")
    problems = []
    for layout in resume_layouts(args.processes):
        if known["proofs"].get(layout.name, {}).get("holds"):
            continue
        try:
            proof = elastic_proof(proof_run(args), layout, args.out / "elastic", args.budget)
        except StudyError as error:
            problems.append(f"elastic: {error}")
            continue
        [known["proofs"][layout.name]] = as_data([proof])
        write_text_atomically(path, json.dumps(known, indent=1) + "\n")
        save(args)
    for name, told in known["proofs"].items():
        print(
            f"resumed as {name} on {told['processes']}: {told['steps']} steps, sample numbers "
            f"{'equal' if told['same_samples'] else 'DIFFER'} (the first: {told['first_samples']} ...), losses within "
            f"{told['largest_difference']:.3g} (first step {told['first_difference']:.3g}, tolerance "
            f"{told['tolerance']:.3g})"
        )
    return problems + [f"elastic: {name} does not hold" for name, told in known["proofs"].items() if not told["holds"]]


def lost(args: argparse.Namespace) -> list[str]:
    """Lose a rank, and return the problems.

    A proof that holds is not repeated.
    """
    path, known = known_proofs(args, "lost")
    if not known["proofs"].get("lost", {}).get("holds"):
        whole = proof_run(args)
        proof = lost_rank_proof(whole, args.out / "lost", max(1, args.proof_steps // 2), args.timeout, args.budget)
        [known["proofs"]["lost"]] = as_data([proof])
        write_text_atomically(path, json.dumps(known, indent=1) + "\n")
    told = known["proofs"]["lost"]
    print(
        f"rank {told['victim']} was killed after step {told['killed_after_step']}; the job ended after "
        f"{told['seconds']} s with exit code {told['exit_code']} and said:\n    "
        + told["message"].replace("\n", "\n    ") +
        f"\nthe next start went on from step {told['resumed_from']}: sample numbers "
        f"{'equal' if told['repeats'] else 'DIFFER'}, losses within {told['largest_difference']:.3g} of the "
        f"undisturbed run's (tolerance {told['tolerance']:.3g})"
    )  # fmt: skip
    return [] if told["holds"] else ["lost: does not hold"]


def print_projection(args: argparse.Namespace) -> None:
    """A table of steps on more nodes.

    Raises:
        StudyError: the network was not given.
    """
    if args.network_gigabytes is None or args.hop_microseconds is None:
        raise StudyError("--project needs --network-gigabytes and --hop-microseconds: no run on one node knows them")
    if args.network_gigabytes <= 0 or args.hop_microseconds < 0:
        raise StudyError("--network-gigabytes must be above 0, --hop-microseconds at least 0")
    measured = load_measured(args.project)
    network = Network(args.network_gigabytes * 1e9, args.hop_microseconds * 1e-6)
    found = project(measured, network, args.nodes, args.micro_batches, args.global_micro_batches)
    title = (
        f"Computed, not measured: {args.network_gigabytes:g} GB/s and {args.hop_microseconds:g} us a hop are assumed"
    )
    table = Table(title=title, title_justify="left")
    for name in ("nodes", "GPUs", "micro-batches", "s a step", "exposed s", "tokens/s", "efficiency", "MFU"):
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(
            str(row.nodes), str(row.gpus), str(row.micro_batches), f"{row.seconds:.3f}", f"{row.exposed_seconds:.3f}",
            f"{row.tokens_per_second:,.0f}", f"{row.efficiency:.1%}", f"{row.model_flops_per_gpu / PEAK_FLOPS:.1%}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(run_tool(main))
