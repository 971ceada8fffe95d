"""Raises the branch scale of a run while it trains, before its products reach the end of FP16.

Overflow: what stands before an output norm (`linear_proj`, silu(gate) * up, `linear_fc2`) grows with training at high
    learning rates, by orders of magnitude in the first hundreds of steps (`model/layers.py`).
Bound: none for the values. At each metered step the smallest headroom among them is compared with H.
Remedy: below H, K rises so far that 2 H is left; after an overflow of one of them, by 4 bits; never past
    `MAX_BRANCH_SCALE_BITS`. The function that is trained stays the same, and so do weights and optimizer.
Cost: nothing beside the meter's readings.
Why not K = 8 from the start: gradients inside the branches are 2^K as large while their values are small, early in a
    run, and the loss scale has to fall for them.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.config import MAX_BRANCH_SCALE_BITS
from megatron_kaiyuan.model.layers import KaiyuanTransformerLayer
from megatron_kaiyuan.model.numerics import ActivationPeak, first_non_finite

__all__ = ["BranchScale", "branch_scale_of", "continue_branch_scale"]

BITS_AFTER_OVERFLOW = 4
_SCALED = (".linear_proj", ".mlp.activation", ".mlp.linear_fc2")
"""Ends of the names of what the scale makes smaller."""
_ARGUMENT = "kaiyuan_branch_scale_bits"


@dataclass
class BranchScale:
    """K of a run, the same on all ranks: they decide by the same peaks at the same steps."""

    bits: int
    """K now."""
    raise_below: float
    """H."""
    told: Callable[[int], None]
    """Called with each new K."""
    _said_that_it_ends: bool = False

    def after_reading(self, peaks: Sequence[ActivationPeak], models: Iterable[Any]) -> str | None:
        """Raise K if it must be.

        Args:
            peaks: Of the whole model, in the order of computation.
            models: This rank's chunks.

        Returns:
            What was done and why, None if nothing was.
        """
        tight = self._tightest(peaks)
        if tight is None or tight.headroom >= self.raise_below:
            return None
        found = f"overflow in {tight.name}" if not tight.headroom else f"headroom {tight.headroom:.3g} in {tight.name}"
        if self.bits == MAX_BRANCH_SCALE_BITS:
            return self._at_its_end(found)
        before, self.bits = self.bits, min(self.bits + self._missing(tight.headroom), MAX_BRANCH_SCALE_BITS)
        for model in models:
            for module in model.modules():
                if isinstance(module, KaiyuanTransformerLayer):
                    module.set_branch_scale(2.0**-self.bits)
        self.told(self.bits)
        return f"{found}, below {self.raise_below:g}: --kaiyuan-branch-scale-bits goes from {before} to {self.bits}"

    def _tightest(self, peaks: Sequence[ActivationPeak]) -> ActivationPeak | None:
        """Return the scaled tensor that is nearest to the end of the range.

        What was computed after an overflow is ignored, because it says nothing.
        """
        culprit = first_non_finite(list(peaks))
        until = len(peaks) if culprit is None else [entry.name for entry in peaks].index(culprit) + 1
        scaled = [entry for entry in peaks[:until] if entry.name.endswith(_SCALED)]
        return min(scaled, key=lambda entry: entry.headroom, default=None)

    def _missing(self, headroom: float) -> int:
        """Bits until twice `raise_below` is left."""
        return math.ceil(math.log2(2 * self.raise_below / headroom)) if headroom else BITS_AFTER_OVERFLOW

    def _at_its_end(self, found: str) -> str | None:
        if self._said_that_it_ends:
            return None
        self._said_that_it_ends = True
        return (
            f"{found}, below {self.raise_below:g}, and --kaiyuan-branch-scale-bits is {self.bits} already, its end; if "
            "the headroom goes on shrinking, lower --lr or raise --weight-decay"
        )


def continue_branch_scale(args: argparse.Namespace, saved: argparse.Namespace | None) -> str | None:
    """Start with the K that the run had reached.

    Args:
        args: Validated arguments of this run.
        saved: Arguments of the run that it continues, if it does.

    Returns:
        What to say of it; None where the command line's K stands.

    Raises:
        ConfigError: K shall rise, but nothing is metered.
    """
    below = args.kaiyuan_raise_branch_scale_below
    if not (below and args.fp16):
        return None
    if not args.kaiyuan_activation_interval:
        raise ConfigError(
            f"--kaiyuan-raise-branch-scale-below {below:g} needs readings of the activations, and "
            "--kaiyuan-activation-interval 0 leaves those after skipped steps alone; name an interval (the default is "
            "100), or remove one"
        )
    now, reached = getattr(args, _ARGUMENT), getattr(saved, _ARGUMENT, 0)
    if reached <= now:
        return None
    setattr(args, _ARGUMENT, reached)
    return f"--kaiyuan-branch-scale-bits {now} becomes {reached}, that of the checkpoint"


def branch_scale_of(args: argparse.Namespace) -> BranchScale | None:
    """Return the branch scale of a run in FP16 that is to raise it.

    Its checkpoints will say how far it has come.
    """
    if not (args.fp16 and args.kaiyuan_raise_branch_scale_below):
        return None

    def tell(bits: int) -> None:
        setattr(args, _ARGUMENT, bits)

    return BranchScale(getattr(args, _ARGUMENT), args.kaiyuan_raise_branch_scale_below, tell)
