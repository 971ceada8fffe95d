"""One comparison of tokenizers, whoever names one: a plan, the command line, or a reader of shards."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kaiyuan.errors import KaiyuanError
from megatron_kaiyuan.reporting.decoding import choose_decoder
from megatron_kaiyuan.shards.manifest import ShardRecord, TokenizerRecord
from megatron_kaiyuan.shards.shard import open_shard
from megatron_kaiyuan.shards.tokenizer import TokenizerConfig, tokenizer_fingerprint
from megatron_kaiyuan.shards.tokenizer_match import check_tokenizer_of_plan, different_tokenizers, find_mismatch
from megatron_kaiyuan.training.plan_arguments import check_tokenizer_of_shards
from tests.unit_tests.data.tiny import numbered_documents, write_shard
from tests.unit_tests.preprocess.corpus import save_bpe, save_tiktoken

HUGGING_FACE = "HuggingFaceTokenizer"


def record(kind: str, fingerprint: str, model: str | None = None) -> TokenizerRecord:
    return TokenizerRecord(type=kind, model=model, vocab_size=283, eod_id=None, fingerprint=fingerprint)


def test_all_who_name_a_tokenizer_get_the_same_reason(tmp_path: Path) -> None:
    model = str(save_bpe(tmp_path / "bpe"))
    write_shard(tmp_path / "text", numbered_documents([4]))
    recorded = record(HUGGING_FACE, "0" * 64, model)
    shard = replace(open_shard(str(tmp_path / "text")), record=ShardRecord(recorded, False, 3, None, None))
    mismatch = find_mismatch(HUGGING_FACE, model, recorded)
    assert mismatch is not None
    assert mismatch.reason.startswith("it is another one (fingerprint ")
    assert mismatch.reason.endswith(", that of the shards 000000000000)")

    args = argparse.Namespace(tokenizer_type=HUGGING_FACE, tokenizer_model=model)
    with pytest.raises(KaiyuanError) as of_flags:
        check_tokenizer_of_shards(args, recorded, None)
    with pytest.raises(KaiyuanError) as of_plan:
        check_tokenizer_of_plan(HUGGING_FACE, model, shard)
    of_reader = choose_decoder(HUGGING_FACE, model, recorded).note
    for told in (str(of_flags.value), str(of_plan.value), of_reader):
        assert f"{HUGGING_FACE} " in told
        assert f"{model}: {mismatch.reason}" in told


def test_options_that_only_choose_ids_are_no_difference(tmp_path: Path) -> None:
    model = str(save_bpe(tmp_path / "bpe"))
    for special in (True, False):
        for split in (True, False):
            config = TokenizerConfig(
                type=HUGGING_FACE, model=model, include_special_tokens=special, split_special_tokens=split
            )
            assert find_mismatch(HUGGING_FACE, model, record(HUGGING_FACE, tokenizer_fingerprint(config))) is None


def test_the_layout_of_a_tiktokenizer_is_compared_where_it_is_known(tmp_path: Path) -> None:
    model = str(save_tiktoken(tmp_path / "vocabulary.json"))
    layout = {"vocab_size": 283, "tiktoken_num_special_tokens": 20}
    recorded = record(
        "TikTokenizer", tokenizer_fingerprint(TokenizerConfig(type="TikTokenizer", model=model, **layout))
    )
    assert find_mismatch("TikTokenizer", model, recorded) is None
    assert find_mismatch("TikTokenizer", model, recorded, layout) is None
    mismatch = find_mismatch("TikTokenizer", model, recorded, layout | {"tiktoken_num_special_tokens": 19})
    assert mismatch is not None
    assert not mismatch.unreadable
    gone = find_mismatch("TikTokenizer", str(tmp_path / "gone.json"), recorded)
    assert gone is not None
    assert gone.unreadable


def test_the_first_shard_that_differs_is_named_with_how_many_do() -> None:
    same, other = record(HUGGING_FACE, "a" * 64, "one"), record(HUGGING_FACE, "b" * 64, "two")
    assert different_tokenizers([]) is None
    assert different_tokenizers([("first", same), ("second", same)]) is None
    message = different_tokenizers([("first", same), ("second", same), ("third", other), ("fourth", other)])
    assert message == (
        "shards first and third were built with different tokenizers (fingerprints aaaaaaaaaaaa and bbbbbbbbbbbb; "
        "2 of 4 shards differ from the first)"
    )
