"""A run of two processes that goes from one fault to the next, and must come out as if nothing had happened.

Each trial starts the run where the one before has left it, waits for two saves and a random moment, and does something
to it. What a fault has cost is seen at the next start: its first step shows how many steps are done again.
"""

import json
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_kaiyuan.checkpoints.reading import iteration_folder
from tests.functional_tests.kill_and_resume import different_tensors, flags_of, saved_step
from tests.functional_tests.stopped_run import RunningRun, running

__all__ = ["INTERVAL", "Chain", "Fault", "Outcome", "faults", "flip", "refused_pretrained"]

INTERVAL = 3
"""Steps between two saves: what a fault without warning may cost."""
_STOPS, _ENDS = 30.0, 10.0
"""Seconds in which a run that is asked to stop has saved, and in which one that failed is gone."""
_SMALL = 100_000
"""Bytes that a file may grow to where the disk is full; the parts of a checkpoint are larger."""
_ALIKE = ("consumed_samples", "learning_rate", "loss", "grad_norm", "loss_scale", "sources")
_ALIKE_IF_SKIPPED = tuple(key for key in _ALIKE if key != "learning_rate")
"""Nothing is trained at the rate of a step that overflowed; the line has that of the step before, or of the start."""
_STEP = re.compile(r"\] iteration +(\d+)/")


@dataclass
class Outcome:
    """What came of the trials of a fault."""

    tried: int = 0
    survived: int = 0
    lost: int = 0
    """Steps, at most."""
    hung: int = 0
    tracebacks: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run."""

    name: str
    act: Callable[["Trial"], None]
    may_cost: int = INTERVAL
    """Steps."""
    ends_well: bool = False
    """Whether the exit code has to be 0; else it may not be."""
    waits_for_save: bool = False
    """It happens during a save."""
    flags: tuple[str, ...] = ()
    """Further ones of its run."""
    steps: int = 18
    """That it takes: ten of a start, and some more until it has happened on a busy machine."""


@dataclass
class Trial:
    """A run to which a fault happens."""

    run: RunningRun
    chain: "Chain"
    choice: random.Random

    def launcher(self) -> psutil.Process:
        """The process that was started."""
        return psutil.Process(self.run.process.pid)

    def family(self) -> list[psutil.Process]:
        """Launcher, ranks, loader workers and whatever else they started."""
        return [self.launcher(), *self.launcher().children(recursive=True)]

    def rank(self) -> psutil.Process:
        """One of the ranks."""
        return self.choice.choice(self.run.ranks())


class Chain:
    """The run, and what each fault has cost it."""

    def __init__(self, folder: Path, plan: Path, undisturbed: Path, seed: int) -> None:
        self.folder, self._undisturbed = folder, undisturbed
        self._plan = plan
        self._choice = random.Random(seed)
        self._open: tuple[Fault, int, list[str]] | None = None
        self.outcomes: dict[str, Outcome] = {}
        folder.mkdir()

    def flags(self) -> list[str]:
        """Of every start."""
        return [*flags_of(self._plan, INTERVAL), "--num-workers", "1", "--kaiyuan-keep-checkpoints", "3"]

    def try_fault(self, fault: Fault) -> None:
        """Start the run, let the fault happen, and see how it ends."""
        self.outcomes.setdefault(fault.name, Outcome()).tried += 1
        with running(self.folder, *self.flags(), *fault.flags, processes=2, launcher="ours") as run:
            self._wait(run, fault)
            trial = Trial(run, self, self._choice)
            family, problems = trial.family(), list[str]()
            try:
                fault.act(trial)
                code, _ = run.end(_STOPS if fault.ends_well else _ENDS)
                if (code == 0) != fault.ends_well:
                    problems.append(f"exit code {code}")
            except AssertionError as error:
                problems.append(str(error)[:300])
            _, alive = psutil.wait_procs(family, timeout=_ENDS)
            if alive:
                self.outcomes[fault.name].hung += 1
                problems.append(f"still run after {_ENDS:.0f} s: {alive}")
        self.outcomes[fault.name].tracebacks += "Traceback" in run.output
        steps = [int(number) for number in _STEP.findall(run.output)]
        self._open = fault, max(steps, default=0), problems + ["traceback"] * ("Traceback" in run.output)

    def finish(self) -> None:
        """Run to the end of the plan."""
        with running(self.folder, *self.flags(), processes=2, launcher="ours") as run:
            self._close(run)
            code, _ = run.end(600)
            assert code == 0, run.output[-3000:]

    def differences(self, steps: int) -> list[str]:
        """What differs from the undisturbed run: lines of the metrics, repeated ones too, and tensors at the end."""
        name = Path("saved") / "metrics.jsonl"
        lines = [json.loads(line) for line in (self._undisturbed / name).read_text().splitlines()]
        expected = {line["iteration"]: line for line in lines}
        found: list[str] = []
        for line in filter(None, (self.folder / name).read_text().splitlines()):
            with suppress(json.JSONDecodeError):  # torn by a kill
                entry = json.loads(line)
                alike = _ALIKE if entry["grad_norm"] is not None else _ALIKE_IF_SKIPPED
                wrong = [key for key in alike if entry[key] != expected[entry["iteration"]][key]]
                found += [f"step {entry['iteration']}: {', '.join(wrong)}"] if wrong else []
        return found + different_tensors(self._undisturbed, self.folder, steps)

    def damage_newest(self, name: str) -> Callable[["Trial"], None]:
        """Stop the run, and then flip a bit of a file of its newest checkpoint."""

        def act(trial: Trial) -> None:
            trial.run.process.send_signal(signal.SIGTERM)
            trial.run.process.wait(_STOPS)
            saved = trial.chain.folder / "saved"
            newest = iteration_folder(saved, saved_step(trial.chain.folder))
            path = saved / name if name.startswith("latest") else newest / name
            flip(path, trial.choice)

        return act

    def _wait(self, run: RunningRun, fault: Fault) -> None:
        """Until the run has saved twice and a random moment has come."""
        self._close(run)
        run.wait_for("successfully saved", times=2)
        seen = max(int(number) for number in _STEP.findall(run.output))
        run.wait_for_step(seen + self._choice.randint(1, INTERVAL))
        if fault.waits_for_save:
            run.wait_for("saving checkpoint", times=run.output.count("saving checkpoint") + 1)
        time.sleep(self._choice.uniform(0, 0.06))

    def _close(self, run: RunningRun) -> None:
        """Book the trial before, now that a start shows where it goes on."""
        run.wait_for("] iteration ")
        first = int(_STEP.findall(run.output)[0])
        if self._open is None:
            return
        (fault, reached, problems), self._open = self._open, None
        outcome, lost = self.outcomes[fault.name], max(0, reached + 1 - first)
        outcome.lost = max(outcome.lost, lost)
        if lost > fault.may_cost:
            problems.append(f"{lost} steps lost, from {reached} on")
        outcome.survived += not problems
        outcome.problems += problems
        for problem in problems:
            print(f"{fault.name}: {problem}", file=sys.stderr, flush=True)


def flip(path: Path, choice: random.Random) -> None:
    """Flip a random bit of a file, which keeps its size."""
    content = bytearray(path.read_bytes())
    bit = choice.randrange(len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def faults(chain: Chain) -> list[Fault]:
    """All that is tried."""
    stops = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json", "checksums.json"]
    return [
        *(Fault(f"{number.name} to the launcher", _signal(number), 0, ends_well=True) for number in stops),
        Fault("SIGTERM to one rank", lambda trial: trial.rank().terminate(), 0, ends_well=True),
        Fault("SIGTERM to every process, helpers too", _terminate_all, 0, ends_well=True),
        Fault("SIGKILL of one rank", lambda trial: trial.rank().kill()),
        Fault("SIGKILL of the launcher", lambda trial: trial.launcher().kill()),
        Fault("SIGKILL of a loader worker", lambda trial: trial.choice.choice(trial.run.helpers()).kill()),
        Fault("SIGKILL of everything", _kill_all),
        Fault("SIGKILL of everything during a save", _kill_all, waits_for_save=True),
        Fault("disk full: checkpoint", _fill_disk),
        Fault("disk full: metrics.jsonl", _fill_metrics, 0, ends_well=True),
        Fault("disk full: TensorBoard", _fill_events, 0, ends_well=True, flags=("--tensorboard-dir", "events")),
        Fault("a second start on the folder", _start_again, 0, ends_well=True, steps=250),
        *(
            Fault(f"a bit of {name} of the newest checkpoint", chain.damage_newest(name), 2 * INTERVAL, ends_well=True)
            for name in files
        ),
    ]


def _signal(number: signal.Signals) -> Callable[[Trial], None]:
    return lambda trial: trial.run.process.send_signal(number)


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _terminate_all(trial: Trial) -> None:
    _send(trial.family(), signal.SIGTERM)


def _kill_all(trial: Trial) -> None:
    _send(trial.family(), signal.SIGKILL)


def _fill_disk(trial: Trial) -> None:
    """From now on no file of a rank grows beyond what its small files have."""
    for rank in trial.run.ranks():
        rank.rlimit(psutil.RLIMIT_FSIZE, (_SMALL, _SMALL))
    trial.run.wait_for("failed first:")
    assert "was not written" in trial.run.output.splitlines()[-1], trial.run.output[-500:]


def _fill_metrics(trial: Trial) -> None:
    """Let its disk be full for some steps, then ask the run to stop."""
    path = trial.chain.folder / "saved" / "metrics.jsonl"
    kept = path.with_name("kept.jsonl")
    path.rename(kept)
    path.symlink_to("/dev/full")
    trial.run.wait_for("its metrics are lost until there is space")
    path.unlink()
    kept.rename(path)
    trial.run.process.send_signal(signal.SIGTERM)


def _fill_events(trial: Trial) -> None:
    """It cannot be written any more, which shows when the run is asked to stop."""
    newest = max((trial.chain.folder / "events").iterdir(), key=lambda path: path.stat().st_mtime)
    newest.rename(newest.with_name("kept"))
    newest.symlink_to("/dev/full")
    trial.run.process.send_signal(signal.SIGTERM)
    trial.run.wait_for("its events are lost until there is space")
    newest.unlink()


def _start_again(trial: Trial) -> None:
    """Start a second run, which is refused, while the first goes on and stops when it is asked to."""
    with running(trial.chain.folder, *trial.chain.flags(), processes=2, launcher="ours") as second:
        code, _ = second.end(60)
        assert code, "the second start ran"
        assert "is in use by another run: process" in second.output, second.output[-500:]
        assert "Traceback" not in second.output
    trial.run.process.send_signal(signal.SIGTERM)


def refused_pretrained(folder: Path, plan: Path, name: str, choice: random.Random) -> str | None:
    """Start a run from weights with a flipped bit in one file, and return what was wrong with the refusal, if anything.

    Args:
        folder: Working directory with a run in `saved`, which stays as it is.
        plan: Of the run.
        name: Of the file.
        choice: Chooses the bit.
    """
    shutil.copytree(folder / "saved", weights := folder / "weights")
    try:
        flip(iteration_folder(weights, saved_step(folder)) / name, choice)
        flags = ["new" if flag == "saved" else flag for flag in flags_of(plan, INTERVAL)]
        with running(folder, *flags, "--pretrained-checkpoint", "weights", processes=2, launcher="ours") as run:
            code, _ = run.end(60)
    finally:
        shutil.rmtree(weights)
    told: Any = re.findall(r"^ResumeError: --pretrained-checkpoint weights: .*", run.output, re.MULTILINE)
    return None if code == 1 and told and "Traceback" not in run.output else f"{name}: {code}: {run.output[-500:]}"
