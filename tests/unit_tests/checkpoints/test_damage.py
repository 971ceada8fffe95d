"""The law: whatever befalls a file of a checkpoint, it is noticed, and no file runs code."""

import io
import json
import os
import pickle
import shutil
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from megatron_kaiyuan.checkpoints.checksums import (
    CHECKSUMS_NAME,
    SummedFile,
    collect_sums,
    read_checksums,
    sum_bytes,
    sum_file,
)
from megatron_kaiyuan.checkpoints.damage import damage, verify
from megatron_kaiyuan.checkpoints.reading import (
    Checkpoint,
    iteration_folder,
    open_checkpoint,
    read_tracker,
    write_checkpoint,
)
from megatron_kaiyuan.checkpoints.recovery import agree_on_start, choose_start, open_intact_checkpoint
from megatron_kaiyuan.errors import CheckpointError, ConfigError, ResumeError
from tests.unit_tests.checkpoints.damages import DAMAGES, SEED, flip, hostile_object, hostile_pickle
from tests.unit_tests.checkpoints.test_averaging import save
from tests.unit_tests.checkpoints.test_recovery import arguments

FILES = [".metadata", "__0_0.distcp", "metadata.json", CHECKSUMS_NAME]
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints with checksums, which say so."""
    for iteration in (10, 20, 30):
        save(tmp_path / "run", iteration, kaiyuan_checksums=True)
    return tmp_path / "run"


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """Two checkpoints as stock Megatron writes them: without checksums."""
    for iteration in (10, 20):
        save(tmp_path / "stock", iteration)
        (iteration_folder(tmp_path / "stock", iteration) / CHECKSUMS_NAME).unlink()
    return tmp_path / "stock"


def test_the_checksums_are_those_of_the_library(run: Path) -> None:
    folder = iteration_folder(run, 30)
    sums = read_checksums(folder)
    assert sums is not None
    assert sorted(sums) == sorted(set(FILES) - {CHECKSUMS_NAME})
    for name, expected in sums.items():
        content = (folder / name).read_bytes()
        assert (expected.bytes, expected.xxh3_128) == (len(content), xxhash.xxh3_128(content).hexdigest())
    assert str(verify(folder)).startswith("verified: 3 files, ")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_of_any_file_falls_back_to_the_checkpoint_before(
    run: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[kind](iteration_folder(run, 30) / name)
    start = agree_on_start(arguments(run, run))
    assert start.step == 20
    assert "iter_0000030 has " in start.announcement
    assert name in start.announcement
    assert start.announcement.endswith("FALLING BACK to the checkpoint of iteration 20, the newest intact one")
    printed = capsys.readouterr()
    assert "iter_0000020 is verified: 3 files" in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_tools_refuse_any_damage_with_a_sentence(run: Path, name: str, kind: str) -> None:
    DAMAGES[kind](iteration_folder(run, 30) / name)
    with pytest.raises(ConfigError, match=r"iter_0000030 has .*; restore it from a copy"):
        open_intact_checkpoint(run)


def test_every_bit_of_the_checksums_counts(run: Path) -> None:
    folder = iteration_folder(run, 30)
    whole, sums = (folder / CHECKSUMS_NAME).read_bytes(), read_checksums(folder)
    for bit in range(0, len(whole) * 8, 5):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (folder / CHECKSUMS_NAME).write_bytes(content)
        try:
            same = read_checksums(folder) == sums
        except CheckpointError:
            same = False
        assert not same or bit // 8 == len(whole) - 1, "the newline at the end may become another white space"


def test_every_flipped_bit_is_noticed(run: Path) -> None:
    """Of some hundreds in each file, anywhere."""
    folder, generator = iteration_folder(run, 30), np.random.default_rng(SEED)
    sums = read_checksums(folder)
    assert sums is not None
    for name, expected in sums.items():
        whole = (folder / name).read_bytes()
        for _ in range(300):
            flip(folder / name, generator)
            assert sum_file(folder / name) != expected
            (folder / name).write_bytes(whole)


def test_what_is_written_is_summed_up_as_it_will_be_read(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    with SummedFile(path) as stream:
        assert stream.write(b"small") == 5
        torch.save(torch.arange(1_000_000), stream)
        stream.write(memoryview(bytes(range(256)) * 20_000))
        assert os.fstat(stream.fileno()).st_size == stream.tell(), "who syncs it gets all that was written"
    assert path.stat().st_size > 13_000_000
    assert collect_sums([path]) == {path.name: sum_file(path)}
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_sum_that_another_process_left_is_taken_and_one_that_is_missing_is_made(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with SummedFile(tmp_path / name) as stream:
            stream.write(name.encode())
    (tmp_path / "a").write_bytes(b"damaged before it was collected")
    (tmp_path / ".b.sum").unlink()
    sums = collect_sums([tmp_path / "a", tmp_path / "b"])
    assert sums == {"a": sum_bytes(b"a"), "b": sum_bytes(b"b")}


def test_half_a_file_has_no_sum(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        with SummedFile(path) as stream:
            stream.write(bytes(2 << 20))
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill(tmp_path / "part")
    assert [found.name for found in tmp_path.iterdir()] == ["part"]


def test_a_change_after_the_look_is_noticed_too(run: Path) -> None:
    folder = iteration_folder(run, 30)
    assert verify(folder).damage is None
    DAMAGES["one bit"](folder / "__0_0.distcp")
    assert verify(folder).damage == "has other bytes in __0_0.distcp than were saved (checksum)"


def test_a_file_that_nobody_saved_is_not_loaded(run: Path, tmp_path: Path) -> None:
    (iteration_folder(run, 30) / "common.pt").write_bytes(hostile_object(tmp_path / "mark"))
    assert "has a common.pt that checksums.json does not list" in choose_start(run, None).announcement
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        _ = Checkpoint(iteration_folder(run, 30), 30).arguments
    assert not (tmp_path / "mark").exists()


def test_checkpoints_without_checksums_are_loaded_and_called_not_verified(
    stock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(verify(iteration_folder(stock, 20))).startswith("not verified: it has no checksums.json")
    assert agree_on_start(arguments(stock, stock)).step is None
    assert "iter_0000020 is not verified" in capsys.readouterr().out
    assert open_intact_checkpoint(stock).iteration == 20


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "one bit"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "metadata.json"])
def test_gross_damage_of_checkpoints_without_checksums_falls_back(stock: Path, name: str, kind: str) -> None:
    DAMAGES[kind](iteration_folder(stock, 20) / name)
    start = choose_start(stock, None)
    assert start.step == 10
    assert "iter_0000020 has " in start.announcement


def test_a_flipped_bit_of_metadata_without_checksums_never_ends_in_a_traceback(stock: Path) -> None:
    """Of eight hundred, each either makes it fall back or leaves a checkpoint whose tensors all can be read."""
    folder, generator, unnoticed = iteration_folder(stock, 20), np.random.default_rng(SEED), 0
    whole = (folder / ".metadata").read_bytes()
    for number in range(800):
        if number % 4:
            flip(folder / ".metadata", generator)
        else:
            (folder / ".metadata").write_bytes(whole[: int(generator.integers(len(whole)))])
        reason = damage(folder)
        (folder / ".metadata").write_bytes(whole)
        unnoticed += reason is None
        assert reason is None or reason.startswith("has ")
    assert unnoticed < 400, "names and shapes that make sense cannot be told from the right ones"


def test_a_damaged_tracker_falls_back_to_a_checkpoint_that_is_there(run: Path) -> None:
    generator = np.random.default_rng(SEED)
    contents = [generator.bytes(int(generator.integers(1, 12))) for _ in range(100)]
    contents += [b"\x00\x00", b"\xff\xfe3", "²".encode(), "٣٠".encode(), b"1_0", b"-30", b"9" * 40, b"3", b"0", b"1e1"]
    contents += [bytes([b"30"[0] ^ 1 << bit, b"30"[1]]) for bit in range(8)]
    for content in contents:
        (run / TRACKER).write_bytes(content)
        start = choose_start(run, None)
        text = content.strip()
        if text in (b"10", b"20", b"30"):
            assert start.step is None
        else:
            assert start.step in (10, 20, 30)
            assert "FALLING BACK" in start.announcement


@pytest.mark.parametrize("text", ["release", "²", "30 "])
def test_the_tracker_is_read_as_plain_digits(tmp_path: Path, text: str) -> None:
    assert read_tracker(tmp_path).text is None
    (tmp_path / TRACKER).write_text(text)
    assert read_tracker(tmp_path).iteration == {"30 ": 30}.get(text)


def test_a_damaged_tracker_does_not_disturb_an_average_or_a_tool(run: Path) -> None:
    (run / TRACKER).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"says '\\\\xff\\\\xfe', not an iteration"):
        open_checkpoint(run)


HOSTILE = [".metadata", "common.pt", "common state"]


def plant(directory: Path, name: str, mark: Path) -> None:
    """Make iteration 20 a checkpoint without checksums that makes the file `mark` when it is opened carelessly."""
    folder = iteration_folder(directory, 20)
    if name == ".metadata":
        (folder / name).write_bytes(hostile_pickle(mark))
    elif name == "common.pt":
        (folder / name).write_bytes(hostile_object(mark))
    else:
        shutil.rmtree(folder)
        stored = {"common_state/shard_0_1": io.BytesIO(hostile_object(mark))}
        write_checkpoint(folder, {"output_layer.weight": torch.ones(4, 4)}, stored, {})
        (folder / CHECKSUMS_NAME).unlink()


@pytest.mark.parametrize("name", HOSTILE)
def test_no_file_runs_code_when_a_run_starts_or_a_tool_opens_it(stock: Path, tmp_path: Path, name: str) -> None:
    mark, folder = tmp_path / "mark", iteration_folder(stock, 20)
    plant(stock, name, mark)
    start = choose_start(stock, None)
    assert start.step == 10
    assert "names posix.system, which no checkpoint needs and which could run code" in start.announcement
    with pytest.raises(ConfigError, match=r"posix\.system"):
        open_intact_checkpoint(stock)
    with pytest.raises(CheckpointError, match=r"iter_0000020 has a .* that names posix\.system"):
        _ = Checkpoint(folder, 20).arguments
    assert not mark.exists()


def test_the_hostile_files_of_these_tests_run_code_where_they_are_opened_carelessly(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for opened in (lambda: pickle.loads(hostile_pickle(mark)), lambda: careless(hostile_object(mark))):
        opened()
        assert mark.exists()
        mark.unlink()


def careless(content: bytes) -> None:
    torch.load(io.BytesIO(content), weights_only=False)


@pytest.mark.parametrize("where", ["../secret", "/etc/passwd", "a/b", "", ".."])
def test_metadata_cannot_point_outside_its_folder(stock: Path, where: str) -> None:
    path = iteration_folder(stock, 20) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = where
    path.write_bytes(pickle.dumps(metadata))
    assert "points outside its folder" in choose_start(stock, None).announcement


def test_an_asked_step_that_is_damaged_is_refused(run: Path) -> None:
    DAMAGES["one bit"](iteration_folder(run, 20) / "__0_0.distcp")
    with pytest.raises(ResumeError, match=r"--ckpt-step 20: .*iter_0000020 has other bytes in __0_0\.distcp"):
        choose_start(run, 20)


def test_a_release_that_is_damaged_is_refused(run: Path) -> None:
    shutil.move(iteration_folder(run, 30), run / "release")
    (run / TRACKER).write_text("release")
    assert choose_start(run, None).step is None
    DAMAGES["one bit"](run / "release" / "__0_0.distcp")
    with pytest.raises(ResumeError, match="release has other bytes in"):
        choose_start(run, None)


def test_what_megatron_stores_beside_the_tensors_is_data(tmp_path: Path) -> None:
    """The list of classes holds what a run stores: its arguments, enumerations, and the random states."""
    import random
    import signal
    from types import SimpleNamespace

    values = {
        "exit_signal": signal.SIGTERM,
        "params_dtype": torch.float16,
        "path": tmp_path,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "nested": SimpleNamespace(a=[1, (2.0, None)], b={"c": {1}}),
    }
    save(tmp_path, 10, **values)
    loaded = open_intact_checkpoint(tmp_path).arguments
    assert isinstance(loaded, Namespace)
    assert loaded.path == tmp_path
    assert loaded.exit_signal is signal.SIGTERM
    np.testing.assert_array_equal(loaded.numpy[1], np.random.get_state()[1])
    assert loaded.nested.b == {"c": {1}}


def test_the_description_of_the_format_is_checked(stock: Path) -> None:
    folder = iteration_folder(stock, 20)
    for content in ('{"sharded_backend": "zarr"}', "[]", '{"sharded_backenc": "torch_dist"}', "[" * 100_000):
        (folder / "metadata.json").write_text(content)
        with warnings.catch_warnings():
            assert "has a metadata.json" in str(damage(folder))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    assert damage(folder) is None
