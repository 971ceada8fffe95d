"""Say what this machine can do for training, what is missing, and what to do about it. Needs no plan and no GPU."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.examination import GIB, Finding, examine_machine, examine_packages
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.host.version import code_version

__all__ = ["main"]

_CHECKPOINT_BYTES = 14
"""Of a parameter in FP16 or bf16: the weight, the FP32 master weight and Adam's two moments."""
_KEPT_BESIDE = 3
"""Checkpoints beside those that are averaged: the newest two, and the one that is being written."""
_MARKS = {"ok": "ok", "weak": "WEAK", "absent": "-", "broken": "BROKEN"}


def main() -> None:
    """Examine the machine and print one line a fact."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--save", type=Path, default=Path(), metavar="DIR", help="where runs will write; default: here")
    parser.add_argument("--plan", type=Path, help="with --parameters its checkpoints are compared with the disk")
    parser.add_argument("--parameters", type=float, metavar="N", help="of the model, such as 2e9")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for a report of a fault")
    args = parser.parse_args()
    if (args.plan is None) != (args.parameters is None):
        parser.error("--plan PLAN and --parameters N go together: how many checkpoints are kept, and how large each is")
    work = _nearest_folder(args.save)
    findings = list(examine_machine(work))
    findings += _interconnect(findings)
    findings += examine_packages()
    if args.plan is not None:
        findings.append(_disk_for(args.plan, args.parameters, work))
    if args.json:
        facts = {"version": code_version(), "system": platform.platform(), "findings": list(map(asdict, findings))}
        say(json.dumps(facts, indent=2))
    else:
        say(f"megatron_kaiyuan {code_version()}, {platform.platform()}")
        say("\n".join(_lines(findings)))
    if broken := [finding.name for finding in findings if finding.state == "broken"]:
        raise ConfigError(f"{', '.join(broken)}: mend this first; the remedies stand above")


def _nearest_folder(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _interconnect(findings: Sequence[Finding]) -> list[Finding]:
    """The bandwidth between the GPUs, if there are several."""
    gpus = sum(finding.name.startswith("GPU ") for finding in findings)
    if gpus < 2:
        return []
    command = ["megatron_kaiyuan.host.torchrun", "--standalone", "--nproc-per-node", str(gpus)]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "megatron_kaiyuan.host.bandwidth"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    what_for = "data, tensor and pipeline parallelism"
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Finding("NCCL", "broken", problem, what_for, "NCCL_DEBUG=INFO says more; look at nvidia-smi topo -m")]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    value = (
        f"{told['bytes_a_second'] / 1e9:,.0f} GB/s bus bandwidth of an all-reduce over {counted(told['ranks'], 'GPU')}"
    )
    return [Finding("NCCL", "ok", value, what_for)]


def _disk_for(plan: Path, parameters: float, work: Path) -> Finding:
    if not 1 <= parameters < 1e15:
        raise ConfigError(f"--parameters {parameters:g}: give the number of the model's parameters, such as 2e9")
    averaging = Plan.load(plan, simulate=True).spec.averaging
    count = _KEPT_BESIDE + (averaging.last if averaging else 0)
    needed, free = count * _CHECKPOINT_BYTES * parameters, shutil.disk_usage(work).free
    size = _CHECKPOINT_BYTES * parameters / GIB
    value = f"{counted(count, 'checkpoint')} of {size:,.1f} GiB; {free / GIB:,.0f} GiB are free"
    remedy = "" if needed <= free else f"{needed / GIB:,.0f} GiB are needed: another --save or a smaller averaging.last"
    return Finding("disk for the plan", "ok" if needed <= free else "broken", value, str(plan), remedy)


def _lines(findings: Sequence[Finding]) -> list[str]:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        line = f"{_MARKS[finding.state]:<7} {finding.name:<{width}}  {finding.value}  [{finding.what_for}]"
        lines.append(f"{line}\n{'':<8}{'':<{width}}  -> {finding.remedy}" if finding.remedy else line)
    return lines
