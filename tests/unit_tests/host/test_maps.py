"""How many maps stay open, and that an array outlives the closing of its map."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.host.maps import OpenMaps, open_maps
from tests.unit_tests.data.tiny import numbered_documents, write_source


@pytest.fixture
def few_maps(monkeypatch):
    """At most four maps in this test."""
    maps = OpenMaps(4)
    monkeypatch.setattr("megatron_kaiyuan.shards.shard.open_maps", lambda: maps)
    return maps


def open_files(folder):
    return sum(os.path.realpath(entry).startswith(str(folder)) for entry in Path("/proc/self/fd").iterdir())


def read_all(source):
    out = np.empty(source.num_tokens, dtype=np.int64)
    source.read_tokens(0, out)
    return out.tolist()


def test_no_more_maps_than_the_limit_stay_open_and_all_tokens_are_read(tmp_path, few_maps):
    write_source(tmp_path / "s", numbered_documents([5] * 30), cuts=range(1, 30))
    source = open_source("s", str(tmp_path / "s"))
    documents = np.random.default_rng(0).integers(0, 30, 500)
    assert (source.token_starts(documents) == 5 * documents).all()
    assert (source.lengths(documents) == 5).all()
    assert open_files(tmp_path) <= 4
    assert read_all(source) == list(range(150))
    assert open_files(tmp_path) <= 4


def test_an_array_in_use_stays_valid_when_its_map_is_given_up(tmp_path, few_maps):
    write_source(tmp_path / "s", numbered_documents([5] * 10), cuts=range(1, 10))
    shards = open_source("s", str(tmp_path / "s")).shards
    first = shards[0].token_data
    for shard in shards[1:]:
        assert len(shard.token_data) == 5
    assert open_files(tmp_path) <= 5  # the four and the one in use
    assert first.tolist() == [0, 1, 2, 3, 4]
    assert shards[0].token_data.tolist() == first.tolist()


def test_maps_of_a_source_that_is_no_longer_used_are_closed(tmp_path):
    write_source(tmp_path / "s", numbered_documents([5] * 10), cuts=range(1, 10))
    source = open_source("s", str(tmp_path / "s"))
    read_all(source)
    assert open_files(tmp_path) == 10
    del source
    gc.collect()
    assert open_files(tmp_path) == 0


def test_threads_that_read_at_once_get_the_right_tokens(tmp_path, few_maps):
    write_source(tmp_path / "s", numbered_documents([5] * 30), cuts=range(1, 30))
    source = open_source("s", str(tmp_path / "s"))
    wrong = []

    def read(seed):
        for document in np.random.default_rng(seed).integers(0, 30, 300).tolist():
            out = np.empty(5, dtype=np.int64)
            source.read_tokens(int(source.token_starts(np.array([document]))[0]), out)
            if out.tolist() != list(range(5 * document, 5 * document + 5)):
                wrong.append(document)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert open_files(tmp_path) <= 4


def test_the_limit_leaves_room_below_what_the_system_allows():
    allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert 64 <= open_maps().limit < allowed / 2
