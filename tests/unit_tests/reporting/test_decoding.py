"""Ids become the text they were made from, and the reader is told which tokenizer made it."""

from pathlib import Path

import pytest
import sentencepiece

from megatron_kaiyuan.errors import TokenizerError
from megatron_kaiyuan.preprocess import TokenizerConfig, tokenizer_fingerprint
from megatron_kaiyuan.preprocess.fast_tokenize import difficult_texts
from megatron_kaiyuan.reporting.decoding import choose_decoder
from megatron_kaiyuan.shards.manifest import TokenizerRecord
from megatron_kaiyuan.shards.tokenizer import load_reference_tokenizer
from tests.unit_tests.preprocess.corpus import save_bpe, save_tiktoken, training_texts


def ids_of(config, text):
    return load_reference_tokenizer(config).encode([text]).tokens.tolist()


def record_of(config, fingerprint=None):
    tokenizer = load_reference_tokenizer(config)
    return TokenizerRecord(
        type=config.type,
        model=config.model,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        fingerprint=fingerprint or tokenizer_fingerprint(config),
    )


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return TokenizerConfig(type="HuggingFaceTokenizer", model=str(save_bpe(tmp_path_factory.mktemp("bpe"))))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(training_texts()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=950,
        byte_fallback=True,
        minloglevel=2,
    )
    return TokenizerConfig(type="SentencePieceTokenizer", model=str(folder / "tokenizer.model"))


def test_bytes_of_a_hugging_face_tokenizer_come_back_whole(bpe):
    decode = choose_decoder(bpe.type, bpe.model, None).decode
    for text in difficult_texts():
        assert decode(ids_of(bpe, text)) == text


def test_end_of_document_ids_are_shown(bpe):
    assert choose_decoder(bpe.type, bpe.model, None).decode([0]) == "<|endoftext|>"


def test_text_of_a_sentencepiece_model_comes_back_as_the_model_normalizes_it(sentencepiece_model):
    decode = choose_decoder(sentencepiece_model.type, sentencepiece_model.model, None).decode
    ids = ids_of(sentencepiece_model, "the quick brown fox, déjà vu 1+1")
    assert decode(ids) == "the quick brown fox, déjà vu 1+1"


def test_bytes_of_a_tiktoken_vocabulary_come_back_whole_with_special_ids_by_name(tmp_path):
    path = str(save_tiktoken(tmp_path / "vocabulary.json"))
    config = TokenizerConfig(type="TikTokenizer", model=path, vocab_size=1263)
    decode = choose_decoder("TikTokenizer", path, None).decode
    for text in difficult_texts():
        if "<" not in text:  # a special token's name in the text is encoded as that token
            assert decode(ids_of(config, text)) == text
    assert decode([2]) == "<SPECIAL_2>"


def test_the_tokenizer_of_the_manifest_is_used_when_no_other_is_named(bpe):
    chosen = choose_decoder(None, None, record_of(bpe))
    assert chosen.decode(ids_of(bpe, "brown fox")) == "brown fox"
    assert chosen.note == f"decoded with HuggingFaceTokenizer {bpe.model}"


def test_another_tokenizer_than_that_of_the_shards_is_used_and_said(bpe):
    chosen = choose_decoder(bpe.type, bpe.model, record_of(bpe, fingerprint="0" * 64))
    assert "it is another one (fingerprint" in chosen.note
    assert chosen.decode(ids_of(bpe, "brown fox")) == "brown fox"


@pytest.mark.parametrize("lost", [True, False])
def test_ids_are_shown_where_no_tokenizer_is_known_or_the_recorded_one_is_not_here(bpe, tmp_path, lost):
    recorded = record_of(bpe).model_copy(update={"model": str(tmp_path / "gone")}) if lost else None
    chosen = choose_decoder(None, None, recorded)
    assert chosen.decode([3, 14, 15]) == "3 14 15"
    assert chosen.note.startswith("token ids: ")
    assert ("cannot be loaded" if lost else "give --tokenizer-type and --tokenizer-model") in chosen.note


def test_the_text_of_a_null_tokenizer_is_its_ids():
    assert choose_decoder("NullTokenizer", None, None).decode([7, 0]) == "7 0"


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer"])
@pytest.mark.parametrize("content", [None, "{}"])
def test_a_tokenizer_that_was_asked_for_and_cannot_be_loaded_is_an_error(tmp_path, kind, content):
    path = tmp_path / "tokenizer.json"
    if content:
        path.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer-model .*tokenizer\.json"):
        choose_decoder(kind, str(path), None)
    assert Path(path).exists() == bool(content)
