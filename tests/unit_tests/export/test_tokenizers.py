"""Tokenizers of every kind travel with a model: same ids, the end of text that training had, and no other tokenizer."""

import io
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer

from megatron_kaiyuan.checkpoints.identity import END_OF_TEXT, PLAN_RECORD, TOKENIZER, store_tokenizer
from megatron_kaiyuan.checkpoints.tokenizer import named_config, tokenizer_of_checkpoint
from megatron_kaiyuan.errors import ConvertError, TokenizerError
from megatron_kaiyuan.evaluation.generation import Sampling, continue_text
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from megatron_kaiyuan.export.tokenizer_conversion import SAMPLE_TEXTS, converted, require_same_ids
from megatron_kaiyuan.shards.tokenizer import TokenizerConfig, load_reference_tokenizer, tokenizer_fingerprint
from tests.unit_tests.export.small_models import KAIYUAN, SmallModel, save_model
from tests.unit_tests.model.reference import Shape
from tests.unit_tests.preprocess.corpus import save_bpe, save_tiktoken, training_texts

ROWS = 1280
TIKTOKEN = {"vocab_size": 1263}


def train_sentencepiece(path: Path, **options: Any) -> Path:
    content = io.BytesIO()
    settings: dict[str, Any] = {"vocab_size": 1000, "byte_fallback": True, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in training_texts()),
        model_writer=content,
        minloglevel=2,
        **settings | options,
    )
    path.write_bytes(content.getvalue())
    return path


def texts_of_sentencepiece() -> list[str]:
    """Without what docs/convert.md says that a converted model reads otherwise."""
    other = ("<s>", "</s>", "\u0301\u0323", "x" * 60)
    return [text for text in training_texts() if not any(part in text for part in other)]


LLAMA = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
PIECES: dict[str, dict[str, Any]] = {
    "as Llama's": LLAMA,
    "as trained by default": {"model_type": "unigram"},
    "BPE, by default": {"model_type": "bpe"},
    "spaces kept, no prefix": {
        "model_type": "unigram",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<tool>"],
    },
    "spaces joined, nothing else": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "no bytes": {"model_type": "unigram", "byte_fallback": False},
}


@pytest.mark.parametrize("name", PIECES)
def test_a_converted_sentencepiece_model_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    config = named_config(train_sentencepiece(tmp_path / "t.model", **PIECES[name]))
    assert config.type == "SentencePieceTokenizer"
    reference, conversion = load_reference_tokenizer(config), converted(config)
    for text in [*SAMPLE_TEXTS, *texts_of_sentencepiece(), "with <tool> inside"]:
        assert conversion.encode(text).ids == reference.encode([text]).tokens.tolist()
    if PIECES[name].get("byte_fallback", True):  # else an unknown piece is shown otherwise
        for text in SAMPLE_TEXTS:
            ids = reference.encode([text]).tokens.tolist()
            assert conversion.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_a_converted_tiktoken_vocabulary_gives_the_same_ids(pattern: Any, tmp_path: Path) -> None:
    config = named_config(save_tiktoken(tmp_path / "ranks.json"))
    assert config.type == "TikTokenizer"
    config = replace(config, tiktoken_pattern=pattern, **TIKTOKEN)
    reference, conversion = load_reference_tokenizer(config), converted(config)
    for text in [*SAMPLE_TEXTS, *training_texts(), "with </s> and <SPECIAL_9> inside"]:
        ids = reference.encode([text]).tokens.tolist()
        assert conversion.encode(text).ids == ids
        assert conversion.decode(ids, skip_special_tokens=False) == reference.decode(ids)


def test_other_ids_are_refused_with_the_text_and_the_place(tmp_path: Path) -> None:
    reference = load_reference_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(save_bpe(tmp_path))))
    same = reference.encode(["a"]).tokens.tolist()
    with pytest.raises(ConvertError, match=rf"id 0 of 'a' is 499 instead of {same[0]}"):
        require_same_ids(reference, lambda text: reference.encode([text]).tokens.tolist() if text < "a" else [499], "X")
    with pytest.raises(ConvertError, match="id 0 of 'a' is None"):
        require_same_ids(reference, lambda text: [] if text == "a" else reference.encode([text]).tokens.tolist(), "X")
    words = train_sentencepiece(tmp_path / "w.model", model_type="word", byte_fallback=False)
    with pytest.raises(ConvertError, match="words or characters"):
        converted(named_config(words))


def planned(config: TokenizerConfig, end: int | None) -> dict[str, Any]:
    """What the checkpoint of a run on shards of a tokenizer records."""
    return {TOKENIZER: tokenizer_fingerprint(config), PLAN_RECORD: {"plan": "some"}, END_OF_TEXT: end}


def named(kind: str, folder: Path) -> tuple[Path, TokenizerConfig, int]:
    """A tokenizer file, as preprocessing was told of it, and an id that its documents ended with."""
    folder.mkdir()
    if kind == "tiktoken":
        path = save_tiktoken(folder / "ranks.json")
        return path, replace(named_config(path), **TIKTOKEN), 2
    if kind == "sentencepiece":
        path = train_sentencepiece(folder / "t.model", **LLAMA)
        return path, named_config(path), 2
    bpe = save_bpe(folder / "bpe", eos=None if kind == "tokenizer.json" else "<s>")
    return (bpe / "tokenizer.json" if kind == "tokenizer.json" else bpe), named_config(bpe), 0


KINDS = ["tiktoken", "sentencepiece", "tokenizer.json", "folder with another end"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [KAIYUAN, SmallModel("stock")], ids=["kaiyuan", "llama"])
def test_an_export_has_the_ids_and_the_end_of_training(kind: str, model: SmallModel, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path, config, end = named(kind, tmp_path / "t")
    whole = replace(model, shape=Shape(vocab=ROWS))
    checkpoint = save_model(whole, tmp_path / "run", torch.float32)
    arguments = {**vars(checkpoint.arguments), **planned(config, end), "vocab_size": config.vocab_size}
    checkpoint.__dict__["arguments"] = Namespace(**arguments)
    export_checkpoint(checkpoint, tmp_path / "hf", tokenizer=path, check=True)

    opened = AutoTokenizer.from_pretrained(tmp_path / "hf")
    reference = load_reference_tokenizer(config)
    for text in texts_of_sentencepiece() if kind == "sentencepiece" else training_texts():
        assert opened(text)["input_ids"] == reference.encode([text]).tokens.tolist()
    assert opened.eos_token_id == end
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (
        generation["eos_token_id"] == json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == end
    )
    assert generation["suppress_tokens"] == list(range(reference.vocab_size, ROWS))
    if config.type == "HuggingFaceTokenizer":
        assert Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).get_vocab_size() == 500


def arguments_of_run(**changes: Any) -> Namespace:
    return Namespace(padded_vocab_size=ROWS, vocab_size=1263, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_knows_text_and_end_of_any_tokenizer(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    path, config, end = named(kind, tmp_path / "t")
    tokenizer = tokenizer_of_checkpoint(path, arguments_of_run(**planned(config, end)))
    assert (tokenizer.compared, tokenizer.end) == (True, end)
    reply = [*tokenizer.prompt("jumps over the lazy dog"), end, *tokenizer.prompt("never")]
    start = len(tokenizer.prompt("the fox"))

    def model(ids: torch.Tensor, _positions: torch.Tensor, _mask: None) -> torch.Tensor:
        following = torch.tensor(reply)[ids.shape[1] - start]
        return torch.nn.functional.one_hot(following.expand(ids.shape), ROWS).float()

    said = continue_text(model, tokenizer, "the fox", Sampling(temperature=0.0), 64)
    assert said.strip() == "jumps over the lazy dog"


def test_a_prompt_goes_on_although_the_tokenizer_ends_every_text(tmp_path: Path) -> None:
    path = save_bpe(tmp_path / "bpe", with_bos=True)
    tokenizer = tokenizer_of_checkpoint(path, arguments_of_run())
    assert tokenizer.tokenizer.encode(["fox"]).tokens.tolist() == [*tokenizer.prompt("fox"), 0]
    assert tokenizer.prompt("fox")[0] == 1


def test_another_tokenizer_is_refused_however_well_its_ids_fit(tmp_path: Path) -> None:
    path = save_bpe(tmp_path / "bpe")
    other = json.loads((path / "tokenizer.json").read_text())
    other["model"]["merges"] = []
    (tmp_path / "other.json").write_text(json.dumps(other))
    of_run = arguments_of_run(**planned(named_config(path), 0))
    with pytest.raises(TokenizerError, match=r"another one than the model was trained with \(fingerprint"):
        tokenizer_of_checkpoint(tmp_path / "other.json", of_run)
    # A run without a plan, or on shards that do not tell, records what its tokenizer does to a text.
    reference = load_reference_tokenizer(named_config(path))
    megatrons = Namespace(tokenize=lambda text: reference.encode([text]).tokens.tolist(), eod=0)
    for plan in (False, True):
        told = arguments_of_run(**({PLAN_RECORD: {"plan": "some"}} if plan else {}))
        store_tokenizer(told, None, megatrons, planned=plan)
        assert tokenizer_of_checkpoint(path, told).compared
        with pytest.raises(TokenizerError, match=r"another one than the model was trained with \(other ids"):
            tokenizer_of_checkpoint(tmp_path / "other.json", told)
    stock = tokenizer_of_checkpoint(tmp_path / "other.json", arguments_of_run())
    assert not stock.compared


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([], r"neither tokenizer\.json nor a \.model file there"),
        (["a.model", "b.model"], r"2 \.model files there"),
        (["missing"], "No such file or directory"),
    ],
)
def test_what_is_no_tokenizer_is_named(files: list[str], complaint: str, tmp_path: Path) -> None:
    for name in files:
        if name != "missing":
            (tmp_path / name).write_bytes(b"")
    with pytest.raises(TokenizerError, match=complaint):
        named_config(tmp_path / "missing" if files == ["missing"] else tmp_path)


def test_an_end_that_the_tokenizer_lacks_and_one_that_was_made_up(tmp_path: Path) -> None:
    path = save_bpe(tmp_path / "bpe")
    with pytest.raises(TokenizerError, match="500 ids, but the documents of the run ended with id 700"):
        tokenizer_of_checkpoint(path, arguments_of_run(**{END_OF_TEXT: 700}))
    made_up = {"tokenizer_type": "NullTokenizer", "null_tokenizer_eod_id": None, END_OF_TEXT: 499}
    assert tokenizer_of_checkpoint(path, arguments_of_run(**made_up)).end == 0
