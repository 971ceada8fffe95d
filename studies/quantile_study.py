#!/usr/bin/env python3
"""The quantile study of studies/quantile_study.yaml as one command, from carried shards to the report.

    python -m studies.quantile_study --prepare                       # where the packages are: shards, to be carried
    python -m studies.quantile_study --concurrent 6 --minutes 9 --tar out.tgz    # where the GPU is
    python -m studies.quantile_study --smoke                         # two CPU cores

Every step is the tool that a user would run, so finished runs are kept and an interrupted call goes on. `--minutes`
ends the training in time to evaluate what is finished, and a step that fails leaves the others theirs. `--smoke`
changes sizes alone: a tiny model, small slices, two seeds. docs/quantile-study.md has the design.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.packing import pack
from benchmarks.scaling_jobs import end_family, family_of
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.cli import run_tool
from megatron_kaiyuan.host.yaml_file import read_yaml
from megatron_kaiyuan.quantile.results import result_path
from megatron_kaiyuan.quantile.runs import read_slices
from megatron_kaiyuan.quantile.study import load_study

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "studies" / "quantile_study.yaml"
DATA = Path("runs/quantile_domains")
CARRIED = DATA / "carried" / "shards.tar.xz"
GRACE_SECONDS = 75.0
"""For a tool to end its training after SIGTERM; it gives the processes of a run 60 s."""
SMALL_MODEL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4,
               "num_query_groups": 2}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="build shards and pack them, nothing else")
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--carried", type=Path, default=CARRIED, help="archive of --prepare")
    parser.add_argument("--smoke", action="store_true", help="the same steps at toy size")
    parser.add_argument("--concurrent", type=int, default=2, help="runs that share the machine")
    parser.add_argument("--evaluators", type=int, default=2, help="processes that evaluate")
    parser.add_argument("--minutes", type=float, help="of this call (default: as long as it takes)")
    parser.add_argument(
        "--evaluation-seconds", type=float, default=120, help="of --minutes, kept for the evaluation (default 120)"
    )
    parser.add_argument("--tar", type=Path, metavar="FILE", help="pack results and report there, after every step")
    return parser


def main() -> None:
    """Prepare, or run the study.

    Raises:
        StudyError: a step failed, or runs have no results.
    """
    args = build_parser().parse_args()
    if args.prepare:
        prepare(args.carried)
        return
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    if not (DATA / "shards").is_dir():
        unpack(args.carried)
    study = smaller(args.study) if args.smoke else args.study
    output = Path(read_yaml(study)["output"])
    forget_unfinished(study, output)
    problems = []
    for stage, commands in stages(args).items():
        kept = GRACE_SECONDS + args.evaluation_seconds if stage == "train" else 0.0
        began = time.monotonic()
        try:
            told = (["tools/quantile_benchmark.py", stage, str(study), *more] for more in commands)
            together(*told, seconds=deadline - kept - began)
        except StudyError as error:  # what is finished can be evaluated and reported all the same
            problems.append(str(error))
        print(f"[{stage}: {time.monotonic() - began:.0f} s]", flush=True)
        if args.tar:
            pack(args.tar, output.parent, worth_packing(output))
    if missing := runs_without_results(study):
        problems.append(f"{len(missing)} runs have no results: {', '.join(missing)}; the same command goes on")
    if problems:
        raise StudyError("\n".join(problems))


def stages(args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Steps in their order, and the options of each of its processes."""
    share = [["--task-id", str(number), "--num-tasks", str(args.evaluators)] for number in range(args.evaluators)]
    found: dict[str, list[list[str]]] = {
        "slice": [[]],
        "train": [["--concurrent", str(args.concurrent)]],
        "evaluate": share,
        "report": [[]],
    }
    if importlib.util.find_spec("plotly") is None:
        print("no report: plotly is not installed; unpack --tar where it is, and run the tool's `report` there")
        del found["report"]
    return found


def forget_unfinished(study: Path, output: Path) -> None:
    """Remove what an interrupted run has saved, where it cannot go on from it: weights without the optimizer's state.

    A run that is asked to end saves first, and would fail at the next start.
    """
    flags = read_yaml(study)["training"].get("flags") or []
    if "--no-save-optim" not in flags:
        return
    for folder in (output / "runs").glob("*"):
        if not (folder / "run.json").is_file():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def runs_without_results(study: Path) -> list[str]:
    """Return the names of runs without results, in the order of the study.

    All names where nothing was cut.

    Raises:
        StudyError: the slices are missing.
    """
    known = load_study(study)
    return [run.name for run in read_slices(known).runs if not result_path(known, run).is_file()]


def prepare(archive: Path) -> None:
    """Shards and tokenizer from the text of this environment, as one file."""
    together(["examples/quantile/prepare.py", "domains"])
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as packed:
        for name in ("shards", "tokenizer"):
            packed.add(DATA / name, name)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


def unpack(archive: Path) -> None:
    """The archive into `runs/quantile_domains`.

    Raises:
        StudyError: there is none.
    """
    if not archive.is_file():
        raise StudyError(
            f"{archive}: no such file, and no {DATA / 'shards'}; run with --prepare first, and carry it here"
        )
    DATA.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        packed.extractall(DATA, filter="data")


def smaller(study: Path) -> Path:
    """A copy of a study at toy size, with an output folder of its own."""
    content: dict[str, Any] = read_yaml(study)
    content["output"] += "_smoke"
    content["seq_length"] = 128
    content["slices"] |= {"tops": ["0%", "80%"], "tokens": 65_536, "min_documents": 10}
    content["model"] = SMALL_MODEL
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    batch = {"micro_batch_size": 16, "global_batch_size": 16}
    content["training"] |= batch | {"tokens": 65_536, "seeds": 2, "precision": precision}
    content["evaluation"] |= {"max_windows": 768}  # fewer hold parts of too few documents of code
    path = Path(content["output"]) / "study.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def together(*commands: Sequence[str], seconds: float = float("inf")) -> None:
    """Run commands of this Python at once, and end them by SIGTERM when the time is over.

    Raises:
        StudyError: one of them failed, or was stopped.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    what = " ".join(commands[0][:2])
    if seconds <= 0:
        raise StudyError(f"{what}: not started, no time is left for it")
    started = [
        subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], env=environment)
        for command in commands
    ]
    until = time.monotonic() + seconds
    try:
        codes = [process.wait(_until(until)) for process in started]
    except subprocess.TimeoutExpired:
        raise StudyError(f"{what}: stopped after {seconds:.0f} s; what is finished stays") from None
    finally:
        _stop(started)
    if any(codes):
        raise StudyError(f"{what} failed with exit codes {codes}; what it said is above")


def _until(moment: float) -> float | None:
    return None if moment == float("inf") else max(0.0, moment - time.monotonic())


def _stop(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let tools end their own runs, and kill what does not end."""
    families = [family_of(process) for process in started if process.poll() is None]
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + GRACE_SECONDS
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_until(until))
    for process in started:
        end_family(process, [member for family in families for member in family])


def worth_packing(output: Path) -> list[Path]:
    """All but checkpoints, which are too large, and records of runs that only a checkpoint could still evaluate."""
    evaluated = {path.stem for path in (output / "results").glob("*.json")}
    return [
        path
        for path in output.rglob("*")
        if not {"checkpoints", "lock"} & set(path.parts) and (path.name != "run.json" or path.parent.name in evaluated)
    ]


if __name__ == "__main__":
    sys.exit(run_tool(main))
