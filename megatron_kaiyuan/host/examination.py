"""What this machine has for training: each fact with what it is for, whether it will do, and what to do if not."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kaiyuan.errors import DeviceError
from megatron_kaiyuan.host import machine
from megatron_kaiyuan.host.devices import DEVICE_VARIABLE

__all__ = ["GIB", "Finding", "examine_machine", "examine_packages"]

GIB = 2**30
_SMALLEST_SHARED = 2**30
_FEWEST_FILES = 4096
_IMPORT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact."""

    name: str
    state: str
    """`ok`, `absent` (can be done without), `weak` (works with a limit) or `broken` (must be mended)."""
    value: str
    what_for: str
    remedy: str = ""


EXTRA = "install with the extra [{0}], as in pip install '.[{0}]'"
PACKAGES = {
    "megatron.core": ("the training framework", "pip install 'megatron-core>=0.19.2,<0.20'", True),
    "transformer_engine.pytorch": ("fused layers, FP8", EXTRA.format("te"), False),
    "apex": ("fused optimizer and norms, where Transformer Engine is absent", "built from its own repository", False),
    "triton": ("our kernels on a GPU", "it comes with torch for CUDA", False),
    "wandb": ("--wandb-project", EXTRA.format("wandb"), False),
    "lm_eval": ("tasks of the language-model evaluation harness", EXTRA.format("eval"), False),
    "gigatoken": ("fast tokenization of large corpora", EXTRA.format("preprocess"), False),
    "orjson": ("fast reading of JSONL", EXTRA.format("preprocess"), False),
    "tiktoken": ("TikTokenizer", EXTRA.format("preprocess"), False),
}
"""Of each package: what it is for, how it is installed, whether nothing works without it."""

_IMPORT = """
import importlib, importlib.metadata as found, json, sys, warnings
warnings.simplefilter("ignore")
module = importlib.import_module(sys.argv[1])
names = found.packages_distributions().get(sys.argv[1].split(".")[0], [])
print(json.dumps(found.version(names[0]) if names else str(getattr(module, "__version__", "version unknown"))))
"""


def examine_machine(work: Path) -> Iterator[Finding]:
    """Return what the machine is, one by one.

    Args:
        work: The folder that a run writes to, or its nearest parent that is there.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", "ok", version, "everything")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield Finding("torch", "ok", f"{torch.__version__}, {cuda}", "everything")
    yield from _devices()
    yield _shared_memory(Path("/dev/shm"))
    yield _open_files()
    free = shutil.disk_usage(work).free
    yield Finding("free disk", "ok" if free > 10 * GIB else "weak", f"{free / GIB:,.0f} GiB at {work}", "checkpoints",
                  "" if free > 10 * GIB else "give --save a folder on a larger disk")  # fmt: skip


def examine_packages() -> Iterator[Finding]:
    """Return for each package whether it imports, in a process of its own: some end the process that imports them."""
    present = {name for name in PACKAGES if _is_installed(name)}
    started = {name: _importing(name) for name in PACKAGES if name in present}
    for name, (what_for, install, needed) in PACKAGES.items():
        if name not in present:
            yield Finding(name, "broken" if needed else "absent", "not installed", what_for, install)
            continue
        version, problem = _outcome(started[name])
        if problem:
            yield Finding(name, "broken", f"does not import: {problem}", what_for, f"mend or remove it: {install}")
        else:
            yield Finding(name, "ok", version, what_for)


def _devices() -> Iterator[Finding]:
    try:
        _, gpus = machine.ask_torch()
    except DeviceError as error:
        problem = str(error).removeprefix("error: ")
        yield Finding("GPU", "broken", problem, "training", "mend it, or choose the CPU: the reason says how")
        return
    if not gpus:
        asked = os.environ.get(DEVICE_VARIABLE) == "cpu" and machine.has_gpu()
        value = f"hidden by {DEVICE_VARIABLE}=cpu" if asked else "none"
        yield Finding("GPU", "absent", value, "training; small models also train on the CPU", "a machine with a GPU")
        return
    for number, gpu in enumerate(gpus):
        yield Finding(f"GPU {number}", "ok", _gpu_value(gpu), "training")


def _gpu_value(gpu: Mapping[str, Any]) -> str:
    formats = "FP16 and bf16" if gpu["capability"] >= [8, 0] else "FP16 only"
    capability = ".".join(map(str, gpu["capability"]))
    return f"{gpu['name']}, {gpu['total_bytes'] / GIB:.0f} GiB, compute capability {capability}: {formats}"


def _shared_memory(folder: Path) -> Finding:
    what_for = "data workers and NCCL"
    try:
        total = shutil.disk_usage(folder).total
    except OSError:
        return Finding("shared memory", "broken", f"{folder} is not there", what_for, "mount it")
    enough = total >= _SMALLEST_SHARED
    remedy = "" if enough else "start the container with --ipc=host or --shm-size=8g"
    return Finding("shared memory", "ok" if enough else "weak", f"{total / GIB:.1f} GiB", what_for, remedy)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _FEWEST_FILES
    value = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} (hard limit {hard:,})"
    return Finding("open files", "ok" if enough else "weak", value, "plans over thousands of shards",
                   "" if enough else "ulimit -n 65536")  # fmt: skip


def _is_installed(name: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(name.split(".")[0]) is not None
    except (ImportError, ValueError):
        return True  # half of it is there


def _importing(name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _IMPORT, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _outcome(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The version, or else the last line of what went wrong."""
    try:
        out, err = process.communicate(timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", f"not within {_IMPORT_SECONDS} seconds"
    if process.returncode == 0:
        return str(json.loads(out.splitlines()[-1])), ""
    if process.returncode < 0:
        return "", f"signal {-process.returncode} ends the process"
    return "", (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
