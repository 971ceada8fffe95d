"""Compare runs with a flag and without it: each must differ in what its line says, and in no other number.

    .venv/bin/python -m benchmarks.flag_effects                  # every line of megatron_kaiyuan/flags/effects
    .venv/bin/python -m benchmarks.flag_effects --only moe       # those that hold this text
    .venv/bin/python -m benchmarks.flag_effects --pairs 100      # two random lines on one command

A flag that documents an effect and has none is listed, and so is one that has another effect. A pair must have the
effects of both: of a number that the other flag changes already, nothing can be said.
"""

import argparse
import random
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.flag_fuzz import Outcome, Trials
from megatron_kaiyuan.flags.effects import EFFECTS, Effect

__all__ = ["Observed", "Runs", "differences", "observed"]

_NUMBERS = ("model", "loss", "steps")
_VARYING = re.compile(r"elapsed time|throughput|consumed samples|TFLOP")
_OWN_LINES = re.compile(
    r"\.\.\.\.|\] iteration +\d+/|validation loss at|time \(ms\)|datetime|seconds|megatron\.core\.datasets|main_grad|"
    r"> megatron_kaiyuan |warn|Warning|WARNING"
)
"""Lines whose words say nothing: arguments, steps, times, caches, and warnings of the libraries."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What a run shows of itself."""

    verdict: str
    parameters: str
    first: str
    """Loss of the first step."""
    steps: tuple[str, ...]
    """All further numbers of the steps and evaluations."""
    files: tuple[str, ...]
    log: frozenset[str]
    """Other lines, without their numbers."""


def observed(outcome: Outcome) -> Observed:
    """Return what a run shows, without times and folders."""
    lines = outcome.output.splitlines()
    steps = [_numbers(line) for line in lines if re.search(r"\] iteration +\d+/", line)]
    evaluations = [line.strip(" |") for line in lines if line.startswith(" validation loss at")]
    first = next((number for number in (steps or [[]])[0] if number.startswith("lm loss:")), "")
    parameters = re.search(r"number of parameters on .*: (\d+)", outcome.output)
    return Observed(
        outcome.verdict,
        parameters[1] if parameters else "",
        first,
        tuple(number for step in steps for number in step) + tuple(evaluations),
        outcome.files,
        frozenset(re.sub(r"[-+]?\d[\w.+-]*", "N", line) for line in lines if not _OWN_LINES.search(line)),
    )


def _numbers(line: str) -> list[str]:
    parts = [" ".join(part.split()) for part in line.split("]", 1)[1].split("|")]
    return [part for part in parts if part and not _VARYING.match(part)]


def differences(one: Observed, other: Observed) -> frozenset[str]:
    """Return in what two runs differ.

    `refused`: the other one ended otherwise. `model`: the number of parameters. `loss`: that of the first step.
    `steps`: later losses, gradients, rates or evaluations. `files`: which were written, TensorBoard's tags, and numbers
    of lines. `log`: lines of another kind. Of `model`, `loss` and `steps` only the first, because each brings the next.
    """
    if one.verdict != other.verdict:
        return frozenset({"refused"})
    pairs = {
        "model": (one.parameters, other.parameters),
        "loss": (one.first, other.first),
        "steps": (one.steps, other.steps),
    }
    numbers = [name for name in _NUMBERS if pairs[name][0] != pairs[name][1]]
    rest = [name for name in ("files", "log") if getattr(one, name) != getattr(other, name)]
    return frozenset(numbers[:1] + rest)


class Runs:
    """Runs of command lines, each once."""

    def __init__(self, folder: Path) -> None:
        """Write data and a checkpoint of the two first steps below `folder`."""
        self._trials = Trials(folder)
        self._folder = folder
        self._outcomes: dict[str, Outcome] = {}
        saved = self.outcome(f"--save {folder}/saved --save-interval 1 --train-iters 4 --exit-interval 2")
        assert saved.verdict == "trained", saved.output[-2000:]

    def outcome(self, words: str) -> Outcome:
        """Return how a command line ended, which is run once."""
        if words not in self._outcomes:
            own = [word for word in shlex.split(words.replace("{folder}", str(self._folder))) if word != "DATA:plan"]
            self._outcomes[words] = self._trials.run(own, "plan" if "DATA:plan" in words else "blend")
        return self._outcomes[words]

    def shows(self, effect: Effect, more: str = "") -> frozenset[str]:
        """Return what a flag changes on the command of its line, to which further words are added."""
        given = f"{_steps(effect.given)} {more} {effect.given}"
        without, with_flag = (self.outcome(words) for words in (given, f"{given} {effect.flag}"))
        found = differences(observed(without), observed(with_flag))
        return found & ({*_NUMBERS, "refused"} | effect.shows)  # what is written, only where a line speaks of it

    def reason(self, effect: Effect) -> str:
        """Return why the command with the flag was refused, or nothing."""
        output = self.outcome(f"{_steps(effect.given)}  {effect.given} {effect.flag}").output
        told = [line for line in output.splitlines() if re.match(r"\w*(Error|Stopped): |.*error: ", line)]
        return told[-1] if told else ""


def _steps(given: str) -> str:
    return "" if "train-samples" in given or "DATA:plan" in given else "--train-iters 4"


def _wrong(runs: Runs, effect: Effect, more: str = "") -> str:
    """Return what is not as the line says, or nothing."""
    shows = runs.shows(effect, more)
    return "" if shows == effect.shows else f"{' '.join(sorted(shows)) or 'nothing'} {runs.reason(effect)[:300]}"


def _pairs(count: int, seed: int) -> list[tuple[Effect, Effect]]:
    chance = random.Random(seed)
    usable = [effect for effect in EFFECTS if not {"refused", "files", "log"} & effect.shows]
    return [tuple(chance.sample(usable, 2)) for _ in range(count)]  # type: ignore[misc]


def _try_pair(runs: Runs, one: Effect, other: Effect) -> str:
    """Return what is wrong where one flag is added to the command of the other."""
    words = shlex.split(f"{other.given} {other.flag}")
    if set(words) & set(f"{one.given} {one.flag}".split()) or "minus:" in f"{one.given} {other.given}":
        return ""
    if "DATA:plan" in one.given + other.given or runs.outcome(f"{_steps(one.given)} {one.given}").verdict != "trained":
        return ""
    shows = runs.shows(one, f"{other.given} {other.flag}")
    hidden = shows < one.shows or "refused" in shows
    return f"{' '.join(sorted(shows)) or 'nothing'}" if not hidden and shows != one.shows else ""


def main() -> int:
    """Try the lines, and list those that are wrong.

    Returns:
        1 if there are any.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="try the lines that hold this text")
    parser.add_argument("--pairs", type=int, default=0, help="try this many random pairs instead")
    parser.add_argument("--seed", type=int, default=1, help="of the pairs (default 1)")
    args = parser.parse_args()
    wrong = tried = 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        if args.pairs:
            for one, other in _pairs(args.pairs, args.seed):
                tried += 1
                if said := _try_pair(runs, one, other):
                    wrong += 1
                    print(f"{one.flag} ({one.given}) beside {other.flag} ({other.given}): {said}", flush=True)
        for effect in () if args.pairs else EFFECTS:
            if args.only not in f"{effect.flag} | {effect.given}":
                continue
            tried += 1
            if said := _wrong(runs, effect):
                wrong += 1
                print(f"{effect.flag} | {effect.given} | {' '.join(sorted(effect.shows))}: shows {said}", flush=True)
    print(f"{tried} tried, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
