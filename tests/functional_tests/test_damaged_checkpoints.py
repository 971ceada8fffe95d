"""The law, with a checkpoint of a real run: whatever befalls a file, a start falls back and a tool refuses, each in a
sentence, and no file runs code."""

import contextlib
import io
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.checkpoints.checksums import CHECKSUMS_NAME
from megatron_kaiyuan.checkpoints.reading import iteration_folder
from megatron_kaiyuan.errors import KaiyuanError
from tests.functional_tests.training_run import train, train_well, write_corpus
from tests.helpers import run_distributed
from tests.unit_tests.checkpoints.damages import DAMAGES, hostile_object, hostile_pickle

OBJECTS = ["common_state/shard_0_1", "rng_state/shard_0.0_1.1"]
LAST = 6


def flags(plan: Path) -> list[str]:
    return ["--plan", str(plan), "--save", "saved", "--load", "saved", "--save-interval", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    train_well(folder, *flags(write_corpus(folder)))
    return folder


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Put the files back afterwards."""
    copy = folder.with_name(f".{folder.name}.copy")
    shutil.copytree(folder, copy)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        copy.rename(folder)


def commands(saved: Path) -> dict[str, list[str]]:
    """A command line for every tool that reads a checkpoint, by the module of its command."""
    last, out = str(iteration_folder(saved, LAST)), str(saved.parent / "out")
    return {
        "average": [str(saved), "--iterations", "3", str(LAST), "--output", out],
        "convert": ["export", last, "--output", out],
        "evaluate": [last, "--plan", str(saved.parent / "plan.yaml")],
        "generate": [last, "--tokenizer", out, "--prompt", "text"],
        "inspect_checkpoint": [last, "--verify"],
    }


def said_by(command: str, words: list[str]) -> str:
    """What a tool says that must fail with a sentence of ours."""
    import importlib

    sys.argv = [command, *words]
    module = importlib.import_module(f"megatron_kaiyuan.commands.{command}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module.main()
        except KaiyuanError as error:
            return str(error)
    raise AssertionError(f"{command} took the checkpoint")


def said_at_a_start(saved: Path) -> str:
    """Why a start does not take the newest checkpoint; it must take the one before."""
    from megatron_kaiyuan.checkpoints.recovery import choose_start

    start = choose_start(saved, None)
    assert start.step == 3, start
    return start.announcement


def damage_each_file(_rank: int, saved: Path) -> list[tuple[str, str, str, str]]:
    """File, damage, who reads it, and what that one says."""
    folder, told = iteration_folder(saved, LAST), []
    for name in sorted(path.name for path in folder.iterdir()):
        for kind, damage in DAMAGES.items():
            with kept(folder):
                damage(folder / name)
                told.append((name, kind, "start", said_at_a_start(saved)))
                told += [(name, kind, tool, said_by(tool, words)) for tool, words in commands(saved).items()]
    return told


def test_whatever_befalls_a_file_a_start_falls_back_and_a_tool_refuses(run: Path) -> None:
    told = run_distributed(damage_each_file, 1, run / "saved", timeout=240)[0]
    assert len(told) == 4 * len(DAMAGES) * 6
    for name, kind, reader, said in told:
        assert f"iter_{LAST:07d} has " in said, (name, kind, reader, said)
        assert name in said, (name, kind, reader, said)
        assert "\n" not in said
    assert not (run / "out").exists()


def plant(folder: Path, name: str, mark: Path) -> None:
    """Let a checkpoint without checksums make the file `mark` when it is opened carelessly.

    Args:
        folder: Of the checkpoint.
        name: Of a file, or of an object in a part.
        mark: Made by whoever runs the code.
    """
    (folder / CHECKSUMS_NAME).unlink()
    if name == "common.pt":
        (folder / name).write_bytes(hostile_object(mark))
        return
    if name == ".metadata":
        (folder / name).write_bytes(hostile_pickle(mark))
        return
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(where for index, where in metadata.storage_data.items() if index.fqn == name)
    part, content = folder / place.relative_path, hostile_object(mark)
    place.offset, place.length = part.stat().st_size, len(content)
    part.write_bytes(part.read_bytes() + content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_each(_rank: int, saved: Path, mark: Path) -> list[tuple[str, str, str]]:
    """Where the code was, who read it, and what that one says."""
    folder, told = iteration_folder(saved, LAST), []
    for name in (".metadata", "common.pt", *OBJECTS):
        with kept(folder):
            plant(folder, name, mark)
            told.append((name, "start", said_at_a_start(saved)))
            told += [(name, tool, said_by(tool, words)) for tool, words in commands(saved).items()]
    return told


def test_no_tool_runs_the_code_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    told = run_distributed(plant_each, 1, run / "saved", mark, timeout=240)[0]
    assert len(told) == 4 * 6
    for name, reader, said in told:
        assert "names posix.system, which no checkpoint needs and which could run code" in said, (name, reader, said)
    assert not mark.exists()


def open_as_megatron_does(_rank: int, saved: Path, mark: Path) -> dict[str, tuple[bool, str]]:
    """Of each hostile object: whether Megatron and torch run it, and what they say when they are not to."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    from megatron_kaiyuan.checkpoints.megatron_files import open_checkpoints_as_data

    folder = iteration_folder(saved, LAST)
    uses: dict[str, Callable[[], Any]] = {
        ".metadata": lambda: FileSystemReader(folder).read_metadata(),
        OBJECTS[0]: lambda: dist_checkpointing.load_common_state_dict(str(folder)),
        OBJECTS[1]: lambda: load({OBJECTS[1]: io.BytesIO()}, checkpoint_id=str(folder), no_dist=True),
    }
    found: dict[str, tuple[bool, str]] = {}
    for name in uses:
        with kept(folder):
            plant(folder, name, mark)
            with contextlib.suppress(BaseException):  # what is loaded is not what it should be
                uses[name]()
            found[name] = (mark.exists(), "")
            mark.unlink(missing_ok=True)
    open_checkpoints_as_data()
    for name in uses:
        with kept(folder):
            plant(folder, name, mark)
            try:
                uses[name]()
            except BaseException as error:  # torch wraps what its readers raise
                found[name] = (found[name][0] and not mark.exists(), str(error))
    return found


def test_megatrons_own_readers_run_code_and_then_do_not(run: Path, tmp_path: Path) -> None:
    """They would: the marks appear until they are told to open checkpoints as data."""
    found = run_distributed(open_as_megatron_does, 1, run / "saved", tmp_path / "mark")[0]
    assert list(found) == [".metadata", *OBJECTS]
    for name, (only_before, said) in found.items():
        assert only_before, name
        assert "names posix.system" in said


@pytest.mark.slow
def test_a_real_start_falls_back_from_a_hostile_checkpoint(run: Path, tmp_path: Path) -> None:
    with kept(run / "saved"):
        plant(iteration_folder(run / "saved", LAST), OBJECTS[0], tmp_path / "mark")
        finished = train(run, *flags(run / "plan.yaml"))
        assert finished.returncode == 0, finished.output[-3000:]
        assert "that names posix.system, which no checkpoint needs" in finished.output
        assert "FALLING BACK to the checkpoint of iteration 3" in finished.output
        assert "> --load saved: iter_0000003 is verified: 3 files" in finished.output
        assert "Traceback" not in finished.output
    assert not (tmp_path / "mark").exists()
