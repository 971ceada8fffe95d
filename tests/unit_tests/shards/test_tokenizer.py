"""Ids are those of Megatron's own tokenizer wrappers, type by type, over hard Unicode."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from megatron.core.tokenizers import MegatronTokenizer

from megatron_kaiyuan.errors import TokenizerError
from megatron_kaiyuan.preprocess import TokenizerConfig, fast_tokenize, tokenizer_fingerprint
from megatron_kaiyuan.preprocess.fast_tokenize import choose_backend, difficult_texts, load_tokenizer
from megatron_kaiyuan.shards.tokenizer import TokenBatch, load_reference_tokenizer
from tests.unit_tests.preprocess.corpus import needs_gigatoken, save_bpe, save_tiktoken, training_texts


@pytest.fixture(autouse=True)
def known_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # megatron warns when it has to guess


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return folder / "tokenizer.model"


def split(batch: TokenBatch) -> list[list[int]]:
    return [part.tolist() for part in np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])]


def megatron(library: str, path: Path | None = None, **settings: Any) -> MegatronTokenizer:
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=path and str(path), metadata_path={"library": library}, **settings
    )


def assert_same(config: TokenizerConfig, theirs: MegatronTokenizer) -> None:
    ours = load_reference_tokenizer(config)
    texts = difficult_texts()
    assert split(ours.encode(texts)) == [theirs.tokenize(text) for text in texts]
    assert ours.vocab_size == theirs.vocab_size
    assert ours.eod_id == theirs.eod


@pytest.mark.parametrize("include", [True, False])
def test_hugging_face_ids_are_those_of_megatron(tmp_path: Path, include: bool) -> None:  # noqa: FBT001
    folder = save_bpe(tmp_path, with_bos=True)
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder), include_special_tokens=include)
    assert_same(config, megatron("huggingface", folder, include_special_tokens=include))


def test_sentencepiece_ids_are_those_of_megatron(sentencepiece_model: Path) -> None:
    config = TokenizerConfig(type="SentencePieceTokenizer", model=str(sentencepiece_model))
    theirs = megatron("sentencepiece", sentencepiece_model, legacy=False, ignore_extra_whitespaces=True)
    assert_same(config, theirs)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktoken_ids_are_those_of_megatron(tmp_path: Path, pattern: Any) -> None:
    path = save_tiktoken(tmp_path / "vocabulary.json")
    sizes = {"vocab_size": 273, "num_special_tokens": 10}
    config = TokenizerConfig(
        type="TikTokenizer",
        model=str(path),
        vocab_size=273,
        tiktoken_pattern=pattern,
        tiktoken_num_special_tokens=10,
    )
    assert_same(config, megatron("tiktoken", path, pattern=pattern, **sizes))


def test_null_ids_are_those_of_megatron() -> None:
    ours = load_reference_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=100))
    theirs = megatron("null-text", vocab_size=100)
    assert split(ours.encode(["1 2 99", "0"])) == [theirs.tokenize("1 2 99"), theirs.tokenize("0")]
    assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size, theirs.eod)


@pytest.mark.parametrize("text", ["1 x", "1  2", "100", "-1", "1.5"])
def test_null_tokenizer_names_what_is_no_id(text: str) -> None:
    batch = load_reference_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=100)).encode(["7", text])
    assert list(batch.faults) == [1]
    assert batch.lengths.tolist() == [1, 0]


@needs_gigatoken
@pytest.mark.parametrize("with_bos", [True, False])
def test_gigatoken_gives_the_ids_of_the_reference(tmp_path: Path, with_bos: bool) -> None:  # noqa: FBT001
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(save_bpe(tmp_path, with_bos=with_bos)))
    assert choose_backend(config, training_texts()).fast
    texts = training_texts()
    assert split(load_tokenizer(config, fast=True).encode(texts)) == split(
        load_tokenizer(config, fast=False).encode(texts)
    )
    assert split(load_tokenizer(config, fast=True).encode([])) == [[]]


@pytest.mark.parametrize("text", ["word " * 8_000, "9" * 4_000, "9" * 40_000])
def test_a_message_about_a_document_does_not_hold_the_document(text: str) -> None:
    batch = load_reference_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=100)).encode(["7", text])
    assert batch.lengths.tolist() == [1, 0]
    assert text[:39] in batch.faults[1]
    assert len(batch.faults[1]) < 200


@pytest.mark.parametrize("type_", ["Llama2Tokenizer", "TikTokenizer", "NullTokenizer"])
def test_types_without_a_faster_twin_use_the_reference(type_: str) -> None:
    config = TokenizerConfig(type=type_, model="not read", vocab_size=None if type_ == "Llama2Tokenizer" else 9)
    assert not choose_backend(config, ["any"]).fast


def test_reference_is_used_where_gigatoken_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(save_bpe(tmp_path)))

    class Different:
        vocab_size, eod_id = 500, 0

        def encode(self, texts: list[str]) -> TokenBatch:
            batch = load_reference_tokenizer(config).encode(texts)
            batch.tokens[batch.lengths[0] + 1] += 1
            return batch

    monkeypatch.setattr(fast_tokenize, "_load_gigatoken", lambda config: Different())
    choice = choose_backend(config, ["first", "second document", "third"])
    assert not choice.fast
    assert "'second document'" in choice.reason


@needs_gigatoken
def test_a_difference_during_the_run_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(save_bpe(tmp_path)))
    tokenizer: Any = load_tokenizer(config, fast=True)
    monkeypatch.setattr(
        tokenizer, "_reference", load_reference_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=9))
    )
    with pytest.raises(
        fast_tokenize.TokenizersDiffer, match="gigatoken gives other ids than the reference for '1 2 3'"
    ):
        tokenizer.encode(["1 2 3"])


def test_fingerprint_is_of_the_content_and_not_of_the_path(tmp_path: Path) -> None:
    folder = save_bpe(tmp_path / "a")
    (tmp_path / "b.json").write_bytes((folder / "tokenizer.json").read_bytes())
    same = [folder, folder / "tokenizer.json", tmp_path / "b.json"]
    prints = {tokenizer_fingerprint(TokenizerConfig(type="HuggingFaceTokenizer", model=str(path))) for path in same}
    assert len(prints) == 1
    other = json.loads((tmp_path / "b.json").read_text())
    other["model"]["merges"].pop()
    (tmp_path / "b.json").write_text(json.dumps(other))
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(tmp_path / "b.json"))
    assert tokenizer_fingerprint(config) not in prints
    bare = TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder), include_special_tokens=False)
    assert tokenizer_fingerprint(bare) not in prints


def test_end_of_document_is_declared_then_known_then_asked(tmp_path: Path) -> None:
    folder = save_bpe(tmp_path / "declared", eos="<s>")
    model = {"type": "HuggingFaceTokenizer", "model": str(folder)}
    assert load_reference_tokenizer(TokenizerConfig(**model)).eod_id == 1
    assert load_reference_tokenizer(TokenizerConfig(**model, eod_token="<|endoftext|>")).eod_id == 0
    undeclared = save_bpe(tmp_path / "undeclared", eos=None)
    assert load_reference_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(undeclared))).eod_id == 0
    with pytest.raises(TokenizerError, match=r"--eod-token '<none>': not in the vocabulary"):
        load_reference_tokenizer(TokenizerConfig(**model, eod_token="<none>"))


def test_config_that_names_other_ids_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = save_bpe(tmp_path)
    settings = {"added_tokens_decoder": {"500": {"content": "<|im_end|>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: token '<\|im_end\|>' has id 500 there and None"):
        load_reference_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "Unknown"}, "choose one of HuggingFaceTokenizer"),
        ({"type": "NullTokenizer"}, "needs a positive --vocab-size"),
        ({"type": "HuggingFaceTokenizer"}, "--tokenizer-model is missing"),
        ({"type": "HuggingFaceTokenizer", "model": "a", "vocab_size": 5}, "leave the flag out"),
        ({"type": "HuggingFaceTokenizer", "model": "missing.json"}, r"missing\.json: No such file"),
        ({"type": "HuggingFaceTokenizer", "model": "."}, r"has no tokenizer\.json"),
        ({"type": "HuggingFaceTokenizer", "model": "broken"}, "cannot be loaded as HuggingFaceTokenizer"),
        ({"type": "SentencePieceTokenizer", "model": "broken"}, "cannot be loaded as SentencePieceTokenizer"),
        ({"type": "TikTokenizer", "model": "broken"}, "cannot be loaded as TikTokenizer"),
        ({"type": "TikTokenizer", "model": "object.json"}, "is a JSON list of objects"),
        ({"type": "TikTokenizer", "model": "short.json"}, "give --vocab-size 1263"),
    ],
)
def test_unusable_tokenizers_are_named_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken").write_bytes(b"{broken")
    Path("object.json").write_text("{}")
    save_tiktoken(Path("short.json"))
    with pytest.raises(TokenizerError, match=message):
        load_reference_tokenizer(TokenizerConfig(**settings))
