"""Sources past 2**31 documents and 2**32 tokens (sparse files), and of 40,000 shards (hard links)."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan, Segment, open_source
from megatron_kaiyuan.data.vocabulary import largest_token_id
from tests.unit_tests.data.tiny import INT32_CODE, phase_of, plan_of, write_shard

ROOT = Path(__file__).parents[3]
HEADER = struct.Struct("<9sQBQQ")
MANY_DOCUMENTS = 2**31 + 1000
LAST = [[11, 12, 13], [21], [], [31, 32, 33, 34, 35], [41, 42, 43, 44]]
"""The only documents with tokens among so many."""
LONG = [2**31 - 1, 2**31 - 1, 700_000_000]
"""Lengths of three documents: 5.0e9 tokens, 20 GB."""
SHARDS = 40_000


def write_sparse(path, size, pieces):
    """A file of `size` bytes that is a hole but for (offset, bytes) pieces."""
    with path.open("wb") as stream:
        stream.truncate(size)
        for offset, data in pieces:
            stream.seek(offset)
            stream.write(data)
    assert path.stat().st_size == size
    assert path.stat().st_blocks * 512 < 1 << 20, "the file system does not keep files sparse"


def write_sparse_index(path, documents, lengths):
    """An index of `documents` documents, all empty but the last ones, which have these lengths."""
    count = len(lengths)
    pointers = 4 * np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    pieces = [
        (0, HEADER.pack(b"MMIDIDX\x00\x00", 1, INT32_CODE, documents, documents + 1)),
        (34 + 4 * (documents - count), np.array(lengths, np.int32).tobytes()),
        (34 + 4 * documents + 8 * (documents - count), pointers.tobytes()),
        (
            34 + 20 * documents,
            np.array([documents], np.int64).tobytes(),
        ),  # of the boundaries only the last is looked at
    ]
    write_sparse(path, 34 + 12 * documents + 8 * (documents + 1), pieces)


@pytest.fixture
def many_documents(tmp_path):
    write_sparse_index(tmp_path / "many.idx", MANY_DOCUMENTS, [len(document) for document in LAST])
    (tmp_path / "many.bin").write_bytes(np.concatenate(LAST).astype(np.int32).tobytes())
    yield str(tmp_path / "many")
    (tmp_path / "many.idx").unlink()


@pytest.fixture
def many_tokens(tmp_path):
    """Token 1000 + d at the start and 2000 + d at the end of document d, 7 in the middle of the last, else 0."""
    ends = np.cumsum(LONG).tolist()
    starts = [0, *ends[:-1]]
    write_sparse_index(tmp_path / "long.idx", 3, LONG)
    tokens = [(start, 1000 + number) for number, start in enumerate(starts)]
    tokens += [(end - 1, 2000 + number) for number, end in enumerate(ends)] + [(ends[2] - 350_000_000, 7)]
    pieces = [(4 * place, np.array([token], np.int32).tobytes()) for place, token in tokens]
    write_sparse(tmp_path / "long.bin", 4 * ends[2], pieces)
    np.save(tmp_path / "long.scores.score.npy", np.array([3, 1, 2], np.float32))
    yield str(tmp_path / "long")
    (tmp_path / "long.bin").unlink()


def test_documents_past_two_to_the_31_are_counted_found_and_read(many_documents):
    source = open_source("many", many_documents)
    first = MANY_DOCUMENTS - len(LAST)
    assert (source.num_documents, source.num_tokens) == (MANY_DOCUMENTS, 13)
    documents = first + np.arange(len(LAST))
    assert source.lengths(documents).tolist() == [3, 1, 0, 5, 4]
    assert source.token_starts(np.append(documents, MANY_DOCUMENTS)).tolist() == [0, 3, 4, 4, 9, 13]
    holders = [first + number for number, document in enumerate(LAST) for _ in document]
    assert [source.document_of_token(token) for token in range(13)] == holders
    assert source.segment(first + 3, 1, 4) == Segment(many_documents, first + 3, 1, 4)


def test_a_plan_over_more_than_two_to_the_31_documents_gives_every_token_and_its_document(many_documents):
    phase = phase_of("shuffled", {"many": "all"})
    plan = Plan.from_spec(plan_of({"many": {"shards": many_documents}}, phase, seq_length=3))
    order = CurriculumDataset(plan)
    windows = sorted(order[sample]["tokens"].tolist() for sample in range(len(order)))
    assert windows == [[11, 12, 13, 21], [21, 31, 32, 33], [33, 34, 35, 41], [41, 42, 43, 44]]
    numbers = {segment.document for sample in range(4) for segment in order.provenance(sample).segments}
    assert numbers == {MANY_DOCUMENTS - 5, MANY_DOCUMENTS - 4, MANY_DOCUMENTS - 2, MANY_DOCUMENTS - 1}
    assert len(plan.fingerprint) == 16


@pytest.mark.parametrize("keep", ["random 99%", "random 99% by tokens"])
def test_a_random_part_of_more_than_two_to_the_31_documents_opens_at_once(many_documents, keep):
    """16 384 blocks and 64 probes all over the index: half a minute where the kernel reads ahead 8 MiB for each."""
    started = time.perf_counter()
    plan = Plan.from_spec(
        plan_of({"many": {"shards": many_documents}}, phase_of("shuffled", {"many": keep}), seq_length=3)
    )
    selected = plan.phases[0].streams["many"].selected
    assert len(plan.fingerprint) == 16
    assert time.perf_counter() - started < 5, "0.03 s on an idle machine"
    if keep == "random 99%":
        assert selected.num_documents == (MANY_DOCUMENTS * 99 + 50) // 100
    assert 3 < selected.num_tokens <= 13


def test_documents_are_held_out_of_more_than_two_to_the_31_all_over_the_range(many_documents, monkeypatch):
    # nearly all documents are empty here, so that the files stay small
    monkeypatch.setattr("megatron_kaiyuan.data.plan.check_held_out", lambda _opened, _length: None)
    phase = phase_of("shuffled", {"many": "all"})
    spec = plan_of({"many": {"shards": many_documents}}, phase, seq_length=3, validation={"many": {"documents": 50}})
    plan = Plan.from_spec(spec)
    held_out = plan.opened["many"].held_out
    assert (held_out.dtype, len(np.unique(held_out))) == (np.int64, 50)
    assert 0 <= held_out.min() < MANY_DOCUMENTS * 0.2
    assert MANY_DOCUMENTS * 0.8 < held_out.max() < MANY_DOCUMENTS
    assert plan.describe()["phases"][0]["sources"]["many"]["documents"] == MANY_DOCUMENTS - 50


def test_tokens_past_two_to_the_32_are_located_and_read(many_tokens):
    source = open_source("long", many_tokens)
    assert source.num_tokens == sum(LONG) > 2**32
    out = np.empty(4, dtype=np.int64)
    for place, expected in (
        (0, [1000, 0, 0, 0]),
        (LONG[0] - 2, [0, 2000, 1001, 0]),
        (2**32 - 4, [0, 2001, 1002, 0]),
        (sum(LONG) - 350_000_000, [7, 0, 0, 0]),
        (sum(LONG) - 4, [0, 0, 0, 2002]),
    ):
        source.read_tokens(place, out)
        assert out.tolist() == expected
    assert [source.document_of_token(token) for token in (0, 2**31 - 2, 2**31 - 1, 2**32 - 3, 2**32 - 2)] == [
        0, 0, 1, 1, 2,
    ]  # fmt: skip
    assert source.token_starts(np.arange(4)).tolist() == [0, 2**31 - 1, 2**32 - 2, sum(LONG)]


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_a_plan_over_more_than_two_to_the_32_tokens_reads_the_right_ones(many_tokens, order):
    seq_length = 1 << 20
    spec = plan_of(
        {"long": {"shards": many_tokens, "score": "score"}}, phase_of(order, {"long": "all"}), seq_length=seq_length
    )
    samples = CurriculumDataset(Plan.from_spec(spec))
    assert len(samples) == (sum(LONG) - 1) // seq_length
    last = len(samples) - 1
    if order == "curriculum":  # documents 1, 2, 0 in ascending score; the stream ends with the end of document 0
        assert samples[last]["tokens"][-1] == 2000
        segments = samples.provenance(last).segments
        assert segments == [Segment(many_tokens, 0, LONG[0] - seq_length - 1, LONG[0])]
        assert samples.provenance(0).segments[0].document == 1
        assert samples.provenance(last).quantile == pytest.approx((2 / 3, 1))
    else:
        some = range(0, last, 97)
        places = {segment.start for sample in some for segment in samples.provenance(sample).segments}
        assert max(places) > 2**30
        assert len({sample["tokens"].shape for sample in (samples[0], samples[last])}) == 1


def test_held_out_documents_and_a_token_budget_work_past_two_to_the_32_tokens(many_tokens):
    spec = plan_of(
        {"long": {"shards": many_tokens}},
        phase_of("shuffled", {"long": {"keep": "all", "repeat": 3}}, tokens="8B"),
        seq_length=1 << 20,
        validation={"long": {"documents": 1}},
    )
    plan = Plan.from_spec(spec)
    assert plan.num_samples == 8 * 10**9 // (1 << 20)
    held_out = HeldOutDataset(plan, "long")
    assert len(held_out) >= (min(LONG) - 1) // (1 << 20)
    assert held_out[len(held_out) - 1]["tokens"].shape == ((1 << 20) + 1,)


def test_the_largest_id_of_a_huge_shard_is_probed_and_not_read_in_whole(many_tokens):
    started = time.perf_counter()
    assert largest_token_id(open_source("long", many_tokens).shards[0]) >= 0
    assert time.perf_counter() - started < 10


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """Copies of 40 different shards of two documents; hard links to one file count as one shard."""
    folder = tmp_path_factory.mktemp("links")
    originals = tmp_path_factory.mktemp("originals")
    names = [write_shard(originals / f"o{n}", [[3 * n, 3 * n + 1], [3 * n + 2]], [n, -n]) for n in range(40)]
    contents = {(name, suffix): Path(f"{name}{suffix}").read_bytes() for name in names for suffix in (".bin", ".idx")}
    for number in range(SHARDS):
        for suffix in (".bin", ".idx"):
            Path(f"{folder}/s{number:05}{suffix}").write_bytes(contents[names[number % 40], suffix])
    yield folder
    shutil.rmtree(folder)


READ_AT_RANDOM = """
import json, os, resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
import numpy as np
from megatron_kaiyuan.data import open_source
began = time.perf_counter()
source = open_source("many", sys.argv[1])
opened = time.perf_counter() - began
most = 0
for document in np.random.default_rng(0).integers(0, source.num_documents, 6000).tolist():
    start = int(source.token_starts(np.array([document]))[0])
    tokens = np.empty(int(source.lengths(np.array([document]))[0]), dtype=np.int64)
    source.read_tokens(start, tokens)
    base = 3 * (document // 2 % 40)
    assert tokens.tolist() == ([base, base + 1] if document % 2 == 0 else [base + 2]), document
maps = sum(1 for _ in open("/proc/self/maps"))
lengths = int(source.lengths(np.arange(source.num_documents)).sum())
print(json.dumps({"opened": opened, "maps": maps, "files": len(os.listdir("/proc/self/fd")),
                  "shards": len(source.shards), "tokens": source.num_tokens, "lengths": lengths}))
"""


def test_a_source_of_40000_shards_opens_and_is_read_at_random_within_1024_open_files(many_shards):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ_AT_RANDOM, str(many_shards)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["shards"], told["tokens"], told["lengths"]) == (SHARDS, 3 * SHARDS, 3 * SHARDS)
    assert told["files"] < 1024
    assert told["maps"] < 65530 / 10
    assert told["opened"] < 60, "about 2 s on an idle machine"
