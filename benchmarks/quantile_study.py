#!/usr/bin/env python3
"""The quantile study of benchmarks/quantile_study.yaml as one command, from carried shards to the report.

    python -m benchmarks.quantile_study --prepare                       # where the packages are: shards, to be carried
    python -m benchmarks.quantile_study --concurrent 6 --tar out.tgz    # where the GPU is
    python -m benchmarks.quantile_study --smoke                         # two CPU cores

Every step is the tool that a user would run, so finished runs are kept and an interrupted call goes on. `--smoke`
changes sizes alone: a tiny model, small slices, two seeds. docs/quantile-study.md has the design.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_kaiyuan.cli import run_tool
from megatron_kaiyuan.errors import StudyError

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "benchmarks" / "quantile_study.yaml"
DATA = Path("runs/quantile_domains")
CARRIED = DATA / "carried" / "shards.tar.xz"
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
    parser.add_argument("--tar", type=Path, metavar="FILE", help="pack results and report there")
    return parser


def main() -> None:
    """Prepare, or run the study."""
    args = build_parser().parse_args()
    if args.prepare:
        prepare(args.carried)
        return
    if not (DATA / "shards").is_dir():
        unpack(args.carried)
    study = smaller(args.study) if args.smoke else args.study
    output = Path(yaml.safe_load(study.read_text(encoding="utf-8"))["output"])
    share = [["--task-id", str(number), "--num-tasks", str(args.evaluators)] for number in range(args.evaluators)]
    stages = {
        "slice": [[]],
        "train": [["--concurrent", str(args.concurrent)]],
        "evaluate": share,
        "report": [[]],
    }
    try:
        if importlib.util.find_spec("plotly") is None:
            print("no report: plotly is not installed; unpack --tar where it is, and run the tool's `report` there")
            del stages["report"]
        for stage, commands in stages.items():
            began = time.monotonic()
            together(*(["tools/quantile_benchmark.py", stage, str(study), *more] for more in commands))
            print(f"[{stage}: {time.monotonic() - began:.0f} s]", flush=True)
    finally:
        if args.tar:
            pack(output, args.tar)


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
    content: dict[str, Any] = yaml.safe_load(study.read_text(encoding="utf-8"))
    content["output"] += "_smoke"
    content["seq_length"] = 128
    content["slices"] |= {"tops": ["0%", "80%"], "tokens": 65_536, "min_documents": 10}
    content["model"] = SMALL_MODEL
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    batch = {"micro_batch_size": 16, "global_batch_size": 16}
    content["training"] |= batch | {"tokens": 65_536, "seeds": 2, "precision": precision}
    content["evaluation"] |= {"max_windows": 64}
    path = Path(content["output"]) / "study.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def together(*commands: Sequence[str]) -> None:
    """Run commands of this Python at once.

    Raises:
        StudyError: one of them failed.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    started = [
        subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], env=environment)
        for command in commands
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise StudyError(f"{commands[0][0]} {commands[0][1]} failed with exit codes {codes}; what it said is above")


def pack(output: Path, path: Path) -> None:
    """Everything but checkpoints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for found in sorted(output.rglob("*")):
            if found.is_file() and not any(part in ("checkpoints", "lock") for part in found.parts):
                archive.add(found, str(found.relative_to(output.parent)))


if __name__ == "__main__":
    sys.exit(run_tool(main))
