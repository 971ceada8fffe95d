"""Train by a plan, with the flags of Megatron and of docs/training.md.

Those of the launcher are listed below.
"""

import argparse
import os
import sys

import torch

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.devices import DEVICE_VARIABLE

__all__ = ["launch_command", "main"]

_TRAINER = "megatron_kaiyuan.pretrain"
_LAUNCHER = "megatron_kaiyuan.host.torchrun"
_LAUNCHER_FLAGS = {
    "--nproc-per-node": "processes on this node (default: one for each GPU; one on a machine without)",
    "--nnodes": "nodes; start the same command on each (default 1)",
    "--node-rank": "number of this node, from 0",
    "--master-addr": "host of node 0",
    "--master-port": "a free port there",
    "--rdzv-backend": "torchrun's flag",
    "--rdzv-endpoint": "torchrun's flag",
    "--rdzv-id": "torchrun's flag",
    "--max-restarts": "torchrun's flag",
}
_OF_ONE_NODE = {"--nproc-per-node", "--max-restarts"}


def launch_command(words: list[str], gpus: int) -> list[str]:
    """Return the arguments of Python that train with these words.

    Args:
        words: Of the command line: flags of the launcher and of the trainer, in any order.
        gpus: That this node shows.
    """
    launcher, trainer = _parser().parse_known_args(words)
    given = {f"--{name.replace('_', '-')}": value for name, value in vars(launcher).items() if value is not None}
    if not trainer:
        raise ConfigError("kaiyuan train: give --plan PLAN and the model's flags; examples/ has a complete set")
    if not given and gpus <= 1:
        return ["-m", _TRAINER, *trainer]
    given.setdefault("--nproc-per-node", str(max(1, gpus)))
    # With --standalone, torchrun chooses the port and all else that says how nodes meet, whatever other flags say.
    alone = ["--standalone"] if given.keys() <= _OF_ONE_NODE else []
    flags = [word for flag, value in given.items() for word in (flag, value)]
    return ["-m", _LAUNCHER, *alone, *flags, "-m", _TRAINER, *trainer]


def main() -> None:
    """Become the launcher, or the trainer where there is one process or a launcher has started this one."""
    words = sys.argv[1:]
    if "RANK" in os.environ:
        command = ["-m", _TRAINER, *words]
    else:
        command = launch_command(words, _visible_gpus())
    say("", end="", flush=True)
    os.execv(sys.executable, [sys.executable, *command])


def _visible_gpus() -> int:
    """Return how many GPUs torch sees, without starting them."""
    if os.environ.get(DEVICE_VARIABLE) == "cpu":
        return 0
    return torch.cuda.device_count()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        description=__doc__, usage="%(prog)s [launcher's flags] --plan PLAN <Megatron's flags>", allow_abbrev=False
    )
    for flag, meaning in _LAUNCHER_FLAGS.items():
        spellings = dict.fromkeys((flag, f"--{flag[2:].replace('-', '_')}"))
        parser.add_argument(*spellings, metavar="N", help=meaning)
    return parser
