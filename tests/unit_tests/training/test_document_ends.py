"""Options that keep documents apart find ends of documents in the shards, or are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.samples import SampleOptions
from megatron_kaiyuan.training.document_ends import check_document_ends
from tests.unit_tests.data.tiny import write_shard

END = 9
APART = SampleOptions(eod_token=END, reset_position_ids=True, reset_attention_mask=True)


def plan(folder: Path, *sources: list[list[int]]) -> Plan:
    names = [f"source{number}" for number in range(len(sources))]
    for name, documents in zip(names, sources, strict=True):
        write_shard(folder / name, documents)
    content = {
        "seq_length": 2,
        "sources": {name: {"shards": str(folder / name)} for name in names},
        "phases": [{"name": "all", "order": "shuffled", "sources": dict.fromkeys(names, "all")}],
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    return Plan.load(folder / "plan.yaml")


def test_documents_that_end_with_the_id_pass_empty_ones_included(tmp_path: Path) -> None:
    check_document_ends(plan(tmp_path, [[1, 2, END], [], [3, END]], [[4, 5, END], [END]]), APART)


def test_some_that_do_not_pass_too(tmp_path: Path) -> None:
    """Sentences of a document, say, of which the last alone ends it."""
    check_document_ends(plan(tmp_path, [[1, 2, 3], [3, END]]), APART)


@pytest.mark.parametrize(
    ("option", "flag"),
    [("eod_mask_loss", "--eod-mask-loss"), ("reset_position_ids", "--reset-position-ids"),
     ("reset_attention_mask", "--reset-attention-mask")],
)  # fmt: skip
def test_a_source_in_which_none_does_is_refused(tmp_path: Path, option: str, flag: str) -> None:
    options = replace(SampleOptions(eod_token=END), **{option: True})
    two = plan(tmp_path, [[1, 2, END]], [[9, 9, 4], [1, 2], []])
    with pytest.raises(ConfigError, match=f"{flag}: documents of source source1 end with 2, 4, and none .* id 9"):
        check_document_ends(two, options)


def test_without_such_an_option_nothing_is_looked_at(tmp_path: Path) -> None:
    check_document_ends(plan(tmp_path, [[1, 2, 3]]), SampleOptions(eod_token=END))


def test_a_tokenizer_without_the_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no end-of-document id"):
        check_document_ends(plan(tmp_path, [[1, 2, END]]), replace(APART, eod_token=None))
