"""A rank that fails ends within ten seconds with its reason, on one rank and on two, with --save and loader workers."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.functional_tests.kill_and_resume import flags_of, lengthen
from tests.functional_tests.stopped_run import RunningRun, running
from tests.functional_tests.training_run import write_corpus

PATIENCE = 10.0
"""Seconds from the fault to the end of the last process."""
LIMITED = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
LIMITED += "os.execv(sys.argv[1], sys.argv[1:])"
EVALUATION = '''
import importlib.abc, importlib.util, os, sys

class Finder(importlib.abc.MetaPathFinder):
    """Lets the evaluation fail on the last rank."""

    def find_spec(self, name, path, target=None):
        if name != "megatron_kaiyuan.training.loop_observers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            from megatron.training import training
            evaluate = training.evaluate

            def failing(*args, **kwargs):
                print("evaluation begins", flush=True)
                assert int(os.environ["RANK"]) + 1 < int(os.environ["WORLD_SIZE"]), "planted"
                return evaluate(*args, **kwargs)

            training.evaluate = failing

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
'''


def loader_workers(run: RunningRun) -> list[psutil.Process]:
    """Those of the last rank; they are forked, and so have its command line."""
    rank = run.ranks()[-1]
    return [child for child in rank.children() if child.cmdline() == rank.cmdline()]


def nothing(_run: RunningRun, _corpus: Path) -> None:
    """The fault comes by itself."""


def overwrite_tokens(_run: RunningRun, corpus: Path) -> None:
    for path in corpus.glob("*.bin"):
        tokens = np.memmap(path, dtype=np.int32, mode="r+")
        tokens[:] = 5000
        tokens.flush()


def kill_worker(run: RunningRun, _corpus: Path) -> None:
    loader_workers(run)[0].kill()


def kill_save_helper(run: RunningRun, _corpus: Path) -> None:
    helpers = [child for child in run.ranks()[-1].children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(helpers) == 1
    helpers[0].kill()


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and what it says."""

    marker: str
    """In the line after which it happens."""
    happen: Callable[[RunningRun, Path], None]
    said: str
    flags: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    times: int = 1
    is_defect: bool = False
    """Of the program: it is told with its traceback."""


FAULTS = {
    "disk full while saving": Fault(
        "saving checkpoint at", nothing, "File too large", before=(sys.executable, "-c", LIMITED)
    ),
    "token id outside the vocabulary": Fault("successfully saved", overwrite_tokens, "token id 5000", times=2),
    "loader worker killed": Fault("successfully saved", kill_worker, "ran out of memory. Lower --num-workers", times=2),
    "save helper killed": Fault(
        "successfully saved",
        kill_save_helper,
        "the process that writes checkpoints (--async-save; process ",
        flags=("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"),
        times=2,
    ),
    "assertion in evaluation": Fault(
        "evaluation begins", nothing, "AssertionError: planted", flags=("--eval-interval", "5"), is_defect=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_rank_that_fails_ends_the_run_with_its_reason(tmp_path: Path, name: str, ranks: int) -> None:
    fault, corpus = FAULTS[name], tmp_path / "corpus"
    corpus.mkdir()
    plan = write_corpus(corpus)
    lengthen(plan, 600)
    environment = {}
    if fault.is_defect:
        (tmp_path / "sitecustomize.py").write_text(EVALUATION)
        environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    flags = [*flags_of(plan, 4), "--num-workers", "1", *fault.flags]
    launcher = "none" if ranks == 1 else "ours"
    with running(
        tmp_path, *flags, processes=ranks, launcher=launcher, environment=environment, before=fault.before
    ) as run:
        run.wait_for(fault.marker, times=fault.times)
        family = psutil.Process(run.process.pid).children(recursive=True)
        fault.happen(run, corpus)
        code, _ = run.end(timeout=PATIENCE)
        assert code not in (0, None)
        assert fault.said in run.output, run.output[-3000:]
        assert ("Traceback" in run.output) == fault.is_defect, run.output[-3000:]
        assert psutil.wait_procs(family, timeout=3.0)[1] == []
