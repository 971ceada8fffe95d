"""Opening many shards: side by side, through the kernel's cache, and with the results of one after the other."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from megatron_kaiyuan.data import CurriculumDataset, Plan, open_source
from megatron_kaiyuan.documents.rank_index import content_digest, content_digests
from megatron_kaiyuan.errors import ScoreError, ShardError
from megatron_kaiyuan.host import threads
from megatron_kaiyuan.host.maps import OpenMaps, look_up, map_array
from megatron_kaiyuan.host.threads import side_by_side
from megatron_kaiyuan.shards import source
from megatron_kaiyuan.shards.source import open_sources
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_shard, write_source


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 1000])
def test_results_come_in_the_order_of_the_items_and_no_thread_stays(count):
    before = threading.active_count()
    assert side_by_side(lambda item: 2 * item, list(range(count))) == list(range(0, 2 * count, 2))
    assert threading.active_count() == before


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_than_asked_run_at_a_time_and_a_single_one_in_this_thread(most):
    running, seen = [], []

    def work(item):
        running.append(item)
        seen.append((len(running), threading.get_ident()))
        time.sleep(0.002)
        running.remove(item)

    side_by_side(work, list(range(40)), most)
    assert max(count for count, _ in seen) <= most
    assert ({thread for _, thread in seen} == {threading.get_ident()}) == (most == 1)


def test_sources_are_looked_up_at_once_only_as_far_as_their_maps_stay_open(tmp_path, monkeypatch):
    """Else each would close the maps of the others: 5,000 shards took five times as long with 1,024 open files."""
    opened = open_sources(
        {
            name: write_source(tmp_path / name, numbered_documents([2] * 60), cuts=range(1, count))["shards"]
            for name, count in (("a", 60), ("b", 7), ("c", 1))
        }
    )
    for limit, expected in ((64, 0), (120, 1), (500, 4), (16_384, 136)):
        monkeypatch.setattr(source, "open_maps", lambda limit=limit: OpenMaps(limit))
        assert source.sources_at_once(opened.values()) == expected
    assert source.sources_at_once([]) > 16


def test_the_error_is_that_of_the_first_item_that_has_one():
    def work(item):
        if item in (3, 40):
            time.sleep(0.02 if item == 3 else 0)
            raise ShardError(f"item {item}")

    with pytest.raises(ShardError, match="item 3"):
        side_by_side(work, list(range(100)))


def test_waiting_overlaps_and_calls_within_a_call_start_no_further_threads():
    most = []

    def inner(item):
        most.append(threading.active_count())
        time.sleep(0.005)
        return item

    started = time.perf_counter()
    found = side_by_side(lambda first: side_by_side(inner, list(range(first, first + 4))), list(range(32)))
    assert found == [list(range(first, first + 4)) for first in range(32)]
    assert max(most) <= threading.active_count() + 16
    assert time.perf_counter() - started < 32 * 4 * 0.005, "one after the other would take 0.64 s"


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 400_000),
    offset=st.integers(0, 4100),
    dtype=st.sampled_from(["<i4", "<i8", "<u4", "<u8", "<f4", "<f8", ">f4", "<f2", "|i1", "<f16"]),
    wanted=st.integers(0, 9000),
    random=st.booleans(),
)
def test_looking_up_is_indexing_wherever_the_array_begins(tmp_path_factory, count, offset, dtype, wanted, random):
    """Few places and many, of arrays that are aligned and that are not, in small files and large ones."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(count)
    raw = rng.integers(0, 255, offset + count * dtype.itemsize, dtype=np.uint8)
    path = tmp_path_factory.getbasetemp() / "numbers"
    raw.tofile(path)
    places = rng.integers(0, count, wanted)
    found = look_up(map_array(path, dtype, count, offset, random=random), places)
    expected = np.frombuffer(raw.tobytes(), dtype, count, offset)[places]
    assert found.dtype == dtype
    assert found.tobytes() == expected.tobytes()


def test_numbers_that_are_not_mapped_are_looked_up_too():
    numbers = np.arange(1_000_000)
    assert look_up(numbers, np.array([5, 999_999])).tolist() == [5, 999_999]
    assert (look_up(numbers, np.arange(500_000)) == np.arange(500_000)).all()


def write_npy(path, array, version):
    with path.open("wb") as stream:
        npy.write_array(stream, array, version=version)


LAYOUTS = {
    "plain": (np.float32, (1, 0)),
    "double": (np.float64, (1, 0)),
    "half": (np.float16, (1, 0)),
    "whole": (np.int64, (1, 0)),
    "bytes": (np.uint8, (1, 0)),
    "another byte order": (">f4", (1, 0)),
    "another version": (np.float32, (2, 0)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_are_found_however_their_file_is_laid_out(tmp_path, name):
    dtype, version = LAYOUTS[name]
    write_source(tmp_path / "s", numbered_documents([2] * 300), range(300), cuts=(100, 101))
    scores = np.random.default_rng(0).integers(0, 200, 300).astype(dtype)
    for number, (first, stop) in enumerate(((0, 100), (100, 101), (101, 300))):
        write_npy(tmp_path / "s" / f"part-{number:03}.scores.score.npy", scores[first:stop], version)
    opened = open_source("s", str(tmp_path / "s"))
    documents = np.random.default_rng(1).integers(0, 300, 5000)
    assert (opened.scores_of("score", documents) == scores[documents].astype(float)).all()
    assert (opened.load_scores("score") == scores).all()


def test_a_score_file_that_became_shorter_is_named_and_not_read_past_its_end(tmp_path):
    write_shard(tmp_path / "s", numbered_documents([2] * 300), range(300))
    path = tmp_path / "s.scores.score.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ScoreError, match=r"s\.scores\.score\.npy: not a whole \.npy file"):
        open_source("s", str(tmp_path / "s")).scores_of("score", np.arange(3))


@pytest.fixture
def spec(tmp_path):
    """Scored and plain sources of one and of many shards; documents held out; fractions of everything."""
    rng = np.random.default_rng(0)
    lengths, scores = rng.integers(1, 9, 3000).tolist(), rng.integers(0, 50, 3000)
    sources = {
        "many": write_source(tmp_path / "many", numbered_documents(lengths), scores, cuts=range(20, 3000, 31)),
        "one": write_source(tmp_path / "one", numbered_documents(lengths), scores),
        "plain": write_source(tmp_path / "plain", numbered_documents(lengths), cuts=range(50, 3000, 700)),
    }
    parts = {"many": {"keep": "random 30%"}, "one": "bottom 70%", "plain": "all"}
    best = {"many": {"keep": "top 30%", "repeat": 2.5}, "one": {"keep": "top 30%", "repeat": 1.3}}
    phases = (phase_of("shuffled", parts, "p1"), phase_of("curriculum", best, "p2"))
    return plan_of(sources, *phases, validation={"many": {"documents": 40}, "one": {"documents": 3}})


def test_a_plan_opened_by_many_threads_is_the_plan_opened_by_one(spec, monkeypatch):
    monkeypatch.setattr(source, "_MANY_LOOK_UPS", 8)
    few = OpenMaps(5)
    many = CurriculumDataset(Plan.from_spec(spec))
    with monkeypatch.context() as context:
        for module in ("source", "shard", "score_files"):
            context.setattr(f"megatron_kaiyuan.shards.{module}.open_maps", lambda: few)
        assert Plan.from_spec(spec).fingerprint == many.plan.fingerprint
    monkeypatch.setattr(threads._own, "busy", True, raising=False)
    one = CurriculumDataset(Plan.from_spec(spec))
    assert many.plan.fingerprint == one.plan.fingerprint
    assert many.plan.describe() == one.plan.describe()
    for sample in range(0, len(one), 7):
        assert (many[sample]["tokens"] == one[sample]["tokens"]).all()


@pytest.mark.parametrize("count", [1, 7, 8, 300, 20_000])
@pytest.mark.parametrize("name", ["many", "one"])
def test_look_ups_in_a_source_are_those_in_its_shards(spec, name, count):
    opened = open_source(name, spec["sources"][name]["shards"])
    lengths = np.concatenate([shard.lengths for shard in opened.shards])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    documents = np.random.default_rng(count).integers(0, opened.num_documents + 1, count)
    assert (opened.token_starts(documents) == starts[documents]).all()
    inside = documents[documents < opened.num_documents]
    assert (opened.lengths(inside) == lengths[inside]).all()
    assert (opened.scores_of("score", inside) == opened.load_scores("score")[inside]).all()


def test_the_digest_of_shards_and_scores_is_that_of_indexes_already_stored(tmp_path):
    """Its bytes stand in every rank index: another formula would ask users to rank everything again."""
    documents = numbered_documents([3 + number % 7 for number in range(900)])
    write_source(tmp_path / "s", documents, [number * 37 % 101 for number in range(900)], cuts=(100, 500))
    opened = open_source("s", str(tmp_path / "s"))
    assert content_digest(opened, "score") == "adbb1d4e8b658b4b7cf374c6fa29fe9116f094d74ea0a3cba3c45d68c518b6bc"
    assert content_digest(opened) == "93c0f7bedd191b7bc41edc8c3488342326aa7677d2fe8c9fc34309afb9f0f9e5"
    assert content_digest(opened, "missing") == "45081640379646c579fc8bd34941a52afe47e5666638618918fc6b774af600c5"
    several = content_digests([(opened, None), (opened, "score")])
    assert several == [content_digest(opened), content_digest(opened, "score")]


def test_the_order_of_a_plan_is_that_of_plans_already_running(tmp_path):
    """A fingerprint taken before opening was made faster; it covers shards, scores, ranks and random choices."""
    documents = numbered_documents([3 + number % 7 for number in range(900)])
    folder = write_source(tmp_path / "s", documents, [number * 37 % 101 for number in range(900)], cuts=(100, 500))
    phases = (
        phase_of("shuffled", {"s": "random 30%"}, "a"),
        phase_of("curriculum", {"s": {"keep": "top 40%", "repeat": 2.5}}, "b"),
    )
    spec = plan_of({"s": folder}, *phases, validation={"s": {"documents": 7}}, version=1)
    assert Plan.from_spec(spec).fingerprint == "9c9148773ed12491"
    spec["sources"]["s"] |= {"origin": "https://example.org/s", "licence": "odc-by"}  # facts for a release
    assert Plan.from_spec(spec).fingerprint == "9c9148773ed12491"


def test_the_first_damaged_shard_of_the_first_source_is_named(tmp_path):
    for name in ("a", "b"):
        write_source(tmp_path / name, numbered_documents([4] * 40), cuts=range(1, 40))
    for shard in ("a/part-030.bin", "a/part-031.bin", "b/part-000.bin"):
        (tmp_path / shard).write_bytes(b"")
    with pytest.raises(ShardError, match=r"a/part-030\.bin: 0 bytes"):
        open_sources({name: str(tmp_path / name) for name in ("a", "b")})


def test_the_fingerprint_reads_a_few_tokens_and_maps_no_file_of_them(tmp_path):
    """Where the kernel reads 8 MiB around the first touch of a map, 64 probes a source were half a gigabyte."""
    write_source(tmp_path / "s", numbered_documents([5] * 64), cuts=range(1, 64))
    plan = Plan.from_spec(plan_of({"s": {"shards": str(tmp_path / "s")}}, phase_of("shuffled", {"s": "all"})))
    _ = plan.fingerprint
    mapped = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/s/part-000.idx" in mapped
    assert ".bin" not in "".join(line for line in mapped.splitlines() if str(tmp_path) in line)
