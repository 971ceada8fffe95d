#!/usr/bin/env python3
"""Does ascending quality help, and does learning-rate decay undo it? The claim of arXiv 2511.18903, tried out.

    python -m studies.curriculum_study --collect                        # where the packages are: text and tokenizer
    python -m studies.curriculum_study --size 50m --minutes 8.5 --concurrent 6    # where the GPU is
    python -m studies.curriculum_study --report-only --plot curriculum.png

Four arms on the same real text, with the same budget, batch, first weights and seeds: (a) uniform order and WSD with a
strong decay, (b) ascending quality and the same WSD, (c) ascending, a constant rate and the average of the last
checkpoints, (d) ascending, a decay to a third of the peak over the last fifth, and the average. `--arms all` adds the
two averages in uniform order, which separate what the order gives from what the average gives. The design, and what may
be concluded, is in docs/curriculum-study.md. Finished runs are never repeated: the same command goes on where it was.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import packing
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.cli import run_tool
from studies.curriculum_study_data import ROOT, SEEDS, StudyData, build, collect
from studies.curriculum_study_runs import (
    ARMS,
    AVERAGED,
    SIZES,
    Clock,
    Run,
    Study,
    conduct,
    finished,
    measure_rate,
    plan_of,
)

MEGABYTES = {"code": 1000.0, "prose": 1000.0}
"""Of text, at most: all there is."""
TINY_MEGABYTES = {"code": 4.0, "prose": 1.5}
ONE_PASS = 0.95
"""Share of the tokens that a run takes at most, so that no phase asks for more than its band holds."""
AFTER_TRAINING = 40.0
"""Seconds to average and evaluate, where the budget is derived from the time."""
RESERVE = 0.85
"""Share of the time that the budget counts on: a run that does not end in its call is lost."""
CLAIM = ",".join(arm.key for arm in ARMS[:4])


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="gather the text and train the tokenizer, nothing else")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="model (default: tiny, for two CPU cores)")
    parser.add_argument("--seeds", type=int, default=3, help=f"1 to {len(SEEDS)} (default 3)")
    parser.add_argument("--arms", default=CLAIM, help=f"all, or some of {','.join(arm.key for arm in ARMS)}")
    parser.add_argument("--minutes", type=float, metavar="M", help="of this call; runs that cannot end in it wait")
    parser.add_argument("--calls", type=int, default=1, help="such calls that the budget is meant for (default 1)")
    parser.add_argument("--concurrent", type=int, default=1, metavar="N", help="runs that share the machine")
    parser.add_argument("--tokens", type=int, help="of each run (default: what the minutes allow, at most one pass)")
    parser.add_argument("--tokens-per-second", type=float, help="of all concurrent runs; default: measured")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: bf16 with CUDA, else fp32")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: that of the size)")
    parser.add_argument("--carried", type=Path, help="folder of --collect (default: runs/curriculum_text[_tiny])")
    parser.add_argument("--output", type=Path, help="default: runs/curriculum_SIZE")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that tokenize")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--tar", type=Path, metavar="FILE", help="also pack results/ there, after every run")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the figure, by a headless browser")
    return parser


def main() -> None:
    """Collect, train what is missing, report."""
    args = build_parser().parse_args()
    tiny = args.size == "tiny"
    args.carried = args.carried or Path("runs/curriculum_text_tiny" if tiny else "runs/curriculum_text")
    args.output = args.output or Path(f"runs/curriculum_{args.size}")
    if args.collect:
        size = collect(args.carried, TINY_MEGABYTES if tiny else MEGABYTES, SIZES[args.size].vocab_size)
        print(f"{args.carried}: " + ", ".join(f"{kind} {count / 1e6:.1f} MB" for kind, count in sorted(size.items())))
        return
    clock = Clock(float("inf") if args.minutes is None else 60 * args.minutes)
    failures = [] if args.report_only else train(args, clock)
    if args.tar:  # before the report, which is refused while there is nothing to compare
        pack(args.output / "results", args.tar)
    if args.report_only or comparable(args.output / "results"):
        report(args)
    else:
        print("no report yet: no seed has results of the first arm and of another")
    if failures:
        raise StudyError(f"{len(failures)} runs are missing:\n" + "\n".join(failures))


def chosen_runs(args: argparse.Namespace) -> list[Run]:
    """Seed after seed, so that those that are finished first compare.

    Raises:
        StudyError: an unknown arm, or too many seeds.
    """
    known = {arm.key: arm for arm in ARMS}
    keys = list(known) if args.arms == "all" else args.arms.split(",")
    if unknown := [key for key in keys if key not in known]:
        raise StudyError(f"--arms {args.arms}: {unknown[0]!r} is unknown; name some of {', '.join(known)}")
    if not 1 <= args.seeds <= len(SEEDS):
        raise StudyError(f"--seeds {args.seeds}: the shards have scores for 1 to {len(SEEDS)}")
    return [Run(known[key], seed) for seed in SEEDS[: args.seeds] for key in keys]


def train(args: argparse.Namespace, clock: Clock) -> list[str]:
    """Train every chosen run without a result, and return what went wrong, a line a run."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    began = time.monotonic()
    runs = chosen_runs(args)
    data = build(args.carried, args.output / "data", args.workers)
    told = ", ".join(f"{domain} {count:,}" for domain, count in data.tokens.items())
    print(f"tokens: {told}; rank correlation of score and quality {data.rank_correlation:.3f}", flush=True)
    study = settled(args, data, clock, began)
    results = args.output / "results"
    waiting = [run for run in runs if finished(study, run, results) is None]
    print(f"{len(runs)} runs of {study.tokens:,} tokens, {study.steps:,} steps; {len(waiting)} to train", flush=True)
    for run in waiting:  # a plan that cannot be met is refused before anything is trained
        Plan.from_spec(plan_of(study, run, data))
    durations: list[float] = []

    def one(run: Run) -> str | None:
        needed = max(durations, default=0.0)
        if clock.left < needed:
            return f"{run.name}: not started, {clock.left:.0f} s are left and a run takes {needed:.0f} s"
        try:
            result = conduct(study, run, data, args.output, clock)
        except StudyError as error:
            print(error, file=sys.stderr, flush=True)
            return str(error)
        durations.append(result["seconds"])
        if args.tar:
            pack(results, args.tar)
        print(f"{run.name}: {result['seconds']:.0f} s, {result['tokens_per_second']:,.0f} tokens/s", flush=True)
        return None

    with ThreadPoolExecutor(max_workers=args.concurrent) as pool:
        return [problem for problem in pool.map(one, waiting) if problem]


def settled(args: argparse.Namespace, data: StudyData, clock: Clock, began: float) -> Study:
    """The study that the output folder holds, or a new one whose budget follows from the time.

    Raises:
        StudyError: the folder holds another study, or the time is too short for one.
    """
    path = args.output / "results" / "study.json"
    rate = args.lr or SIZES[args.size].learning_rate
    device = device_name()
    precision = args.precision or ("fp32" if device.endswith("CPU cores") else "bf16")
    study = Study(args.size, 0, rate, precision, data.digest)
    if path.is_file():
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        if args.tokens and args.tokens // study.step_tokens != steps:
            raise StudyError(
                f"--tokens {args.tokens}: {path} has runs of {steps} steps; leave it out to go on with them"
            )
    else:
        steps = budget(args, study, data, clock, began) // study.step_tokens
    if steps < 5 * AVERAGED:
        raise StudyError(f"{steps} steps a run are too few to compare anything: give more --minutes or --calls")
    study = Study(args.size, steps, rate, precision, data.digest)
    content = {"size": study.size, "steps": steps, "tokens": study.tokens, "learning_rate": rate,
               "precision": precision, "data": data.digest, "digest": study.digest, "unique_tokens": data.tokens,
               "rank_correlation": data.rank_correlation, "device": device, "note": ""}  # fmt: skip
    if not path.is_file():
        write_text_atomically(path, json.dumps(content, indent=1) + "\n")
    return study


def device_name() -> str:
    """What trains."""
    import torch  # not before: the processes that damage the text import this module too

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def budget(args: argparse.Namespace, study: Study, data: StudyData, clock: Clock, began: float) -> int:
    """Tokens of a run: as asked for, or what the time allows.

    Raises:
        StudyError: neither is given.
    """
    if args.tokens:
        return int(args.tokens)
    if args.minutes is None:
        raise StudyError("give --minutes, which the budget follows from, or --tokens of a run")
    runs, most = len(chosen_runs(args)), int(ONE_PASS * data.total_tokens)
    trial = Study(study.size, most // study.step_tokens, study.learning_rate, study.precision, study.data_digest)
    start = 0.0
    speed = args.tokens_per_second
    if speed is None:
        probe = measure_rate(trial, data, args.output, args.concurrent, clock)
        speed, start = probe.tokens_per_second, probe.start_seconds
    waves = -(-runs // args.concurrent)
    spent = time.monotonic() - began
    seconds = RESERVE * (args.calls * 60 * args.minutes - spent - waves * (start + AFTER_TRAINING))
    tokens = int(speed * seconds / runs)
    print(f"{speed:,.0f} tokens/s, {start:.0f} s to start, {spent:.0f} s spent: {tokens:,} tokens a run", flush=True)
    if tokens > most:
        print(f"one pass over the text is {most:,} tokens: that is the budget; a larger --size would use the time")
    return min(tokens, most)


def comparable(results: Path) -> bool:
    """Whether some seed has results of the first arm and of another."""
    names = [path.stem.partition("-") for path in results.glob("*-seed*.json")]
    first = {seed for arm, _, seed in names if arm == ARMS[0].key}
    return any(seed in first for arm, _, seed in names if arm != ARMS[0].key)


def report(args: argparse.Namespace) -> None:
    """Tables and page of the results there are.

    Raises:
        StudyError: there are none.
    """
    from studies.curriculum_study_report import draw, print_report, write_page

    results = args.output / "results"
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(results.glob("*-seed*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["arm"], result["seed"]] = result
    if len({result["study"] for result in found.values()}) != 1:
        raise StudyError(f"{results}: {len(found)} results, of more than one study or of none; there must be one")
    told = json.loads((results / "study.json").read_text(encoding="utf-8"))
    told["note"] = "" if "CPU" not in told["device"] else ", smoke test on a CPU: no evidence"
    numbers = print_report(found, told)
    write_text_atomically(args.output / "report.json", json.dumps(numbers, indent=1) + "\n")
    try:
        figure = draw(found, told)
    except ModuleNotFoundError as error:
        print(f"no page: {error}; --report-only makes it where plotly is installed, from the results of --tar")
        return
    write_page(figure, args.output / "report.html")
    print(args.output / "report.html")
    if args.plot:
        from benchmarks.plot_image import write_png

        write_png(figure, args.plot, 1500, 950)


def pack(results: Path, path: Path) -> None:
    """Results as one file, which unpacks into the output folder."""
    whole = (found for found in results.rglob("*") if not found.name.startswith("."))  # others are being written
    packing.pack(path, results.parent, whole)


if __name__ == "__main__":
    sys.exit(run_tool(main))
