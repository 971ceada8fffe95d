#!/usr/bin/env python3
"""Do to a run what happens to runs, again and again, and print the table of docs/reliability.md.

python -m benchmarks.faults

Two processes on the CPU, through gloo, that save every three steps, with loader workers. Signals, kills, full disks,
second starts and damaged checkpoints hit one run at random moments, one after the other; it goes on each time. At its
end each of its steps, repeated ones too, must have had the samples and the loss of a run that nobody disturbed, and
all its weights and its optimizer state must be the same bits. Exit code 1 if anything is not as it should be.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.fault_trials import INTERVAL, Chain, Outcome, faults, flip, refused_pretrained
from megatron_kaiyuan.checkpoints.damage import verify
from megatron_kaiyuan.checkpoints.reading import iteration_folder
from megatron_kaiyuan.checkpoints.recovery import check_pretrained
from megatron_kaiyuan.errors import ResumeError
from tests.functional_tests.kill_and_resume import flags_of, lengthen, saved_step
from tests.functional_tests.stopped_run import running
from tests.functional_tests.training_run import write_corpus

_REST = 36
"""Steps without a fault at the end."""


def main() -> int:
    """Try all faults, and return 0 if the run survived every one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1, help="of each fault (default 1)")
    parser.add_argument("--flips", type=int, default=200, help="bits of each file of a checkpoint (default 200)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults whose name has it")
    parser.add_argument("--seed", type=int, default=1, help="of moments, ranks and bits (default 1)")
    args = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the runs would ignore it too, as they should
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        outcomes, differences = try_all(Path(name), args.trials, args.flips, args.seed, args.only)
        seconds = time.monotonic() - began
    print(table(outcomes))
    hung, tracebacks = (sum(getattr(some, name) for some in outcomes.values()) for name in ("hung", "tracebacks"))
    print(f"\n{seconds:.0f} s; {hung} hangs, {tracebacks} tracebacks; differs from the undisturbed run: ", end="")
    print("; ".join(differences) or "nothing")
    problems = [f"{fault}: {problem}" for fault, some in outcomes.items() for problem in some.problems]
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems or differences else 0


def try_all(folder: Path, trials: int, flips: int, seed: int, only: str = "") -> tuple[dict[str, Outcome], list[str]]:
    """Try every fault so often.

    Args:
        folder: For all files.
        trials: Of each fault that happens to a run.
        flips: Bits of each file of a checkpoint.
        seed: Of everything random.
        only: Part of the names of the faults that are tried.

    Returns:
        What came of each fault by its name, and what differs from the undisturbed run.
    """
    plan, choice = write_corpus(folder), random.Random(seed)
    chain = Chain(folder / "disturbed", plan, folder / "undisturbed", seed)
    wanted = [fault for fault in faults(chain) if only in fault.name] * trials
    lengthen(plan, steps := 6 * ((sum(fault.steps for fault in wanted) + _REST) // 6))
    plan.write_text(re.sub(r"repeat: \d+", "repeat: 100", plan.read_text()))
    run_undisturbed(folder / "undisturbed", plan)
    choice.shuffle(wanted)
    for number, fault in enumerate(wanted, 1):
        if (saved := saved_step(chain.folder)) > steps - _REST:
            print(f"the run is at its end: {len(wanted) - number + 1} trials left out", file=sys.stderr)
            break
        print(f"{number} of {len(wanted)}: {fault.name} (saved: {saved})", file=sys.stderr, flush=True)
        chain.try_fault(fault)
    chain.finish()
    outcomes = dict(sorted(chain.outcomes.items(), key=lambda item: [f.name for f in faults(chain)].index(item[0])))
    return outcomes | flip_bits(folder / "undisturbed", plan, flips, choice), chain.differences(steps)


def run_undisturbed(folder: Path, plan: Path) -> None:
    """The run that the other one is compared with."""
    folder.mkdir()
    with running(folder, *flags_of(plan, 100), "--num-workers", "1", processes=2, launcher="ours") as run:
        code, _ = run.end(600)
        assert code == 0, run.output[-3000:]


def flip_bits(folder: Path, plan: Path, flips: int, choice: random.Random) -> dict[str, Outcome]:
    """Flip single bits of each file of a checkpoint: whether a start detects them, in `--load` and as weights."""
    save = folder / "saved"
    checkpoint = iteration_folder(save, saved_step(folder))
    names = sorted(path.name for path in checkpoint.iterdir())
    found: dict[str, Outcome] = {}
    for name in names:
        outcome = found[f"one bit of {name}, looked at"] = Outcome()
        kept = (checkpoint / name).read_bytes()
        for _ in range(flips):
            flip(checkpoint / name, choice)
            outcome.tried += 1
            outcome.survived += verify(checkpoint).damage is not None and _is_refused(save)
            (checkpoint / name).write_bytes(kept)
        if outcome.survived < outcome.tried:
            outcome.problems.append(f"{outcome.tried - outcome.survived} bits were not detected")
    started = found["one bit of --pretrained-checkpoint, a start for each file"] = Outcome()
    for name in names if flips else ():
        started.tried += 1
        problem = refused_pretrained(folder, plan, name, choice)
        started.survived += problem is None
        started.problems += [] if problem is None else [problem]
    return found


def _is_refused(save: Path) -> bool:
    try:
        check_pretrained(save)
    except ResumeError:
        return True
    return False


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown: fault, tried, survived, steps lost at most."""
    rows = [f"| {name} | {some.tried} | {some.survived} | {some.lost} |" for name, some in outcomes.items()]
    head = f"| fault (a save every {INTERVAL} steps) | tried | survived | steps lost, at most |"
    return "\n".join([head, "|---|---|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main())
