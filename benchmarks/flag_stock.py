"""Compare models of random flags with stock Megatron's: weights, loss and gradients, bit for bit with our features off.

    .venv/bin/python -m benchmarks.flag_stock --trials 300 --seed 1

A trial adds the flags of a few random lines of `megatron_kaiyuan/flags/effects_of_models.py` to one command. A line
that Megatron or we refuse is counted and not compared. With SDPA and the fused kernels the model may only round in
another order. One process builds all of them; a trial takes less than a second.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch

from megatron_kaiyuan.flags.effects import EFFECTS
from megatron_kaiyuan.flags.effects_of_models import MODELS
from tests.helpers import run_distributed
from tests.unit_tests.model import command_lines

__all__ = ["main"]

_OTHER = (
    "kaiyuan",
    "minus:",
    "tensorboard",
    "trace",
    "load",
    "save",
    "spec",
    "padded",
    "vocab",
    "DATA:",
    "position-emb",
)
"""Lines of files, of vocabularies that the command fixes, and of our own features."""
_ROUNDING = 1e-3
"""Of FP32 sums in another order, through two layers and back; gradients are below 10."""


def _lines(trials: int, seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    model = len(MODELS.strip().splitlines())
    pool = [f"{effect.given} {effect.flag}" for effect in EFFECTS[:model]]
    pool = [words for words in pool if not any(part in words for part in _OTHER)]
    for _ in range(trials):
        yield " ".join(chance.sample(pool, chance.choice([1, 2, 2, 3, 4])))


def _verdict(words: str) -> str:
    """Return `same`, `refused`, or what differs."""
    from megatron_kaiyuan.host.cpu_platform import CPU_ARGUMENT_DEFAULTS
    from megatron_kaiyuan.training.parsing import parse

    sys.argv = ["pretrain", *command_lines.COMMAND.split(), *words.split()]
    try:
        parse(CPU_ARGUMENT_DEFAULTS)
        arguments = command_lines.arguments_of(words)
        stock = command_lines.step(command_lines._build(copy(arguments), stock=True))
    except (Exception, SystemExit):
        return "refused"
    try:
        off = _ours(arguments, command_lines.FEATURES_OFF)
        fused = off if "--fp16" in words or "--bf16" in words else _ours(arguments, command_lines.FUSED)
    except Exception as error:
        return f"ours fails where stock does not: {type(error).__name__}: {error}"
    if off.keys() != stock.keys():
        return f"other tensors: {sorted(off.keys() ^ stock.keys())[:4]}"
    other = [name for name in stock if not torch.equal(off[name], stock[name])]
    far = [name for name in stock if not torch.allclose(fused[name], stock[name], rtol=_ROUNDING, atol=_ROUNDING)]
    return f"other values: {other[:4]} {far[:4]}" if other or far else "same"


def _ours(arguments: argparse.Namespace, flags: str) -> dict[str, torch.Tensor]:
    return command_lines.step(command_lines._build(command_lines._with_flags(arguments, flags), stock=False))


def _compare(_rank: int, trials: int, seed: int) -> list[tuple[str, str]]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    return [(words, _verdict(words)) for words in _lines(trials, seed)]


def main() -> int:
    """Compare, list what differs, and count.

    Returns:
        1 if a model is not stock's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="random command lines (default 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the random command lines (default 1)")
    args = parser.parse_args()
    results: Any
    [results] = run_distributed(_compare, 1, args.trials, args.seed, timeout=3000)
    for words, verdict in results:
        if verdict not in ("same", "refused"):
            print(f"{words}\n    {verdict}", flush=True)
    counts = Counter(verdict if verdict in ("same", "refused") else "other" for _, verdict in results)
    print(dict(counts))
    return int(counts["other"] > 0)


if __name__ == "__main__":
    sys.exit(main())
