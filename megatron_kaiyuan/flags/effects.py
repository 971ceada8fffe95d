"""What each flag changes when it is added to a tiny run on the CPU: a line for each trial.

`benchmarks/flag_effects.py` runs them.

A line holds the flag with its value, the words that both runs are given, and what differs between the two:

- `model`: the number of parameters;
- `loss`: the loss of the first step;
- `steps`: later losses, gradients, rates or evaluations;
- `files`: what is written;
- `refused`: the run ends in a sentence;
- nothing: no number. It is another way to compute or to store the same, or acts on what this run does not have.

Of the first three the earliest is named, because each brings the next. A new line is run before it is believed.
"""

from dataclasses import dataclass

from megatron_kaiyuan.flags.effects_of_models import MODELS
from megatron_kaiyuan.flags.effects_of_runs import RUNS

__all__ = ["EFFECTS", "Effect"]


@dataclass(frozen=True, slots=True)
class Effect:
    """A flag, the command it is added to, and what it changes."""

    flag: str
    """With its value, as on a command line; some need a second flag."""
    given: str
    """Words of both runs; `minus:FLAG` takes a flag out of the command, and `DATA:plan` trains on a plan."""
    shows: frozenset[str]

    @property
    def name(self) -> str:
        """The flag alone."""
        return self.flag.split()[0]


def _parse(rows: str) -> tuple[Effect, ...]:
    effects = []
    for row in rows.strip().splitlines():
        flag, given, shows = (part.strip() for part in row.split("|"))
        effects.append(Effect(flag, given, frozenset(shows.split())))
    return tuple(effects)


EFFECTS = _parse(MODELS) + _parse(RUNS)
