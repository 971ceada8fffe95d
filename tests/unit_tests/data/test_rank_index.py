"""The stored rank index: right, whole or absent, and refused when stale or damaged."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan, open_source
from megatron_kaiyuan.documents import rank_index
from megatron_kaiyuan.documents.rank_index import (
    build_rank_index,
    index_path,
    load_or_rank,
    open_rank_index,
    save_rank_index,
    verify_rank_index,
    write_rank_index,
)
from megatron_kaiyuan.errors import RankIndexError, ScoreError, ShardError
from megatron_kaiyuan.host.cli import python_command
from megatron_kaiyuan.shards import index_check
from megatron_kaiyuan.shards.score_import import import_scores
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_shard, write_source

DOCUMENTS = 100


@pytest.fixture
def folder(tmp_path):
    scores = [(7 * n) % 10 for n in range(DOCUMENTS)]
    write_source(tmp_path / "s", numbered_documents([n % 6 for n in range(DOCUMENTS)]), scores, [30])
    return tmp_path / "s"


def built(folder, seed=0):
    source = open_source("s", str(folder))
    path = index_path(source, "score")
    save_rank_index(build_rank_index(source, "score", seed), path)
    return source, path


def test_an_index_comes_back_as_it_was_saved(folder):
    source, path = built(folder, seed=3)
    fresh, stored = build_rank_index(source, "score", 3), open_rank_index(path, source, "score")
    assert np.array_equal(fresh.order, stored.order)
    assert np.array_equal(fresh.token_marks, stored.token_marks)
    assert (fresh.seed, fresh.digest) == (stored.seed, stored.digest)
    verify_rank_index(path, source, "score")


@pytest.mark.parametrize("documents", [1, 40, 300_000])
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_an_index_written_while_it_is_sorted_has_the_bytes_of_one_made_in_memory(tmp_path, documents, wide):
    """Over shard boundaries, ties, and several pieces and threads; 1e300 asks for the other way of sorting."""
    prefix = write_shard(tmp_path / "a", [[0, 0]], [0])
    write_shard(tmp_path / "b", [[0]] * documents)
    scores = np.random.default_rng(0).integers(0, 50, documents).astype(np.float64 if wide else np.float32)
    scores[0] = 1e300 if wide else 1
    np.save(tmp_path / "b.scores.score.npy", scores)
    source = open_source("s", [prefix, str(tmp_path / "b")])
    save_rank_index(build_rank_index(source, "score", 7), tmp_path / "memory.rank")
    meter = RecordingMeter()
    write_rank_index(source, "score", tmp_path / "streamed.rank", 7, meter)
    assert (tmp_path / "streamed.rank").read_bytes() == (tmp_path / "memory.rank").read_bytes()
    assert meter.total == meter.done == 2 * (documents + 1)


class RecordingMeter:
    def __init__(self):
        self.total = self.done = 0
        self._lock = threading.Lock()

    def start(self, what, total):
        self.total += total

    def advance(self, amount):
        with self._lock:
            self.done += amount


def test_lengths_that_do_not_add_up_to_the_tokens_are_refused_and_nothing_is_written(folder, monkeypatch):
    """A length changed in the middle of an index too large to be read in whole when it is opened."""
    monkeypatch.setattr(index_check, "CHECKED_BYTES", 0)
    path = folder / "part-001.idx"
    raw = bytearray(path.read_bytes())
    raw[34 + 4 * 20 : 34 + 4 * 21] = (1000).to_bytes(4, "little")
    path.write_bytes(raw)
    source, before = open_source("s", str(folder)), sorted(folder.iterdir())
    for build in (build_rank_index, lambda *args: write_rank_index(*args, index_path(source, "score"))):
        with pytest.raises(ShardError, match=r"part-001\.idx: documents that do not begin where the one before ends"):
            build(source, "score")
    assert sorted(folder.iterdir()) == before


def test_a_nan_score_is_refused_before_anything_is_written(folder):
    scores = np.load(folder / "part-001.scores.score.npy")
    scores[3] = np.nan
    np.save(folder / "part-001.scores.score.npy", scores)
    source, before = open_source("s", str(folder)), sorted(folder.iterdir())
    with pytest.raises(ScoreError, match="1 score is NaN, the first for document 3"):
        write_rank_index(source, "score", index_path(source, "score"))
    assert sorted(folder.iterdir()) == before


def test_an_index_takes_four_and_a_half_bytes_a_document_and_a_page(folder):
    _, path = built(folder)
    assert path.stat().st_size == 4096 + 4 * DOCUMENTS + 8 * (-(-DOCUMENTS // 16) + 1)


def test_building_again_writes_the_same_bytes_and_leaves_nothing_else(folder):
    _, path = built(folder)
    first, before = path.read_bytes(), sorted(folder.iterdir())
    built(folder)
    assert path.read_bytes() == first
    assert sorted(folder.iterdir()) == before
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_rebuilt_index_replaces_the_old_one_whole_and_readers_keep_the_old_one(folder):
    source, path = built(folder, seed=1)
    reader, inode = open_rank_index(path, source, "score"), path.stat().st_ino
    before = reader.order.copy()
    built(folder, seed=2)
    assert path.stat().st_ino != inode  # a new file under the old name: nobody sees a half-written one
    assert np.array_equal(reader.order, before)
    assert not np.array_equal(open_rank_index(path, source, "score").order, before)


def test_an_index_survives_moving_its_folder(folder, tmp_path):
    _, path = built(folder)
    folder.rename(tmp_path / "moved")
    source = open_source("s", str(tmp_path / "moved"))
    verify_rank_index(index_path(source, "score"), source, "score")
    assert index_path(source, "score").name == path.name


def test_a_small_source_is_ranked_in_memory_and_gives_the_same_order(folder):
    source = open_source("s", str(folder))
    assert np.array_equal(load_or_rank(source, "score").order, build_rank_index(source, "score").order)
    assert not index_path(source, "score").exists()


def plan_with(folder, **source):
    sources = {"s": {"shards": str(folder), "score": "score", **source}}
    return plan_of(sources, phase_of("curriculum", {"s": "all"}))


def test_a_large_source_without_index_is_refused_with_the_command_that_builds_it(folder, monkeypatch):
    monkeypatch.setattr(rank_index, "_SMALL_SOURCE", 50)
    with pytest.raises(RankIndexError, match=r"source 's': no rank index .* for its 100 documents; build it once") as e:
        Plan.from_spec(plan_with(folder))
    command = shlex.split(str(e.value).splitlines()[1])
    assert command == [python_command(), "tools/rank_data.py", str(folder), "--score", "score"]
    built(folder)
    Plan.from_spec(plan_with(folder))


def test_the_command_names_the_shards_as_the_plan_does(folder, monkeypatch, tmp_path):
    """A part of a folder, in another order or elsewhere, has an index of its own: the command must build that one."""
    monkeypatch.setattr(rank_index, "_SMALL_SOURCE", 50)
    parts = [str(folder / "part-001"), str(folder / "part-00[0]")]
    with pytest.raises(RankIndexError) as caught:
        Plan.from_spec(plan_with(folder, shards=parts, rank_index=str(tmp_path / "my index")))
    command = shlex.split(str(caught.value).splitlines()[1])
    assert command[2:] == [*parts, "--score", "score", "--output", str(tmp_path / "my index")]


def test_an_index_that_the_plan_names_must_exist_even_for_a_small_source(folder, tmp_path):
    with pytest.raises(RankIndexError, match=r"no rank index .*elsewhere"):
        Plan.from_spec(plan_with(folder, rank_index=str(tmp_path / "elsewhere")))


@pytest.mark.parametrize("change", ["scores", "documents", "sidecar gone", "one more shard"])
def test_a_stale_index_is_refused_with_the_command_that_rebuilds_it(folder, change):
    source, path = built(folder)
    if change == "scores":
        np.save(folder / "part-001.scores.score.npy", np.zeros(70, np.float32))
    elif change == "documents":
        write_shard(folder / "part-001", [[5]] * 70, range(70))
    elif change == "sidecar gone":
        (folder / "part-001.scores.score.npy").unlink()
    else:
        write_shard(folder / "part-002", [[5]] * 70, range(70))
        source = open_source("s", str(folder))
        assert index_path(source, "score") != path
        return
    with pytest.raises(RankIndexError, match="built from other shards or scores than those of source 's'") as caught:
        open_rank_index(path, open_source("s", str(folder)), "score")
    assert f"{Path(sys.executable).name} tools/rank_data.py {folder} --score score" in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 4095, 4096, 4500, -1])
def test_a_truncated_index_is_refused(folder, size):
    source, path = built(folder)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RankIndexError, match=r"truncated|expected \d+; delete it and run tools/rank_data.py"):
        open_rank_index(path, source, "score")


def test_verify_finds_a_flipped_entry_and_says_where(folder):
    source, path = built(folder)
    raw = bytearray(path.read_bytes())
    raw[-4 * 60] ^= 1  # entry 40 of the order
    path.write_bytes(raw)
    with pytest.raises(RankIndexError, match="1 entry of order differs from a fresh ranking, the first at 40"):
        verify_rank_index(path, source, "score")


@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), header=st.booleans())
def test_a_flipped_bit_anywhere_is_found_by_verify_or_changes_nothing(tmp_path_factory, place, bit, header):
    folder = tmp_path_factory.mktemp("flip") / "s"
    write_source(folder, numbered_documents([n % 6 for n in range(40)]), [(7 * n) % 10 for n in range(40)])
    source, path = built(folder)
    raw = bytearray(path.read_bytes())
    whole = build_rank_index(source, "score")
    raw[int(place * (320 if header else len(raw)))] ^= 1 << bit
    path.write_bytes(raw)
    found = []
    try:
        verify_rank_index(path, source, "score")
    except RankIndexError as error:
        found.append(str(error))
    if found:
        assert str(path) in found[0]
        return
    stored = open_rank_index(path, source, "score")
    assert np.array_equal(stored.order, whole.order)
    assert np.array_equal(stored.token_marks, whole.token_marks)
    assert stored.seed == whole.seed or len(set(source.load_scores("score").tolist())) == 40


@pytest.mark.parametrize("header", [b"[]", b"{}", b"null", b'{"documents": "many"}', b"{"])
def test_a_damaged_header_is_refused(folder, header):
    source, path = built(folder)
    raw = path.read_bytes()
    path.write_bytes((raw[:8] + len(header).to_bytes(8, "little") + header).ljust(4096, b"\0") + raw[4096:])
    with pytest.raises(RankIndexError, match=r"damaged header .*; delete it and run tools/rank_data\.py"):
        open_rank_index(path, source, "score")


def test_the_header_says_what_was_ranked(folder):
    _, path = built(folder, seed=2)
    raw = path.read_bytes()
    assert raw[:8] == b"KYRANK01"
    header = json.loads(raw[16 : 16 + int.from_bytes(raw[8:16], "little")])
    assert (header["documents"], header["stride"], header["dtype"], header["seed"]) == (100, 16, "uint32", 2)


def test_a_failed_write_leaves_neither_index_nor_temporary_file(folder, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    before = sorted(folder.iterdir())
    source = open_source("s", str(folder))
    for name in ("fsync", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no_space)
            with pytest.raises(OSError, match="No space left"):
                write_rank_index(source, "score", index_path(source, "score"))
        assert sorted(folder.iterdir()) == before
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        built(folder)
    assert sorted(folder.iterdir()) == before


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(folder, monkeypatch):
    _, path = built(folder)
    whole, pwrite = path.read_bytes(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, bytes(data)[:7], offset))
    write_rank_index(open_source("s", str(folder)), "score", path)
    assert path.read_bytes() == whole


def damaged_entry(path, entry, value):
    """Overwrite one document number of a stored index of uint32."""
    raw = bytearray(path.read_bytes())
    place = len(raw) - 4 * (DOCUMENTS - entry)
    raw[place : place + 4] = value.to_bytes(4, "little")
    path.write_bytes(raw)


@pytest.mark.parametrize("cuts", [(), (30,)], ids=["one shard", "two shards"])
@pytest.mark.parametrize("value", [0xFF000021, DOCUMENTS, 3], ids=["high byte", "one past the end", "another length"])
def test_a_damaged_entry_is_named_with_its_file_when_it_is_read(tmp_path, cuts, value):
    """The first was "IndexError: tuple index out of range"; the last gave tokens of no document."""
    lengths = [5 + n % 6 for n in range(DOCUMENTS)]
    entry = write_source(tmp_path / "s", numbered_documents(lengths), range(DOCUMENTS), cuts)
    _, path = built(tmp_path / "s")
    damaged_entry(path, 55, value)
    order = CurriculumDataset(plan_of_scored(entry))
    read = 0
    for sample in range(len(order)):
        for ask in (order.__getitem__, order.provenance, order.band_tokens):
            try:
                ask(sample)
                read += 1
            except RankIndexError as error:
                message = str(error)
                assert str(path) in message
                first, last = map(int, re.search(r"\(rank (\d+) to (\d+)\)", message).groups())
                assert first <= 55 <= last < DOCUMENTS
                assert f"{Path(sys.executable).name} tools/rank_data.py {tmp_path}/s --score score --verify" in message
    assert 3 * len(order) - 4 * 3 * 16 < read < 3 * len(order) - 3 * 10, "only what lies near the damage is refused"


def plan_of_scored(entry):
    return Plan.from_spec(plan_of({"s": entry}, phase_of("curriculum", {"s": "all"})))


@pytest.mark.parametrize("keep", ["top 45%", "random 50%", "band [44%, 46%)"])
def test_a_damaged_entry_met_at_opening_is_named_too(tmp_path, keep):
    entry = write_source(tmp_path / "s", numbered_documents([5] * DOCUMENTS), [0] * DOCUMENTS)
    _, path = built(tmp_path / "s")
    for place in range(DOCUMENTS):
        damaged_entry(path, place, 0xFF000000 + place)
    spec = plan_of({"s": entry}, phase_of("curriculum", {"s": keep}), validation={"s": {"documents": 2}})
    with pytest.raises(RankIndexError, match=r"part-000\.score\.rank: damaged"):
        Plan.from_spec(spec).describe()


def test_bands_of_a_damaged_index_are_refused_by_its_name(tmp_path):
    entry = write_source(tmp_path / "s", numbered_documents([5] * DOCUMENTS), range(DOCUMENTS))
    _, path = built(tmp_path / "s")
    damaged_entry(path, 50, 0xFF000000)
    order = CurriculumDataset(Plan.from_spec(plan_of({"s": entry}, phase_of("shuffled", {"s": "all"}))))
    with pytest.raises(RankIndexError, match=r"part-000\.score\.rank: damaged"):
        order.band_tokens(0)


def test_damaged_token_marks_are_named_when_they_are_read(tmp_path):
    entry = write_source(tmp_path / "s", numbered_documents([5] * DOCUMENTS), range(DOCUMENTS))
    _, path = built(tmp_path / "s")
    raw = bytearray(path.read_bytes())
    raw[4096 + 8 * 3] ^= 1  # tokens before rank 48
    path.write_bytes(raw)
    order = CurriculumDataset(plan_of_scored(entry))
    with pytest.raises(RankIndexError, match=r"part-000\.score\.rank: damaged"):
        deque((order[sample] for sample in range(len(order))), maxlen=0)


def test_a_folder_that_cannot_be_written_is_told_where_else_the_index_can_lie(folder, tmp_path, monkeypatch):
    def refusing(**_):
        raise PermissionError(13, "Permission denied", str(folder))

    source = open_source("web", str(folder))
    monkeypatch.setattr(tempfile, "mkstemp", refusing)
    with pytest.raises(RankIndexError, match=r"cannot be written \(Permission denied\).*rank_index: FILE") as caught:
        write_rank_index(source, "score", index_path(source, "score"))
    command = shlex.split(str(caught.value).splitlines()[1])
    assert command[1:] == ["tools/rank_data.py", str(folder), "--score", "score", "--output", "FILE"]
    np.save(tmp_path / "scores.npy", np.zeros(DOCUMENTS))
    with pytest.raises(ScoreError, match=r"cannot be written .*Link the shards into a folder of your own") as caught:
        import_scores(source, str(tmp_path / "scores.npy"), "q")
    monkeypatch.undo()
    link, rank = str(caught.value).splitlines()[1:]
    subprocess.run(["bash", "-c", link], cwd=tmp_path, check=True)
    linked = open_source("web", str(tmp_path / "scored"))
    import_scores(linked, str(tmp_path / "scores.npy"), "q")
    assert linked.load_scores("q").tolist() == [0] * DOCUMENTS
    assert shlex.split(rank)[2:] == ["scored", "--score", "q", "--scores", str(tmp_path / "scores.npy")]
