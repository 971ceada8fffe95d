"""Storage order and rank order, against the plain list of tokens."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import Segment, open_source
from megatron_kaiyuan.documents.order import RankedOrder, StorageOrder
from megatron_kaiyuan.documents.rank_index import build_rank_index
from tests.unit_tests.data.tiny import INT32_CODE, UINT16_CODE, numbered_documents, write_source

SETTINGS = settings(deadline=None, max_examples=40)


@st.composite
def sources(draw):
    """Documents (some empty, tokens all different), distinct scores, cuts into shards (some empty), dtype."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=50).filter(any))
    scores = draw(st.permutations(range(len(lengths))))
    cuts = draw(st.lists(st.integers(0, len(lengths)), max_size=4))
    return lengths, scores, cuts, draw(st.sampled_from([INT32_CODE, UINT16_CODE]))


class Case:
    """A written source with both orders, and what a list of its documents says about them."""

    def __init__(self, folder, drawn):
        lengths, scores, cuts, code = drawn
        self.documents = numbered_documents(lengths, first=100)
        write_source(folder, self.documents, scores, cuts, code)
        self.source = open_source("source", str(folder))
        ranked = RankedOrder(self.source, build_rank_index(self.source, "score"), "score")
        by_score = sorted(range(len(lengths)), key=lambda n: scores[n])
        self.orders = [(StorageOrder(self.source), list(range(len(lengths)))), (ranked, by_score)]


def both_orders(test):
    """Run a test for the storage and the rank order of generated sources."""

    @SETTINGS
    @given(drawn=sources())
    def wrapped(drawn):
        with tempfile.TemporaryDirectory() as folder:
            case = Case(Path(folder) / "source", drawn)
            for order, numbers in case.orders:
                test(case, order, numbers)

    wrapped.__name__ = test.__name__
    return wrapped


@both_orders
def test_token_offsets_are_running_sums_of_lengths(case, order, numbers):
    sums = np.concatenate([[0], np.cumsum([len(case.documents[n]) for n in numbers])])
    everywhere = np.arange(len(numbers) + 1)
    assert order.num_documents == len(numbers)
    assert order.token_offsets(everywhere).tolist() == sums.tolist()
    assert order.token_offsets(everywhere[::-1].copy()).tolist() == sums[::-1].tolist()
    assert order.token_offsets(everywhere[:0]).tolist() == []
    assert order.token_offsets(everywhere[-1:]).tolist() == [sums[-1]]


@both_orders
def test_each_token_is_located_in_the_document_that_holds_it(case, order, numbers):
    owners = [position for position, n in enumerate(numbers) for _ in case.documents[n]]
    assert [order.locate(token) for token in range(len(owners))] == owners


@both_orders
def test_reading_any_stretch_gives_those_tokens(case, order, numbers):
    flat = [token for n in numbers for token in case.documents[n]]
    for start in range(0, len(flat), 3):
        for stop in range(start + 1, len(flat) + 1, 4):
            out = np.full(stop - start, -1, dtype=np.int64)
            order.read(start, out)
            assert out.tolist() == flat[start:stop]


@both_orders
def test_segments_read_back_from_their_shards_are_the_tokens(case, order, numbers):
    flat = [token for n in numbers for token in case.documents[n]]
    shards = {shard.prefix: shard for shard in case.source.shards}
    for start in range(0, len(flat), 3):
        for stop in range(start + 1, len(flat) + 1, 5):
            segments = order.segments(start, stop - start)
            assert all(isinstance(segment, Segment) and segment.start < segment.stop for segment in segments)
            tokens = []
            assert [(shard, document, start, stop) for shard, document, start, stop in segments] == segments
            for segment in segments:
                shard = shards[segment.shard]
                first = int(shard.pointers[segment.document]) // shard.dtype.itemsize
                tokens += shard.token_data[first + segment.start : first + segment.stop].tolist()
                assert segment.stop <= shard.lengths[segment.document]
            assert tokens == flat[start:stop]


@both_orders
def test_positions_of_documents_invert_the_order(case, order, numbers):
    documents = np.arange(len(numbers))
    assert [numbers[p] for p in order.positions_of(documents)] == documents.tolist()
    assert order.positions_of(documents[:0]).tolist() == []


@both_orders
def test_the_source_counts_over_its_shards(case, order, numbers):
    assert case.source.num_documents == len(case.documents)
    assert case.source.num_tokens == sum(map(len, case.documents))
    everything = np.arange(len(numbers))
    assert case.source.lengths(everything).tolist() == [len(document) for document in case.documents]
    assert case.source.lengths(everything[:0]).tolist() == []
    segments = [case.source.segment(n, 0, 1) for n in everything.tolist()]
    assert [case.source.number(segment) for segment in segments] == everything.tolist()


@pytest.mark.parametrize("cuts", [(), (2,), (0, 2, 2, 5)])
def test_an_order_of_one_long_and_many_empty_documents_is_read_whole(tmp_path, cuts):
    documents = [[], [], [1, 2, 3, 4, 5], [], []]
    write_source(tmp_path / "s", documents, [5, 4, 3, 2, 1], cuts)
    source = open_source("s", str(tmp_path / "s"))
    for order in (StorageOrder(source), RankedOrder(source, build_rank_index(source, "score"), "score")):
        out = np.zeros(5, np.int64)
        order.read(0, out)
        assert out.tolist() == [1, 2, 3, 4, 5]
        assert order.locate(4) == 2
