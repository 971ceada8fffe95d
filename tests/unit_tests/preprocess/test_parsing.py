"""Rows are read alike by both JSON parsers, however plain and peculiar rows follow one another."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.preprocess import documents
from megatron_kaiyuan.preprocess.documents import DocumentBatch, parse_block
from megatron_kaiyuan.preprocess.fields import FieldKeys
from megatron_kaiyuan.preprocess.readers import Block, Lines

pytest.importorskip("orjson")
KEYS = FieldKeys(text=("text", "more"), scores=("score", "meta.quality"), id="id")
PLAIN = {"text": "a é", "more": "b", "score": 0.5, "meta.quality": 1.5, "id": "x"}
NESTED = {**{key: value for key, value in PLAIN.items() if key != "meta.quality"}, "meta": {"quality": 2}}
PECULIAR = [
    json.dumps(NESTED),
    json.dumps(PLAIN | {"id": 7}),
    json.dumps(PLAIN | {"score": 1}),
    json.dumps(PLAIN | {"score": True}),
    json.dumps(PLAIN | {"score": 1e300}),
    json.dumps(PLAIN | {"score": float("nan")}),
    json.dumps(PLAIN | {"text": "\ud800"}),
    json.dumps(PLAIN | {"text": None}),
    json.dumps(PLAIN | {"id": "\udc00"}),
    json.dumps({"text": "t"}),
    json.dumps([1]),
    '"text"',
    "",
    "{broken",
    "\ufeff" + json.dumps(PLAIN),
]


def parsed(lines: list[str]) -> DocumentBatch:
    data = "".join(line + "\n" for line in lines).encode()
    return parse_block(Block(0, len(data), Lines(data)), KEYS)


@settings(deadline=None, max_examples=80)
@given(stretches=st.lists(st.one_of(st.integers(1, 150), st.sampled_from(PECULIAR)), max_size=12))
def test_both_parsers_read_any_mixture_of_rows_alike(stretches: list[int | str]) -> None:
    lines = [line for part in stretches for line in ([json.dumps(PLAIN)] * part if isinstance(part, int) else [part])]
    fast = parsed(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_fast_json", lambda: None)
        slow = parsed(lines)
    assert fast.rows == slow.rows == len(lines)
    assert fast.row_numbers == slow.row_numbers
    assert (fast.texts, fast.scores, fast.ids) == (slow.texts, slow.scores, slow.ids)
    assert [(fault.row, fault.reason) for fault in fast.faults] == [(fault.row, fault.reason) for fault in slow.faults]
