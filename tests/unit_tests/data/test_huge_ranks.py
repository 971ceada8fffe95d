"""Rank indexes past 2**31 and 2**32 documents: sparse files to read from, and fakes to build from.

Where the format stores a place for every document, a file with holes holds only the places that the test speaks of.
"""

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan, Segment, open_source
from megatron_kaiyuan.documents import rank_index, ranking
from megatron_kaiyuan.documents.rank_index import content_digest, index_path, open_rank_index, write_rank_index
from megatron_kaiyuan.documents.ranking import STRIDE, tie_hash
from tests.unit_tests.data.test_huge import write_sparse, write_sparse_index
from tests.unit_tests.data.tiny import phase_of, plan_of

BEST = [[11, 12, 13], [21], [31, 32, 33, 34, 35], [41, 42, 43, 44]]
"""The only documents with tokens: the last ones, and, from worst to best, ranked 1, 3, 0, 2 among them."""
RANKED = [2, 0, 3, 1]


@pytest.fixture(params=[2**31 + 1005, 2**32 + 1005], ids=["past 2**31", "past 2**32"])
def huge(request, tmp_path):
    """A shard of very many documents, its scores (all 0 but for the last four) and its rank index."""
    count = request.param
    prefix, first = tmp_path / "huge", count - len(BEST)
    write_sparse_index(prefix.with_suffix(".idx"), count, [len(document) for document in BEST])
    prefix.with_suffix(".bin").write_bytes(np.concatenate(BEST).astype(np.int32).tobytes())
    scores = np.empty(len(BEST), dtype=np.float32)
    scores[RANKED] = [1, 2, 3, 4]
    header = npy_header(count)
    pieces = [(0, header), (len(header) + 4 * first, scores.tobytes())]
    write_sparse(tmp_path / "huge.scores.score.npy", len(header) + 4 * count, pieces)
    write_sparse_ranks(open_source("huge", str(prefix)), [first + number for number in RANKED])
    yield str(prefix)
    for path in tmp_path.iterdir():
        path.unlink()


def npy_header(count):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def write_sparse_ranks(source, best):
    """An index whose last documents are these; of all others it says 0, the number of a document without tokens."""
    count = source.num_documents
    dtype = np.dtype(np.uint32 if count <= 1 << 32 else np.uint64)
    marks = -(-count // STRIDE) + 1
    tokens = [len(BEST[number]) for number in RANKED]
    before = [sum(tokens[: max(0, place - (count - len(best)))]) for place in range(0, count + STRIDE, STRIDE)[-3:]]
    header = rank_index._header(count, sum(tokens), dtype.type, 0, content_digest(source, "score"))
    last_marks = (len(header) + 8 * (marks - 3), np.array(before, np.int64).tobytes())
    last_ranks = (
        len(header) + 8 * marks + dtype.itemsize * (count - len(best)),
        np.array(best, dtype).tobytes(),
    )
    size = len(header) + 8 * marks + dtype.itemsize * count
    write_sparse(index_path(source, "score"), size, [(0, header), last_marks, last_ranks])


def test_a_curriculum_over_very_many_documents_reads_the_best_ones_in_order(huge):
    source = {"shards": huge, "score": "score"}
    plan = Plan.from_spec(plan_of({"huge": source}, phase_of("curriculum", {"huge": "all"}), seq_length=3))
    order = CurriculumDataset(plan)
    assert [order[sample]["tokens"].tolist() for sample in range(len(order))] == [
        [31, 32, 33, 34],
        [34, 35, 11, 12],
        [12, 13, 41, 42],
        [42, 43, 44, 21],
    ]
    count = plan.opened["huge"].source.num_documents
    assert order.provenance(3).segments == [Segment(huge, count - 1, 1, 4), Segment(huge, count - 3, 0, 1)]
    assert order.provenance(3).quantile == ((count - 2) / count, 1)
    assert order.band_tokens(3).tolist() == [0] * 9 + [3]
    assert len(plan.fingerprint) == 16


@pytest.mark.parametrize("keep", ["top 1%", "band [50%, 100%)", "top 99.9% by tokens", "random 99.9%"])
def test_selections_of_very_many_ranks_are_exact_to_one_document(huge, keep):
    source = {"shards": huge, "score": "score"}
    spec = plan_of({"huge": source}, phase_of("curriculum", {"huge": keep}), seq_length=1)
    selected = Plan.from_spec(spec).phases[0].streams["huge"].selected
    count = selected.order.num_documents
    ends = {"top 1%": count - (count * 99 + 50) // 100, "band [50%, 100%)": count - (count + 1) // 2}
    if keep in ends:
        assert selected.num_documents == ends[keep]
        assert selected.num_tokens == 13
    elif "tokens" in keep:
        assert selected.num_tokens == 13
    else:
        assert selected.num_documents == (count * 999 + 500) // 1000


def test_ranks_of_documents_beyond_two_to_the_31_are_found(huge):
    opened = open_source("huge", huge)
    index = open_rank_index(index_path(opened, "score"), opened, "score")
    first = opened.num_documents - len(BEST)
    documents = first + np.arange(len(BEST))
    ranks = ranking.ranks_of(documents, index.order, lambda some: opened.scores_of("score", some), index.seed)
    assert ranks.dtype == np.int64
    assert ranks.tolist() == [first + RANKED.index(number) for number in range(len(BEST))]
    assert index.order.dtype == (np.uint32 if opened.num_documents <= 1 << 32 else np.uint64)


COUNT = 2**33 + 5 * 2**18
FAR = [0, 2**31 - 2**18, 2**32 - 2**18, 2**32, 2**33, 2**33 + 4 * 2**18]
"""Ranks at which the fake hands out a piece: before and past each edge, and the very last one."""
PIECE = 2**18


class FakeRanking:
    """Hands out pieces of a ranking of 2**33 documents: rank `r` has document `COUNT - 1 - r`."""

    count = COUNT
    dtype = np.uint64

    def hand_out(self, take, advance):
        for first in FAR:
            take(first, (COUNT - 1 - np.arange(first, first + PIECE, dtype=np.int64)).astype(np.uint64))
            advance(PIECE)


class FakeSource:
    """Documents of 2**31 - 1 tokens where the fake ranking looks, of none elsewhere."""

    name, named, num_tokens = "fake", ("fake",), len(FAR) * PIECE * (2**31 - 1)

    def __init__(self, lengths):
        self.lengths = lengths
        for first in FAR:
            lengths[COUNT - first - PIECE : COUNT - first] = 2**31 - 1

    def load_scores(self, score):
        return np.zeros(1, np.float32)

    def load_lengths(self):
        return self.lengths


@pytest.fixture
def sparse_array(tmp_path):
    """Makes arrays of zeros that are holes of a file, however long."""

    def make(name, dtype, count):
        write_sparse(tmp_path / name, np.dtype(dtype).itemsize * count, [])
        return np.memmap(tmp_path / name, dtype, "r+", shape=(count,)).view(np.ndarray)

    yield make
    for path in tmp_path.iterdir():
        path.unlink()


def test_an_index_of_more_than_two_to_the_33_documents_is_written_at_the_right_places(
    tmp_path, monkeypatch, sparse_array
):
    """Marks every 2**18 documents instead of 16, so that they fit a test; the rest is the code of every build."""
    for module in (rank_index, ranking):
        monkeypatch.setattr(module, "STRIDE", PIECE)
    monkeypatch.setattr(rank_index, "prepare_ranking", lambda scores, seed: FakeRanking())
    monkeypatch.setattr(rank_index, "content_digest", lambda source, score: "digest")
    path = tmp_path / "fake.rank"
    write_rank_index(FakeSource(sparse_array("lengths", np.int32, COUNT)), "score", path)
    assert path.stat().st_blocks * 512 < 1 << 26
    index = rank_index._map_arrays(path, rank_index._read_header(path))
    for first in FAR:
        expected = COUNT - 1 - np.arange(first, first + PIECE, dtype=np.int64)
        assert (index.order[first : first + PIECE] == expected.astype(np.uint64)).all()
    steps = np.zeros(COUNT // PIECE + 1, dtype=np.int64)
    steps[1 + np.array(FAR) // PIECE] = PIECE * (2**31 - 1)
    assert index.token_marks.dtype == np.int64
    assert (index.token_marks == np.cumsum(steps)).all()
    assert int(index.token_marks[-1]) > 2**51


@pytest.mark.parametrize("first", [0, 2**31 - 2000, 2**32 - 4000])
def test_keys_of_documents_up_to_two_to_the_32_give_their_numbers_back(first, sparse_array, monkeypatch):
    """A key has 32 bits for the number: the last piece of a source of 2**32 documents uses all of them."""
    count, size = 1 << 32, 4000
    packed = ranking._PackedRanking(np.zeros(size, np.float32), seed=3)
    packed.count, packed._keys = count, sparse_array("keys", np.uint64, count)
    scores = sparse_array("scores", np.float32, count)
    scores[first : first + size] = np.random.default_rng(first).integers(0, 9, size)
    monkeypatch.setattr(ranking, "_PIECE", size)
    packed._pack(scores, first)
    numbers = np.arange(first, first + size)
    assert (packed._unpack(first, first + size) == numbers).all()
    packed._keys[first : first + size].sort()
    ranked = packed._unpack(first, first + size).astype(np.int64)
    assert (ranked == numbers[np.lexsort((tie_hash(numbers, count, 3), scores[numbers]))]).all()
